"""Attention and a scan side by side in one layer, and a feed-forward whose products have multipliers, as data."""

from dataclasses import dataclass

from nanollm.config.checks import FeedForward, Mixer, need, need_positive
from nanollm.config.parts import MLP, Attention, Rope
from nanollm.config.scans import Mamba2


@dataclass(frozen=True)
class ParallelMixer(Mixer):
    """Attention and a scan side by side: they read the same and are added, parallel_mixer.py."""
    attention: Attention                    # one of the two
    scan: Mamba2                            # the other
    attention_in: float = 1.0               # times what attention reads; Falcon-H1 1.0
    attention_out: float = 1.0              # times what it says; 0.9375
    scan_in: float = 1.0                    # the same of the scan; 1.25
    scan_out: float = 1.0                   # 0.23570226
    keys: float = 1.0                       # times the keys, and so the scores; 0.39062500

    def __post_init__(self) -> None:
        need_positive(self, "attention_in", "attention_out", "scan_in", "scan_out", "keys")
        plain = self.attention.window is None and self.attention.alibi is None
        need(plain, self, "attention", "no window and no ALiBi")

    @property
    def rope(self) -> Rope | None:
        """As FilteredAttention.rope."""
        return self.attention.rope


@dataclass(frozen=True)
class ScaledMLP(FeedForward):
    """An MLP whose gate and whose output are multiplied, scaled_mlp.py."""
    mlp: MLP                                # with a gate
    gate: float = 1.0                       # times the gate, before its activation; Falcon-H1 0.8838834764831844
    out: float = 1.0                        # times the output; 0.5859375

    def __post_init__(self) -> None:
        need_positive(self, "gate", "out")
        need(self.mlp.gated, self, "mlp", "an MLP with a gate")
