"""Attention whose values are normalised, and what stands at the end of a layer, as data.

Each class names the file of nanollm/layers that explains it.
"""

from dataclasses import dataclass

from nanollm.config.checks import Part, need
from nanollm.config.parts import Attention, Norm


@dataclass(frozen=True)
class NormedValueAttention(Attention):
    """Attention whose values are normalised, and may be what the keys are made of, normed_values.py."""
    value_norm: Norm = Norm(gain=False)     # of every head of v
    values_are_keys: bool = False           # v is k before its norm and rotation, and has no matrix; Gemma 4 31B's
                                            # layers without a window

    def __post_init__(self) -> None:
        super().__post_init__()
        plain = self.clip is None and not self.sinks and self.alibi is None and self.growth is None
        need(plain, self, "clip", "None, as alibi, growth and sinks")
        need(self.qk_norm is None or self.qk_norm.scope == "head", self, "qk_norm", "a norm whose scope is 'head'")
        need(self.value_norm.scope == "head", self, "value_norm", "a norm whose scope is 'head'")


@dataclass(frozen=True)
class LayerEnd(Part):
    """What is done with the stream at the end of a layer: it is multiplied by a learned number, layer_end.py."""
