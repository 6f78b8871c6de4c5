"""The parts of a Llama-shaped layer, as data: norm, position, attention, feed-forward. The layer: config/__init__.py.

Each class names the file of nanollm/layers that explains it. The rarer mixers and the mixture of experts are in
config/mixers.py and config/scans.py, the formulas of long contexts in config/scaling.py.
"""

from dataclasses import dataclass
from typing import Literal

from nanollm.config.checks import FeedForward, Mixer, Part, need, need_positive, need_sizes, present
from nanollm.config.scaling import Growth, LongRope, Scaling


@dataclass(frozen=True)
class Norm(Part):
    """The equations, and what the cast order means, are in norm.py."""
    kind: Literal["rms", "layer", "rms_outer"] = "rms"  # mean left in; taken out (GPT-NeoX); ε outside the root
                                            # (StripedHyena)
    eps: float = 1e-6                       # added to the mean square before the root; Llama-2 1e-5
    offset: float = 0.0                     # the gain is stored as an offset from this; Gemma, Nemotron 1.0
    cast_after_gain: bool = False           # round to the working dtype after the gain (Gemma) or before it (Llama)
    bias: bool = False                      # a learned shift, LayerNorm only; GPT-NeoX True
    gain: bool = True                       # a learned stretch; OLMo-1 False
    scope: Literal["head", "each", "all", "rotated"] = "head"   # of norms on q and k: every head with one gain (Qwen3),
                                            # each with its own (Command-R+), all heads as one vector (OLMo-2), or every
                                            # head once it is rotated (Hunyuan)

    def __post_init__(self) -> None:
        need(self.kind in ("rms", "layer", "rms_outer"), self, "kind", "'rms', 'layer' or 'rms_outer'")
        need_positive(self, "eps")
        need(self.kind == "layer" or not self.bias, self, "bias", "False, an RMSNorm has none")
        plain = self.offset == 0 and not self.cast_after_gain
        need(self.kind != "rms_outer" or self.offset == 0, self, "offset", "0 for kind 'rms_outer'")
        need(self.kind == "rms" or not self.cast_after_gain, self, "cast_after_gain", f"False for kind {self.kind!r}")
        whole = self.gain or (plain and not self.bias)
        need(whole, self, "gain", "True where there is an offset, a cast after it, or a bias")
        need(self.scope in ("head", "each", "all", "rotated"), self, "scope", "'head', 'each', 'all' or 'rotated'")
        need(self.scope != "each" or (self.kind == "layer" and self.gain and plain and not self.bias), self, "scope",
             "'each' only for a LayerNorm with a plain gain and no bias")


@dataclass(frozen=True)
class Rope(Part):
    """Rotary position embedding, rope.py."""
    theta: float = 10_000.0                 # base of the angles; Llama-3 500000.0
    layout: Literal["half", "interleaved"] = "half"   # which two channels turn together: (j, j + d/2) or (2j, 2j + 1)
    fraction: float = 1.0                   # leading part of each head that turns, the rest passes; GPT-NeoX 0.25
    scaling: Scaling | None = None          # None: as trained; Llama-3.1 Llama3(8.0, 8192)
    rounds: Literal["each", "tables", "result"] = "each"    # what is rounded to the working dtype: cos, sin and every
                                            # product (Llama); cos, sin and the result (Command-R); the result alone
                                            # (OLMo, DeepSeek-V2)

    def __post_init__(self) -> None:
        need_positive(self, "theta", "fraction")
        need(self.layout in ("half", "interleaved"), self, "layout", "'half' or 'interleaved'")
        need(self.fraction <= 1, self, "fraction", "at most 1")
        need(self.rounds in ("each", "tables", "result"), self, "rounds", "'each', 'tables' or 'result'")


@dataclass(frozen=True)
class Alibi(Part):
    """A penalty linear in distance in place of rotation, alibi.py."""
    coarse: bool = False                    # slopes, key positions and products in bfloat16, then times scale; Falcon


@dataclass(frozen=True)
class Attention(Mixer):
    """Multi-head, grouped-query (kv_heads < heads) and multi-query (kv_heads = 1) attention, attention.py."""
    heads: int                              # H, query heads; 32
    kv_heads: int                           # K, key/value heads, a divisor of heads; 8
    head_dim: int                           # d, width of a head; need not be dim / heads; 128
    rope: Rope | None = None                # None: no rotation
    window: int | None = None               # keys a query sees, itself included; Mistral-v0.1 4096
    qk_norm: Norm | None = None             # on queries and keys, before the rotation; Qwen3
    qkv_bias: bool = False                  # Qwen2 True
    out_bias: bool = False                  # Llama with attention_bias True
    scale: float | None = None              # of the scores; None is 1/√d
    softcap: float | None = None            # scores become c·tanh(score / c); Gemma-2 50.0
    alibi: Alibi | None = None              # BLOOM
    clip: float | None = None               # q, k and v are cut off at ± this; OLMo-1 8.0
    sinks: bool = False                     # a learned score a head in the softmax, whose value is 0; gpt-oss
    growth: Growth | None = None            # far queries grow by a logarithm; Qwen-7B LogLength(2048)

    def __post_init__(self) -> None:
        need_sizes(self, "heads", "kv_heads", "head_dim", *present(self, "window"))
        need(self.heads % self.kv_heads == 0, self, "kv_heads", f"a divisor of heads ({self.heads})")
        need_positive(self, *present(self, "scale", "softcap", "clip"))
        need(not self.sinks or self.softcap is None, self, "sinks", "False where scores have a soft cap")
        if self.rope is not None:
            need_rotation(self, self.rope, self.head_dim)


def need_rotation(owner: Mixer, rope: Rope, width: int) -> None:
    """owner.rope must turn an even number of `width` channels, and long lists of divisors must have one a pair."""
    turned = width * rope.fraction
    even = int(turned) >= 2 and int(turned) % 2 == 0
    need(even, owner, "rope", f"an even number of rotated channels, not {turned:g} of {width}")
    lists = rope.scaling if isinstance(rope.scaling, LongRope) else None
    pairs = int(turned) // 2
    need(lists is None or len(lists.short) == pairs, owner, "rope", f"LongRope lists of {pairs} numbers")


Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")


@dataclass(frozen=True)
class MLP(FeedForward):
    """SwiGLU, GeGLU and the plain two-matrix form, mlp.py."""
    hidden: int                             # F, its width; 14336
    activation: Activation = "silu"         # Gemma "gelu_tanh", Falcon "gelu"
    gated: bool = True                      # down(act(gate x) · up x), else down(act(up x))
    bias: bool = False                      # on all its matrices; Phi-2 True

    def __post_init__(self) -> None:
        need_sizes(self, "hidden")
        need(self.activation in ACTIVATIONS, self, "activation", f"one of {', '.join(ACTIVATIONS)}")
