"""Two mixers whose output is multiplied by a gate, as data: a state that is corrected, and attention. And attention
whose values have a width of their own.

Each class names the file of nanollm/layers that explains it.
"""

from dataclasses import dataclass
from typing import Literal

from nanollm.config.checks import Mixer, need, need_positive, need_sizes
from nanollm.config.parts import Attention, Rope


@dataclass(frozen=True)
class GatedDeltaNet(Mixer):
    """A recurrence that writes into its state what the state did not yet say, gated_delta_net.py."""
    heads: int                              # H, heads of values, of the gates and of the state; 32
    key_heads: int                          # G, heads of queries and keys, a divisor of heads; 16
    head_dim: int                           # P, width of a value; 128
    key_dim: int                            # N, width of a query or key; 128
    conv: int                               # width of the causal convolution on q, k and v; 4
    eps: float = 1e-6                       # of the norm of each head before the gate
    reflects: bool = False                  # β goes up to 2, not 1: past 1 a value changes its sign; OLMo-hybrid True

    def __post_init__(self) -> None:
        need_sizes(self, "heads", "key_heads", "head_dim", "key_dim", "conv")
        need(self.heads % self.key_heads == 0, self, "key_heads", f"a divisor of heads ({self.heads})")
        need_positive(self, "eps")


@dataclass(frozen=True)
class GatedAttention(Mixer):
    """Attention whose output is multiplied by a gate that reads the token, gated_attention.py."""
    attention: Attention                    # what is gated
    per: Literal["channel", "head"] = "channel"             # a gate for each channel, or one for a head; Laguna "head"
    activation: Literal["sigmoid", "softplus"] = "sigmoid"  # what the gate is of its reading; Laguna "softplus"

    def __post_init__(self) -> None:
        inner = self.attention
        plain = inner.alibi is None and not inner.sinks and inner.softcap is None
        need(plain, self, "attention", "no alibi, sinks or softcap")
        need(self.per in ("channel", "head"), self, "per", "'channel' or 'head'")
        need(self.activation in ("sigmoid", "softplus"), self, "activation", "'sigmoid' or 'softplus'")

    @property
    def rope(self) -> Rope | None:
        """As Attention.rope: what decides whether a cache must begin again as a sequence grows."""
        return self.attention.rope


@dataclass(frozen=True)
class NarrowValueAttention(Mixer):
    """Attention whose values are not as wide as its queries and keys, narrow_values.py."""
    attention: Attention                    # all but the values; its head_dim is of queries and keys
    value: int                              # width of a head's value; MiMo-V2-Flash 128 beside 192
    value_scale: float = 1.0                # times the values; 0.707

    def __post_init__(self) -> None:
        need_sizes(self, "value")
        need_positive(self, "value_scale")
        inner = self.attention
        plain = inner.qk_norm is None and inner.clip is None and inner.alibi is None
        need(plain, self, "attention", "no qk_norm, clip or alibi")

    @property
    def rope(self) -> Rope | None:
        """As Attention.rope: what decides whether a cache must begin again as a sequence grows."""
        return self.attention.rope
