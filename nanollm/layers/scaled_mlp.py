"""A feed-forward whose gate and whose output are multiplied by a number each. Falcon-H1.

    y = m_out · down( act(m_gate · gate x) ⊙ up x )          Zuo et al. 2025 (arXiv 2507.22448), §3.2

Shapes: B batch, T tokens, D model width.
"""

from torch import Tensor

from nanollm.config import ScaledMLP as ScaledMLPConfig
from nanollm.layers.mlp import MLP, gated


class ScaledMLP(MLP):
    """The equation at the head of the file."""
    WORDS = {"gate": "the gate times {} before its activation", "out": "the output times {}"}

    def __init__(self, config: ScaledMLPConfig, dim: int) -> None:
        super().__init__(config.mlp, dim)
        self.scales = config.gate, config.out

    def forward(self, x: Tensor) -> Tensor:                     # (B, T, D) → (B, T, D)
        assert self.gate is not None
        gate, out = self.scales
        return self.down(gated(self.gate(x) * gate, self.up(x), self.config.activation)) * out

    @staticmethod
    def multiply_adds(config: ScaledMLPConfig, dim: int) -> int:  # type: ignore[override]  # of its own config
        return MLP.multiply_adds(config.mlp, dim)
