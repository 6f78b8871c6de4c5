"""Qwen3-Next: three layers of Gated DeltaNet, then one of gated attention, and experts in all of them. 80B-A3B.

    layer i has attention iff (i + 1) mod full_attention_interval = 0, where `layer_types` does not say it

    linear_attention    nanollm/layers/gated_delta_net.py: a state of H heads in place of keys and values
    full_attention      nanollm/layers/gated_attention.py: RMS norm on every query and key head, a quarter of each head
                        turns, and the output is multiplied by a gate. 256 channels a head, whatever hidden_size is

The gains of all norms are stored as offsets from one and multiply before the one rounding, as in Gemma; only the norm
inside Gated DeltaNet has a gain of its own kind, which is the gain and rounded to before it multiplies. Experts are
Qwen2-MoE's, with the chosen weights renormalised: 512 of them, 10 a token, and one that all tokens visit, times σ(w·x).

Two stored matrices hold the rows of several of ours, head by head. With G key heads, of which each serves two values:

    in_proj_qkvz    q0 k0 v0 v1 z0 z1   q1 k1 v2 v3 z2 z3   …        G times
    in_proj_ba      β0 β1 α0 α1         β2 β3 α2 α3         …        G times
    q_proj          q0 gate0            q1 gate1            …        a query head at a time

The layers behind the model's own that predict the token after the next one (mtp.*) are left out.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from checkpoints.families.llama import EPS, LLAMA_NAMES, LLAMA_SHAPE
from checkpoints.families.qwen import QK_NORM
from checkpoints.families.qwen_moe import SHARED, sparse_steps, with_experts
from checkpoints.names.config_rows import FULL, Kinds, RopeKeys
from checkpoints.names.config_table import Keys, count, flag, number, only, part, size
from checkpoints.names.ops import Blocks, Pieces
from checkpoints.names.reader import Reader
from checkpoints.names.table import Rule, rule, under
from nanollm.config import MLP, Attention, GatedAttention, GatedDeltaNet, Layer, MoE, Norm, Rope

LINEAR = "linear_attention"


class ByHead(Blocks):
    """One stored tensor has the rows of several parameters, the first head's of each, then the second's of each, …

    heads   of a mixer's config: how many there are."""

    def __init__(self, heads: Callable[[Any], int]) -> None:
        self.heads = heads

    def pieces(self, ours: Sequence[Tensor], layer: Layer | None) -> Pieces:  # type: ignore[override]  # of an instance
        assert layer is not None
        grouped = [tensor.unflatten(0, (self.heads(layer.mixer), -1)) for tensor in ours]
        yield from ((0, rows) for group in zip(*grouped, strict=True) for rows in group)


class QKVZ(ByHead):
    """The same of q, k, v, which are one parameter here, and z."""

    def pieces(self, ours: Sequence[Tensor], layer: Layer | None) -> Pieces:  # type: ignore[override]
        assert layer is not None and isinstance(layer.mixer, GatedDeltaNet)
        qkv, z = ours
        keys = layer.mixer.key_heads * layer.mixer.key_dim
        yield from super().pieces([*qkv.split([keys, keys, len(z)]), z], layer)


def key_heads(mixer: GatedDeltaNet) -> int:
    return mixer.key_heads


def query_heads(mixer: GatedAttention) -> int:
    return mixer.attention.heads


MIXER_NAMES: list[Rule] = [  # of what is stored alike in all that have these mixers
    *QK_NORM,
    rule("model.layers.{i}.self_attn.q_proj", ["layers.{i}.mixer.q", "layers.{i}.mixer.gate"], ByHead(query_heads)),
    *under("model.layers.{i}.linear_attn", "layers.{i}.mixer", {
        name: name for name in ("conv1d", "dt_bias", "A_log", "norm", "out_proj")
    }),
]
FUSED = [
    rule("model.layers.{i}.linear_attn.in_proj_qkvz", ["layers.{i}.mixer.qkv", "layers.{i}.mixer.z"], QKVZ(key_heads)),
    rule("model.layers.{i}.linear_attn.in_proj_ba", ["layers.{i}.mixer.beta", "layers.{i}.mixer.alpha"],
         ByHead(key_heads)),
]


def read_types(r: Reader, layers: int) -> list[str]:
    """The kind of each layer. `full_attention_interval` counts where there are no `layer_types`."""
    every, types = r.size("full_attention_interval", 4), r.get("layer_types", None)
    if types is None:
        return [LINEAR if (i + 1) % every else FULL for i in range(layers)]
    if not isinstance(types, list) or len(types) != layers or not all(one in (LINEAR, FULL) for one in types):
        raise r.error("layer_types", f"{layers} times {LINEAR} or {FULL}")
    return types


NORM = part(Norm, offset=1.0, cast_after_gain=True)
MIXERS = {
    LINEAR: part(GatedDeltaNet),
    FULL: part(GatedAttention, attention=part(Attention, rope=part(Rope), qk_norm=NORM)),
}
EXPERTS = part(MoE, expert=part(MLP), shared=part(MLP), shared_gate=True, renormalize=True, round_weights=True)
SHAPE = LLAMA_SHAPE.but(  # what Qwen3-Next and Qwen3.5 have in common
    "", norm=NORM, ignorable=frozenset(), ahead="mtp.fc.weight",
    missing={"max_position_embeddings": 32768},
    keys={
        "layer_types": Kinds("mixer", MIXERS, read_types, lambda kinds: {"layer_types": kinds}),
        "num_attention_heads": size("mixer.attention.heads"),
        "num_key_value_heads": size("mixer.attention.kv_heads", missing=2),
        "head_dim": size("mixer.attention.head_dim", missing=256),
        "attention_bias": flag("mixer.attention.qkv_bias", "mixer.attention.out_bias", missing=False),
        "hidden_act": only("silu", written=True),  # the convolution's too
        "rms_norm_eps": number(*EPS, "mixer.attention.qk_norm.eps", "mixer.eps", missing=1e-6),
        "rope_parameters": RopeKeys(fraction=0.25, path="mixer.attention.rope"),
        "linear_num_value_heads": size("mixer.heads", missing=32),
        "linear_num_key_heads": size("mixer.key_heads", missing=16),
        "linear_value_head_dim": size("mixer.head_dim", missing=128),
        "linear_key_head_dim": size("mixer.key_dim", missing=128),
        "linear_conv_kernel_dim": size("mixer.conv", missing=4),
    },
)
MOE_KEYS: Keys = {
    "moe_intermediate_size": size("ffn.expert.hidden", missing=512),
    "shared_expert_intermediate_size": size("ffn.shared.hidden", missing=512),
}
QWEN3_NEXT = SHAPE.but(
    "qwen3_next", "Qwen3NextForCausalLM", names=with_experts(LLAMA_NAMES, *MIXER_NAMES, *FUSED, *SHARED),
    keys=MOE_KEYS | {
        "mlp_only_layers": sparse_steps(EXPERTS), "intermediate_size": size("ffn.hidden", missing=5632),
        "num_experts": count("ffn.experts", missing=512, also=("num_local_experts",)),
        "num_experts_per_tok": size("ffn.top_k", missing=10),
        "norm_topk_prob": flag("ffn.renormalize", missing=True), "use_sliding_window": only(False),
    },
)
FAMILIES = {"qwen3_next": QWEN3_NEXT}
