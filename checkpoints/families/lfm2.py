"""LFM2 and LFM2-MoE, LFM2.5: gated short convolutions, and attention in about every third layer. Liquid AI 2025.

    x += mixer(norm(x));  x += w2(silu(w1 h) · w3 h),  h = norm(x)          arXiv 2511.23404; 350M … 2.6B, 8B-A1B

`layer_types` says which layers attend, "full_attention", and which convolve, "conv" (nanollm/layers/short_conv.py); the
first configs name the former, `full_attn_idxs`. Attention has RMS norms on every query and key head.

    intermediate_size    the width of the MLP only if `block_auto_adjust_ff_dim` is false; else ⅔ of it, times
                         `block_ffn_dim_multiplier`, rounded up to a multiple of `block_multiple_of`; older configs say
                         `block_ff_dim`
    lfm2_moe             the first `num_dense_layers` have an MLP, as wide as it says, the others experts: scores are
                         sigmoids, with a learned correction for the choice; the weights are divided by their sum + 1e-6

The last norm is called `embedding_norm`. transformers takes the router's sigmoid in the working dtype; here it is
float32.
"""

from typing import Any

from checkpoints.families.llama import EPS, HEADS_SHARE_DIM, LLAMA_NAMES, LLAMA_SHAPE
from checkpoints.names.config_rows import Kinds, RopeKeys, whole
from checkpoints.names.config_table import Draft, Repeats, Row, count, field, flag, number, one_name, only, part, size
from checkpoints.names.expert_ops import GateUp
from checkpoints.names.layer_kinds import words_of
from checkpoints.names.ops import Stack
from checkpoints.names.reader import Reader
from checkpoints.names.table import EXPERTS_GATE_UP, override, rule, under
from nanollm.config import MLP, Attention, MoE, Norm, Rope, ShortConv

W123 = {"w1": "gate", "w3": "up", "w2": "down"}
LFM2_NAMES = override(
    LLAMA_NAMES, rule("model.embedding_norm", "norm"),
    *under("model.layers.{i}", "layers.{i}", {"operator_norm": "pre_mixer", "ffn_norm": "pre_ffn"}),
    *under("model.layers.{i}.self_attn", "layers.{i}.mixer", {
        "q_layernorm": "q_norm", "k_layernorm": "k_norm", "out_proj": "o",
    }),
    *under("model.layers.{i}.conv", "layers.{i}.mixer", {
        "in_proj": "in_proj", "conv": "conv1d", "out_proj": "out_proj",
    }),
    *under("model.layers.{i}.feed_forward", "layers.{i}.ffn", W123),
)
ROUTER = under("model.layers.{i}.feed_forward", "layers.{i}.ffn", {
    "gate": "router", "expert_bias": "router.correction",
})
LFM2_MOE_NAMES = override(
    LFM2_NAMES, *ROUTER,
    *under("model.layers.{i}.feed_forward.experts.{e}", "layers.{i}.ffn.experts",
           {f"{theirs}.weight": ours for theirs, ours in W123.items()}, Stack),
)
IN_MEMORY = override(  # as transformers 5 has it in memory
    LFM2_NAMES, *ROUTER, rule("model.layers.{i}.feed_forward.experts.down_proj", "layers.{i}.ffn.experts.down"),
    rule("model.layers.{i}.feed_forward.experts.gate_up_proj", EXPERTS_GATE_UP, GateUp),
)


def read_kinds(r: Reader, layers: int) -> list[str]:
    """The mixer of each layer; without either key all attend."""
    places = r.get("full_attn_idxs", None)
    if places is not None and (not isinstance(places, list) or not all(type(i) is int for i in places)):
        raise r.error("full_attn_idxs", "a list of whole numbers")
    named = ["full_attention" if places is None or i in places else "conv" for i in range(layers)]
    if r.get("layer_types", None) is None:
        return named
    found = words_of(r, "layer_types", {kind: kind for kind in MIXERS}, layers)
    if places is not None and found != named:
        raise r.error("full_attn_idxs", "the layers that layer_types calls full_attention")
    return found


class AdjustedWidth(Row):
    """How wide the MLP is, after the adjustment, if there is one."""
    also = ("block_ff_dim",)

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        width = r.size(one_name(r, key, *self.also), 12288)
        multiple, factor = r.size("block_multiple_of", 256), r.get("block_ffn_dim_multiplier", 1.0)
        if r.flag("block_auto_adjust_ff_dim", True):
            width = int(2 * width / 3)
            if factor is not None:
                width = -(-int(r.number("block_ffn_dim_multiplier", 1.0) * width) // multiple) * multiple
        draft["ffn.hidden"] = width

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        return {key: draft["ffn.hidden"], "block_auto_adjust_ff_dim": False}


MIXERS = {"conv": part(ShortConv), "full_attention": part(Attention, rope=part(Rope), qk_norm=part(Norm))}
LFM2 = LLAMA_SHAPE.but(
    "lfm2", "Lfm2ForCausalLM", names=(LFM2_NAMES,), ignorable=frozenset(),
    missing={"max_position_embeddings": 128000, "num_key_value_heads": 8},
    keys=HEADS_SHARE_DIM | {
        "layer_types": Kinds("mixer", MIXERS, read_kinds, lambda kinds: {"layer_types": kinds}),
        "intermediate_size": AdjustedWidth(), "hidden_size": size("dim", "mixer.width"),
        "conv_bias": flag("mixer.bias", missing=False), "conv_L_cache": size("mixer.conv", missing=3),
        "norm_eps": number(*EPS, missing=1e-5), "block_norm_eps": Repeats("norm_eps", 1e-5),
        "tie_word_embeddings": flag("tied", missing=True, also=("tie_embedding",)),
        "rope_parameters": RopeKeys(theta=1e6),
        **{key: only(field("dim")) for key in ("block_dim", "conv_dim", "conv_dim_out")},
        "num_heads": only(field("mixer.heads")), "block_use_swiglu": only(True), "use_pos_enc": only(True),
    },
    without=("rms_norm_eps", "hidden_act"),
    irrelevant=frozenset({"block_mlp_init_scale", "block_out_init_scale", "block_use_xavier_init",
                          "conv_use_xavier_init"}),
)


def dense_first(r: Reader, layers: int) -> list[str]:
    """An MLP in the first layers, experts in the others."""
    first = whole(r, "num_dense_layers", 2)
    return ["mlp" if i < first else "experts" for i in range(layers)]


FEEDS = {"mlp": part(MLP), "experts": part(MoE, expert=part(MLP), score="sigmoid")}
LFM2_MOE = LFM2.but(
    "lfm2_moe", "Lfm2MoeForCausalLM", names=(LFM2_MOE_NAMES, IN_MEMORY),
    keys={
        "num_dense_layers": Kinds("ffn", FEEDS, dense_first, lambda kinds: {
            "num_dense_layers": [*kinds, "experts"].index("experts")}),
        "intermediate_size": size("ffn.hidden", missing=7168),
        "moe_intermediate_size": size("ffn.expert.hidden", missing=1792),
        "num_experts": count("ffn.experts", missing=32), "num_experts_per_tok": size("ffn.top_k", missing=4),
        "use_expert_bias": flag("ffn.correction", missing=True),
        "norm_topk_prob": flag("ffn.renormalize", missing=True, to=lambda yes: yes and 1e-6, of=bool),
        "routed_scaling_factor": number("ffn.scale", missing=1.0),
    },
)
FAMILIES = {"lfm2": LFM2, "lfm2_moe": LFM2_MOE}
