"""What a decoder is, as data: a tuple of layers, each saying which mixer, which feed-forward and which norms it has.

    ModelConfig ── vocab, dim, final_norm, …
        └── layers: (Layer, Layer, …)
                      ├── mixer: Attention(rope=Rope(scaling=…), qk_norm=Norm) | Mamba
                      ├── ffn:   MLP | MoE | None
                      └── pre_mixer, post_mixer, pre_ffn, post_ffn: Norm | None

Families differ in *which object stands at index i*: a window on every other layer, experts on the last ten, a scan
in between. Nothing below knows a family's name. To read a `config.json`, see `checkpoints/families/`.

Every dataclass is frozen, so equal layers can share one object and a config can be a dictionary key.
`ModelConfig.to_dict` / `from_dict` are exact inverses and plain JSON.
"""

import dataclasses
import itertools
import math
from dataclasses import dataclass
from typing import Any, Literal

from nanollm.errors import ConfigError


def _need(condition: bool, owner: Any, field: str, expected: str) -> None:
    """One sentence for every impossible value: Attention.kv_heads = 3: expected a divisor of heads (8)."""
    if not condition:
        raise ConfigError(f"{type(owner).__name__}.{field} = {getattr(owner, field)!r}: expected {expected}")


def _need_sizes(owner: Any, *fields: str) -> None:
    for field in fields:
        value = getattr(owner, field)
        _need(isinstance(value, int) and not isinstance(value, bool) and value > 0, owner, field, "a positive whole number")


def _need_positive(owner: Any, *fields: str) -> None:
    for field in fields:
        value = getattr(owner, field)
        _need(isinstance(value, (int, float)) and math.isfinite(value) and value > 0, owner, field, "a finite number above 0")


@dataclass(frozen=True)
class Norm:
    """The equations, and what the cast order means, are in norm.py."""
    kind: Literal["rms", "layer"] = "rms"   # without or with the mean taken out; GPT-NeoX "layer"
    eps: float = 1e-6                       # added to the mean square before the root; Llama-2 1e-5
    offset: float = 0.0                     # the gain is stored as an offset from this; Gemma 1.0
    cast_after_gain: bool = False           # round to the working dtype after the gain (Gemma) or before it (Llama)
    bias: bool = False                      # a learned shift, LayerNorm only; GPT-NeoX True

    def __post_init__(self) -> None:
        _need(self.kind in ("rms", "layer"), self, "kind", "'rms' or 'layer'")
        _need_positive(self, "eps")
        if self.kind == "rms":
            _need(not self.bias, self, "bias", "False, an RMSNorm has none")
        else:
            _need(self.offset == 0 and not self.cast_after_gain, self, "offset", "0 and cast_after_gain False for a LayerNorm")


# ---- position: how the angles of RoPE are stretched to reach longer contexts. One class a formula, see rope.py.

@dataclass(frozen=True)
class Linear:
    """Position interpolation: every angle divided by one factor."""
    factor: float                           # context grows by this much; DeepSeek-Coder 4.0

    def __post_init__(self) -> None:
        _need_positive(self, "factor")


@dataclass(frozen=True)
class DynamicNTK:
    """The base grows with the length of the sequence, once that is longer than the original context."""
    factor: float                           # how fast the base grows; InternLM2 2.0
    original: int                           # context the model was trained on; 32768

    def __post_init__(self) -> None:
        _need_positive(self, "factor")
        _need_sizes(self, "original")


@dataclass(frozen=True)
class Llama3:
    """Slow angles divided by the factor, fast ones kept, a linear blend between."""
    factor: float                           # slow angles are divided by it; 8.0 (Llama-3.1), 32.0 (3.2)
    original: int                           # context before the stretch; 8192
    low: float = 1.0                        # fewer turns than this over `original`: slow
    high: float = 4.0                       # more turns than this: fast

    def __post_init__(self) -> None:
        _need_positive(self, "factor", "low", "high")
        _need_sizes(self, "original")
        _need(self.high > self.low, self, "high", f"more than low ({self.low})")


@dataclass(frozen=True)
class Yarn:
    """As Llama3, with a ramp over the index of the angle, and a temperature on the logits."""
    factor: float                           # how much the context grows; 4.0 (Qwen2.5 at 128k)
    original: int                           # context before the stretch; 32768
    fast: float = 32.0                      # turns over `original` above which an angle is kept (β in the paper)
    slow: float = 1.0                       # turns below which it is divided by the factor (α)
    truncate: bool = True                   # round the ends of the ramp outwards to whole indices
    attention_factor: float | None = None   # multiplies cos and sin; None is 0.1 ln(factor) + 1

    def __post_init__(self) -> None:
        _need_positive(self, "factor", "fast", "slow")
        _need_sizes(self, "original")


@dataclass(frozen=True)
class LongRope:
    """A searched divisor for each angle: one list up to the original context, another beyond it."""
    short: tuple[float, ...]                # rotated width / 2 numbers, used while the sequence fits `original`
    long: tuple[float, ...]                 # as many, used for the whole sequence once it is longer
    original: int                           # 4096 (Phi-3)
    attention_factor: float = 1.0           # multiplies cos and sin; √(1 + ln(factor) / ln(original))

    def __post_init__(self) -> None:
        _need_sizes(self, "original")
        _need(len(self.short) == len(self.long), self, "long", f"as many numbers as short ({len(self.short)})")
        _need(all(x > 0 for x in self.short + self.long), self, "long", "numbers above 0, and so in short")


Scaling = Linear | DynamicNTK | Llama3 | Yarn | LongRope


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding, rope.py."""
    theta: float = 10_000.0                 # base of the angles; Llama-3 500000.0
    layout: Literal["half", "interleaved"] = "half"   # which two channels turn together: (j, j + d/2) or (2j, 2j + 1)
    fraction: float = 1.0                   # leading part of each head that turns, the rest passes; GPT-NeoX 0.25
    scaling: Scaling | None = None          # None: as trained; Llama-3.1 Llama3(8.0, 8192)

    def __post_init__(self) -> None:
        _need_positive(self, "theta", "fraction")
        _need(self.layout in ("half", "interleaved"), self, "layout", "'half' or 'interleaved'")
        _need(self.fraction <= 1, self, "fraction", "at most 1")


# ---- mixers: what moves information between tokens

@dataclass(frozen=True)
class Attention:
    """Multi-head, grouped-query (kv_heads < heads) and multi-query (kv_heads = 1) attention, attention.py."""
    heads: int                              # H, query heads; 32
    kv_heads: int                           # K, key/value heads, a divisor of heads; 8
    head_dim: int                           # d, width of a head; need not be dim / heads; 128
    rope: Rope | None = None                # None: no rotation
    window: int | None = None               # keys a query sees, itself included; Mistral-v0.1 4096
    qk_norm: Norm | None = None             # on every query and key head, before the rotation; Qwen3
    qkv_bias: bool = False                  # Qwen2 True
    out_bias: bool = False                  # Llama with attention_bias True
    scale: float | None = None              # of the scores; None is 1/√d
    softcap: float | None = None            # scores become c·tanh(score / c); Gemma-2 50.0
    alibi: bool = False                     # a penalty linear in distance instead of rotation; BLOOM True

    def __post_init__(self) -> None:
        _need_sizes(self, "heads", "kv_heads", "head_dim")
        _need(self.heads % self.kv_heads == 0, self, "kv_heads", f"a divisor of heads ({self.heads})")
        if self.window is not None:
            _need_sizes(self, "window")
        for field in ("scale", "softcap"):
            if getattr(self, field) is not None:
                _need_positive(self, field)
        if self.rope is not None:
            turned = self.head_dim * self.rope.fraction
            _need(int(turned) >= 2 and int(turned) % 2 == 0, self, "rope", f"an even number of rotated channels, not {turned:g} of {self.head_dim}")
            lists = self.rope.scaling if isinstance(self.rope.scaling, LongRope) else None
            _need(lists is None or len(lists.short) == int(turned) // 2, self, "rope", f"LongRope lists of {int(turned) // 2} numbers")


@dataclass(frozen=True)
class Mamba:
    """Selective state space, first generation, mamba.py."""
    inner: int                              # I, channels of the scan; 2 × dim
    state: int                              # N, numbers kept per channel; 16
    conv: int                               # width of the causal convolution before the scan; 4
    dt_rank: int                            # R, rank of the step-size projection; dim / 16
    conv_bias: bool = True                  # on that convolution
    bias: bool = False                      # on the projections in and out

    def __post_init__(self) -> None:
        _need_sizes(self, "inner", "state", "conv", "dt_rank")


# ---- feed-forward: what each token does alone

Activation = Literal["silu", "gelu", "gelu_tanh", "relu2"]
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu2")


@dataclass(frozen=True)
class MLP:
    """SwiGLU, GeGLU and the plain two-matrix form, mlp.py."""
    hidden: int                             # F, its width; 14336
    activation: Activation = "silu"         # Gemma "gelu_tanh", Falcon "gelu"
    gated: bool = True                      # down(act(gate x) · up x), else down(act(up x))
    bias: bool = False                      # on all its matrices; Phi-2 True

    def __post_init__(self) -> None:
        _need_sizes(self, "hidden")
        _need(self.activation in ACTIVATIONS, self, "activation", f"one of {', '.join(ACTIVATIONS)}")


@dataclass(frozen=True)
class MoE:
    """A router that sends each token to a few of many gated MLPs, moe.py."""
    experts: int                            # E; 8
    top_k: int                              # experts a token visits; 2
    expert: MLP                             # what one expert is; MLP(14336)
    renormalize: bool                       # divide the chosen weights by their sum; Mixtral True, Qwen1.5-MoE False
    shared: MLP | None = None               # an expert that every token visits; Qwen1.5-MoE
    shared_gate: bool = False               # its output times sigmoid(w · x)

    def __post_init__(self) -> None:
        _need_sizes(self, "experts", "top_k")
        _need(self.top_k <= self.experts, self, "top_k", f"at most experts ({self.experts})")
        _need(self.expert.gated and not self.expert.bias, self, "expert", "a gated MLP without bias")
        _need(self.shared is not None or not self.shared_gate, self, "shared_gate", "False where nothing is shared")


# ---- the whole

@dataclass(frozen=True)
class Layer:
    """One residual block; block.py draws how the parts are wired. An absent norm is None, and absent in the module."""
    mixer: Attention | Mamba                # what moves information between tokens
    ffn: MLP | MoE | None                   # None: the mixer is the whole layer (Mamba)
    pre_mixer: Norm | None = Norm()         # before the mixer; OLMo-2 None
    post_mixer: Norm | None = None          # on what the mixer adds, before it is added; Gemma-2
    pre_ffn: Norm | None = Norm()           # before the feed-forward; None where it reads what the mixer reads (Phi)
    post_ffn: Norm | None = None            # as post_mixer
    parallel: bool = False                  # the feed-forward reads the same input as the mixer; GPT-NeoX

    def __post_init__(self) -> None:
        alone = self.pre_ffn is None and self.post_ffn is None and not self.parallel
        _need(self.ffn is not None or alone, self, "ffn", "a feed-forward, or pre_ffn None, post_ffn None and parallel False")


@dataclass(frozen=True)
class ModelConfig:
    """A decoder: what stands before, in and after its layers. model.py."""
    vocab: int                              # V, rows of the embedding; 128256
    dim: int                                # D, width of the residual stream; 4096
    layers: tuple[Layer, ...]               # from the embedding to the head; (Layer(…),) * 32
    final_norm: Norm = Norm()               # before the head
    tied: bool = False                      # the head is the embedding
    float32_residual: bool = False          # what the layers add up is kept in float32, whatever the weights are; Mamba True
    context: int | None = None              # positions it was trained for; a caller may warn past it, nothing depends on it

    def __post_init__(self) -> None:
        _need_sizes(self, "vocab", "dim")
        _need(len(self.layers) > 0, self, "layers", "at least one")
        if self.context is not None:
            _need_sizes(self, "context")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: each dataclass with its class name under "is", the layers as runs [count, layer]."""
        runs = [[len(list(same)), _encode(layer)] for layer, same in itertools.groupby(self.layers)]
        return {**_encode(dataclasses.replace(self, layers=self.layers[:1])), "layers": runs}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> "ModelConfig":
        """The inverse of `to_dict`. Raises ConfigError on anything that `to_dict` does not write."""
        try:
            layers = tuple(layer for count, entry in data["layers"] for layer in [_decode(entry)] * count)
            return _decode({**data, "layers": layers})
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"not a ModelConfig as to_dict writes it: {error}") from None


def _encode(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {"is": type(value).__name__} | {f.name: _encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return [_encode(item) for item in value] if isinstance(value, tuple) else value


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        return CLASSES[value["is"]](**{name: _decode(item) for name, item in value.items() if name != "is"})
    return tuple(_decode(item) for item in value) if isinstance(value, list) else value


CLASSES = {c.__name__: c for c in (Norm, Linear, DynamicNTK, Llama3, Yarn, LongRope, Rope, Attention, Mamba, MLP, MoE, Layer, ModelConfig)}
