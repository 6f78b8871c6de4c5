"""OLMo-hybrid: three layers of Gated DeltaNet, then one of OLMo-2's, attention without positions. 7B.

    linear_attention    x += delta(norm(x));      x += mlp(norm(x))       β up to 2, not 1
    full_attention      x += norm(attention(x));  x += norm(mlp(x))       RMS over all heads of q or k at once

RMS norms that round once, after the gain; inside Gated DeltaNet before it, with an ε of 1e-5 that no key says. In the
published model no layer rotates: its rope_theta is null. Where it is a number, attention rotates in float32. Which
layer is what `layer_types` says; where it is missing every fourth is full, and if none would be, the last.

Of the names one has two meanings: post_attention_layernorm is the norm behind attention in one kind of layers, and the
one before the mlp in the other. q, k and v, and their convolutions, are three tensors each, and one here.

transformers 5.23 writes the convolutions of q, k and v in three equal parts, whatever their widths, and another name
for that norm. What it writes is read by transformers alone; here, as published, each has its own width.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from checkpoints.families.llama import ATTENTION_BIAS, EPS, LLAMA_NAMES, LLAMA_SHAPE
from checkpoints.families.qwen import QK_NORM
from checkpoints.families.qwen3_next import LINEAR
from checkpoints.names.config_rows import FULL, Heads, Kinds, RopeKeys
from checkpoints.names.config_table import Draft, Row, field, flag, number, only, part, size
from checkpoints.names.ops import Pieces, Shape
from checkpoints.names.reader import Reader
from checkpoints.names.table import either, override, rule, under
from nanollm.config import Attention, GatedDeltaNet, Layer, Norm, Rope

DELTA, STORED = "layers.{i}.mixer", "model.layers.{i}.linear_attn"


class Apart:
    """Three stored tensors have the rows of one parameter: those of q, of k and of v."""

    @staticmethod
    def widths(layer: Layer | None) -> list[int]:
        """How many rows each has."""
        assert layer is not None and isinstance(layer.mixer, GatedDeltaNet)
        keys = layer.mixer.key_heads * layer.mixer.key_dim
        return [keys, keys, layer.mixer.heads * layer.mixer.head_dim]

    @classmethod
    def shapes(cls, ours: Sequence[Tensor], layer: Layer | None) -> list[Shape]:
        return [(rows, *ours[0].shape[1:]) for rows in cls.widths(layer)]

    @classmethod
    def pieces(cls, ours: Sequence[Tensor], layer: Layer | None) -> Pieces:
        yield from enumerate(ours[0].split(cls.widths(layer)))


OLMO_HYBRID_NAMES = override(
    LLAMA_NAMES, *QK_NORM,
    *either("model.layers.{i}.post_attention_layernorm", "layers.{i}.pre_ffn", "layers.{i}.post_mixer"),
    rule("model.layers.{i}.post_feedforward_layernorm", "layers.{i}.post_ffn"),
    *under(STORED, DELTA, {
        "g_proj": "z", "b_proj": "beta", "a_proj": "alpha", "o_proj": "out_proj", "o_norm": "norm",
        "A_log": "A_log", "dt_bias": "dt_bias",
    }),
    rule([f"{STORED}.{one}_proj" for one in "qkv"], f"{DELTA}.qkv", Apart),
    rule([f"{STORED}.{one}_conv1d" for one in "qkv"], f"{DELTA}.conv1d", Apart),
)
NORM = part(Norm, cast_after_gain=True)
MIXERS = {
    LINEAR: part(GatedDeltaNet, eps=1e-5),
    FULL: part(Attention, rope=part(Rope, rounds="result"), qk_norm=part(Norm, cast_after_gain=True, scope="all")),
}
AROUND: dict[str, dict[str, Any]] = {  # the norms of each kind of layer
    LINEAR: {"pre_mixer": NORM, "pre_ffn": NORM, "post_mixer": None, "post_ffn": None},
    FULL: {"pre_mixer": None, "pre_ffn": None, "post_mixer": NORM, "post_ffn": NORM},
}


def read_types(r: Reader, layers: int) -> list[str]:
    """The kind of each layer."""
    usual = [LINEAR if (i + 1) % 4 else FULL for i in range(layers)]
    types = r.get("layer_types", None) or (usual if FULL in usual else [*usual[:-1], FULL])
    if not isinstance(types, list) or len(types) != layers or not all(one in (LINEAR, FULL) for one in types):
        raise r.error("layer_types", f"{layers} times {LINEAR} or {FULL}")
    if len(set(types)) < 2:
        raise r.error("layer_types", "some of either kind")
    return types


class KindsWithNorms(Kinds):
    """Which mixer a layer has, and where its norms are."""

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        super().read(r, draft, key)
        for layer in draft.layers:
            kind = LINEAR if layer.get("mixer").kind is GatedDeltaNet else FULL
            for place, norm in AROUND[kind].items():
                layer.set(place, norm)


class MaybeRope(RopeKeys):
    """RoPE, or none where rope_theta is null."""

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        """RoPE's keys; where the base is null, no layer rotates."""
        inner = r.inside(key) or r.of({}, f"{r.prefix}{key}.")
        if inner.get("rope_theta", r.values.get("rope_theta", self.theta)) is not None:
            super().read(r, draft, key)
            return
        inner.must("rope_type", "default")
        inner.close()
        r.must("rope_theta", None)
        r.must("rope_scaling", None)
        for layer in draft.layers:
            layer.set("mixer.rope", None)

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        return super().write(draft, key) or {key: {"rope_type": "default", "rope_theta": None}}


def layers_with(mixer: type, draft: Draft) -> Draft:
    """The draft without its other layers."""
    return Draft(draft.model, [layer for layer in draft.layers if layer.get("mixer").kind is mixer])


class QueryHeads(Heads):
    """The number of query heads, each dim / heads wide. Gated DeltaNet has as many, until its own keys are read."""

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        return super().write(layers_with(Attention, draft), key)


class OfDelta(Row):
    """A row that is about the layers with Gated DeltaNet, some of whose fields have the names of attention's."""

    def __init__(self, row: Row) -> None:
        self.row = row

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        self.row.read(r, layers_with(GatedDeltaNet, draft), key)

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        return self.row.write(layers_with(GatedDeltaNet, draft), key)

    def says(self) -> str:
        return self.row.says()


def of_delta(path: str, missing: Callable[[Draft], int]) -> OfDelta:
    """A size, for which null means the same as a missing key."""
    return OfDelta(size(path, missing=missing, null=missing))


def three_quarters(draft: Draft) -> int:
    """As `missing`: keys are together three quarters as wide as the model."""
    return int(0.75 * draft["dim"] / draft["mixer.key_heads"])


OLMO_HYBRID = LLAMA_SHAPE.but(
    "olmo_hybrid", "OlmoHybridForCausalLM", names=(OLMO_HYBRID_NAMES,), norm=NORM, ignorable=frozenset(),
    missing={"max_position_embeddings": 65536},
    keys={
        "layer_types": KindsWithNorms("mixer", MIXERS, read_types, lambda kinds: {"layer_types": kinds}),
        "num_attention_heads": QueryHeads(alone=False, missing=30),
        "hidden_act": only("silu", written=True),  # the convolution's too
        "rms_norm_eps": number(*EPS, missing=1e-6), "attention_bias": ATTENTION_BIAS,
        "rope_parameters": MaybeRope(),
        "linear_num_key_heads": of_delta("mixer.key_heads", field("mixer.heads")),
        "linear_num_value_heads": of_delta("mixer.heads", field("mixer.heads")),
        "linear_key_head_dim": of_delta("mixer.key_dim", three_quarters),
        "linear_value_head_dim": of_delta("mixer.head_dim", lambda draft: 2 * draft["mixer.key_dim"]),
        "linear_conv_kernel_dim": size("mixer.conv", missing=4),
        "linear_allow_neg_eigval": flag("mixer.reflects", missing=True),
    },
    without=("head_dim",),
    irrelevant=frozenset(f"linear_{name}" for name in ("a_log_min", "a_log_max", "dt_min", "dt_max", "dt_init_floor")),
)
FAMILIES = {"olmo_hybrid": OLMO_HYBRID}
