"""Griffin's recurrent block: a short convolution and a gated linear recurrence, times a second branch. RecurrentGemma.

    x ──┬── x_proj ── causal conv ── RG-LRU ── ⊙ ── out_proj
        └── y_proj ── gelu ────────────────────┘                De et al. 2024 (arXiv 2402.19427), §2.3, Figure 2c

    r_t = σ(W_a u_t + b_a)    i_t = σ(W_x u_t + b_x)            the real-gated linear recurrent unit, §2.4, eq. 1 … 4
    a_t = a^(8 r_t),   a = exp(−softplus(Λ)) = σ(−Λ)
    h_t = a_t ⊙ h_{t−1} + √(1 − a_t²) ⊙ (i_t ⊙ u_t)             u the convolved x; y = h, there is no C

The paper has a = σ(Λ): Λ as the published weights store it, and as it is here, has the other sign.

The first token of a document has nothing before it: there h_t = i_t ⊙ u_t, without the root. W_a and W_x are
block-diagonal, a block a head, which is all that the heads are for. The convolution has no activation.

From the gates on all is float32: a is close to 1, and in bfloat16 it would be one of a hundred values. √(1 − a²) is
taken from log a, as √(−expm1(2 log a)); the infinite slope of the root at a = 1 does no harm, log a meets it with a
slope of 0.

Shapes: B batch, T tokens, D model width, I channels of the recurrence, H heads, k width of the convolution.
    a, b (B, T, I)    h (B, I)

Two forms with one meaning. The recurrence takes T steps. The chunked form lets all chunks of Q tokens run side by side
from h = 0, Q steps; then the true h goes from chunk to chunk, T/Q steps, and each token adds what the decays up to it
have left of it.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanollm.config import RGLRU as RGLRUConfig
from nanollm.init import matrix, residual, zero
from nanollm.layers.forward_context import ForwardContext
from nanollm.layers.linear import Linear
from nanollm.layers.mamba import Conv1d, aligned, convolve, window
from nanollm.layers.mlp import gated
from nanollm.layers.state import ScanState

CHUNKED_FROM = 32       # tokens on, steps side by side take less time than steps one after the other


def linear_scan(a: Tensor, b: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """The definition: h_t = a_t ⊙ h_{t−1} + b_t; a_t = 0 forgets. Returns all h_t (B, T, I), and the last again."""
    states = []
    for t in range(a.shape[1]):
        h = a[:, t] * h + b[:, t]
        states.append(h)
    return torch.stack(states, 1), h


def linear_scan_chunked(a: Tensor, b: Tensor, h: Tensor, chunk: int = 16) -> tuple[Tensor, Tensor]:
    """The same, chunk by chunk: c chunks of Q tokens."""
    batch, length, _ = a.shape
    pad = -length % chunk

    def cut(z: Tensor, value: float) -> Tensor:                                         # (B, T, I) → (B·c, Q, I)
        return F.pad(z, (0, 0, 0, pad), value=value).reshape(-1, chunk, z.shape[-1])

    a, b = cut(a, 1.0), cut(b, 0.0)                                                     # padded so that h stays
    own, _ = linear_scan(a, b, torch.zeros_like(a[:, 0]))                               # from each chunk's own tokens
    decays = [a[:, 0]]                                                                  # of h, up to each token
    for t in range(1, chunk):
        decays.append(decays[-1] * a[:, t])
    own, decay = (z.unflatten(0, (batch, -1)) for z in (own, torch.stack(decays, 1)))   # (B, c, Q, I)
    before = []
    for c in range(own.shape[1]):
        before.append(h)
        h = decay[:, c, -1] * h + own[:, c, -1]
    return (own + decay * torch.stack(before, 1)[:, :, None]).flatten(1, 2)[:, :length], h


def slow_decay(value: Tensor, stream: torch.Generator, depth: int) -> Tensor:
    """Λ with a⁸ ~ U(0.9, 0.999) for a = exp(−softplus(Λ)): De et al. 2024, §2.4."""
    return torch.log(torch.expm1(-value.uniform_(0.9, 0.999, generator=stream).log() / 8))


class Gate(nn.Module):
    """σ of a block-diagonal linear map: head by head x W + b, W stored (H, in, out)."""
    INIT = {"weight": matrix, "bias": zero}

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, width // heads, width // heads))
        self.bias = nn.Parameter(torch.empty(heads, width // heads))

    def forward(self, x: Tensor) -> Tensor:                                             # (B, T, I) → (B, T, I) float32
        x = x.unflatten(-1, self.bias.shape)                                            # (B, T, H, I/H)
        return torch.sigmoid((torch.einsum("bthi,hio->btho", x, self.weight) + self.bias).float()).flatten(-2)


class RGLRU(nn.Module):
    """The block drawn at the head of the file."""
    INIT = {"Lambda": slow_decay, "out_proj.weight": residual}
    WORDS = {"activation": "{} on the branch that multiplies"}

    def __init__(self, config: RGLRUConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        self.x_proj = Linear(dim, config.width, bias=True)
        self.y_proj = Linear(dim, config.width, bias=True)
        self.conv1d = Conv1d(config.width, config.conv, bias=True)
        self.input_gate = Gate(config.heads, config.width)
        self.recurrence_gate = Gate(config.heads, config.width)
        self.Lambda = nn.Parameter(torch.empty(config.width))
        self.out_proj = Linear(config.width, dim, bias=True)

    def forward(self, x: Tensor, ctx: ForwardContext, state: ScanState | None = None) -> Tensor:
        """x (B, T, D) → (B, T, D)."""
        if state is None:
            state = self.new_state(self.config, x.shape[0], 0, x.dtype, x.device)
        y, (x, before) = self.y_proj(x), aligned(self.x_proj(x).transpose(1, 2), state.conv, ctx.real)
        positions = None if ctx.regular else ctx.positions
        u = convolve(x, self.conv1d.weight, self.conv1d.bias, before, positions).transpose(1, 2)
        state.conv = window(x, before, ctx.real)
        h, state.state = self.recurrence(u, ctx, state.state)
        return self.out_proj(gated(y, h.to(y.dtype), self.config.activation))

    def recurrence(self, u: Tensor, ctx: ForwardContext, h: Tensor) -> tuple[Tensor, Tensor]:
        """The unit itself: u (B, T, I), h (B, I) → all states (B, T, I) float32, and the last."""
        log_a = -8 * F.softplus(self.Lambda.float()) * self.recurrence_gate(u)
        first = (ctx.positions == 0)[..., None]
        a = torch.exp(log_a).masked_fill(first, 0)
        b = torch.sqrt(-torch.expm1(2 * log_a)).masked_fill(first, 1) * self.input_gate(u) * u.float()
        if ctx.real is not None:                                                      # padding leaves h as it is
            a, b = a.masked_fill(~ctx.real[..., None], 1), b * ctx.real[..., None]
        return (linear_scan_chunked if u.shape[1] >= CHUNKED_FROM else linear_scan)(a, b, h)

    @staticmethod
    def new_state(config: RGLRUConfig, batch: int, length: int, dtype: torch.dtype, device: torch.device) -> ScanState:
        return ScanState(batch, config.width, config.conv, (config.width,), dtype, device)

    @staticmethod
    def multiply_adds(config: RGLRUConfig, dim: int, context: int) -> int:
        I, H = config.width, config.heads
        return 3 * dim * I + I * (config.conv + 2 * (I // H) + 2)  # the gates; a·h + √(1 − a²)·(i·u)
