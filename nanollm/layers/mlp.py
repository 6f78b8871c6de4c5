"""The feed-forward: what each token computes alone, in a space F wide.

    gated        down( act(gate x) ⊙ up x )     Shazeer 2020 (arXiv 2002.05202), eq. 5-6
    plain        down( act(up x) )              Vaswani et al. 2017, eq. 2
    silu(x)      x σ(x)                         gated with it: SwiGLU
    gelu(x)      x Φ(x), gated: GeGLU           gelu_tanh: its tanh approximation; relu: max(x, 0); relu2: its square

Shapes: B batch, T tokens, D model width, F feed-forward width.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from nanollm.config import MLP as MLPConfig
from nanollm.init import residual
from nanollm.layers.linear import Linear
from nanollm.ops import accelerated


def activate(name: str, x: Tensor) -> Tensor:
    """The activation functions of `config.ACTIVATIONS`, elementwise."""
    match name:
        case "silu":
            return F.silu(x)
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "relu":
            return F.relu(x)
        case "relu2":
            return F.relu(x).square()
    raise AssertionError(name)


@accelerated
def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) ⊙ up, both (…, F)."""
    return activate(activation, gate) * up


class MLP(nn.Module):
    """Two or three matrices and an activation; the equations are at the head of the file."""
    INIT = {"down.weight": residual}
    WORDS = {"activation": "{} in place of silu", "gated": "two matrices, no gate", "bias": "biases"}

    def __init__(self, config: MLPConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        self.gate = Linear(dim, config.hidden, config.bias) if config.gated else None
        self.up = Linear(dim, config.hidden, config.bias)
        self.down = Linear(config.hidden, dim, config.bias)

    def forward(self, x: Tensor) -> Tensor:                     # (B, T, D) → (B, T, D)
        if self.gate is None:
            return self.down(activate(self.config.activation, self.up(x)))
        return self.down(gated(self.gate(x), self.up(x), self.config.activation))

    @staticmethod
    def multiply_adds(config: MLPConfig, dim: int) -> int:
        return (3 if config.gated else 2) * dim * config.hidden
