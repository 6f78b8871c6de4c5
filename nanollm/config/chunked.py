"""The parts of Llama 4, as data: each has the fields of another part, and does something else with them.

Each class names the file of nanollm/layers that explains it.
"""

from dataclasses import dataclass

from nanollm.config.checks import need
from nanollm.config.mixers import LatentExpert, MoE
from nanollm.config.parts import Attention


@dataclass(frozen=True)
class ChunkedAttention(Attention):
    """Attention in chunks of `window` tokens, chunked_attention.py: a query sees those of its own chunk."""

    def __post_init__(self) -> None:
        super().__post_init__()
        need(self.window is not None, self, "window", "the length of a chunk")
        plain = self.alibi is None and not self.sinks and self.softcap is None
        need(plain, self, "alibi", "None, as sinks and softcap")


@dataclass(frozen=True)
class InputWeightedMoE(MoE):
    """Experts that read x times their weight, in place of what they say times it, input_weighted_moe.py."""

    def __post_init__(self) -> None:
        super().__post_init__()
        need(not isinstance(self.expert, LatentExpert), self, "expert", "an expert that reads all of x")
