"""Attention and Mamba-2 side by side in one layer. Falcon-H1.

    x ──┬── ⊙ a_in ── attention ── ⊙ a_out ──┐
        │                                    + ──        Zuo et al. 2025 (arXiv 2507.22448), §2.1
        └── ⊙ s_in ── Mamba-2 ──── ⊙ s_out ──┘

Keys are multiplied by a number of their own, m; as q·(m k) = m (q·k), the scale of the scores is. The multipliers come
from µP: they are tuned on a small model and stay as it grows (§3.2).

Shapes: B batch, T tokens, D model width.
"""

import torch
from torch import Tensor, nn

from nanollm.config import ParallelMixer as ParallelMixerConfig
from nanollm.layers.attention import Attention
from nanollm.layers.forward_context import ForwardContext
from nanollm.layers.mamba2 import Mamba2
from nanollm.layers.state import ParallelState


class ParallelMixer(nn.Module):
    """The mixer drawn at the head of the file."""
    WORDS = {
        "attention_in": "what attention reads times {}",
        "attention_out": "what attention says times {}",
        "scan_in": "what the scan reads times {}",
        "scan_out": "what the scan says times {}",
        "keys": "keys times {}",
    }

    def __init__(self, config: ParallelMixerConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        self.attention = Attention(config.attention, dim)
        self.attention.scale *= config.keys
        self.scan = Mamba2(config.scan, dim)

    def forward(self, x: Tensor, ctx: ForwardContext, state: ParallelState | None = None) -> Tensor:
        """x (B, T, D) → (B, T, D)."""
        c = self.config
        attended = self.attention(x * c.attention_in, ctx, state) * c.attention_out
        return self.scan(x * c.scan_in, ctx, state) * c.scan_out + attended

    @staticmethod
    def new_state(config: ParallelMixerConfig, batch: int, length: int, dtype: torch.dtype,
                  device: torch.device) -> ParallelState:
        shape = batch, length, dtype, device
        return ParallelState(Attention.new_state(config.attention, *shape), Mamba2.new_state(config.scan, *shape))

    @staticmethod
    def multiply_adds(config: ParallelMixerConfig, dim: int, context: int) -> int:
        parts = Attention.multiply_adds(config.attention, dim, context), Mamba2.multiply_adds(config.scan, dim, context)
        return sum(parts)
