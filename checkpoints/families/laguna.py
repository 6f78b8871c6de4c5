"""Laguna (poolside): attention whose heads pass a softplus gate, of as many heads as each layer has, and V3's experts.

    attention   a norm on every head of q and k; one gate a head (`gating` true), or a channel ("per-element")
                (nanollm/layers/gated_attention.py); `num_attention_heads_per_layer`; layers that slide (512) and full
                ones have a RoPE each, of which half a head turns in full ones where nothing else is said
    experts     sigmoids, a correction for the choice, 8 of 256, renormalised, and one that every token visits. The
                first layer has an MLP

Refused: a soft cap of the router, weights that go in (which transformers refuses too), biases.
"""

from typing import Any

from checkpoints.families.glm_moe import NamedDense
from checkpoints.families.llama import EPS, LLAMA_SHAPE
from checkpoints.families.mellum import NoneSlides, Ropes, dense_layers
from checkpoints.families.qwen import QWEN3_NAMES
from checkpoints.families.qwen_moe import SHARED, with_experts
from checkpoints.names.config_rows import FULL, SLIDING
from checkpoints.names.config_table import Draft, Row, activation, choice, count, number, only, part, size
from checkpoints.names.layer_kinds import Within
from checkpoints.names.reader import Reader
from checkpoints.names.table import rule
from nanollm.config import MLP, Attention, GatedAttention, Norm, Rope


class HeadsOfEach(Row):
    """Query heads: a number for all layers, or a list."""

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        heads, number, each = r.size(key), len(draft.layers), r.get("num_attention_heads_per_layer", None)
        if each is None:
            each = [heads] * number
        if not isinstance(each, list) or len(each) != number or not all(type(one) is int and one > 0 for one in each):
            raise r.error("num_attention_heads_per_layer", f"{number} whole numbers above 0")
        for layer, one in zip(draft.layers, each, strict=True):
            layer.set("mixer.heads", one)

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        return {key: draft["mixer.heads"], "num_attention_heads_per_layer": [*draft.each("mixer.heads")]}


class OrPublished(Ropes):
    """Mellum's two, and where nothing is said those that were published."""
    fraction = 1.0
    PUBLISHED = {FULL: {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.5},
                 SLIDING: {"rope_type": "default", "rope_theta": 1e4}}

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        """The object, or the published one."""
        said = r if r.get(key, None) else r.of(r.values | {key: self.PUBLISHED})
        super().read(said, draft, key)
        r.seen |= said.seen


def within(row: Row) -> Within:
    """A row for the attention inside."""
    return Within("attention", row)


def gating_types(draft: Draft) -> list[str]:
    """The word for the gate, once a layer."""
    return ["per_head" if draft["mixer.per"] == "head" else "per_element"] * len(draft.layers)


LAGUNA = LLAMA_SHAPE.but(
    "laguna", "LagunaForCausalLM",
    names=with_experts(QWEN3_NAMES, *SHARED, rule("model.layers.{i}.self_attn.g_proj", "layers.{i}.mixer.gate"), rule(
        "model.layers.{i}.mlp.experts.e_score_correction_bias", "layers.{i}.ffn.router.correction")),
    layer={"mixer": part(GatedAttention, activation="softplus",
                         attention=part(Attention, rope=part(Rope), qk_norm=part(Norm)))},
    missing={"max_position_embeddings": 131072},
    keys={
        "mlp_layer_types": NamedDense(missing=1, shared=part(MLP), score="sigmoid", correction=True, renormalize=True,
                                      round_weights=True),
        "layer_types": within(NoneSlides(512)),
        "num_attention_heads": within(HeadsOfEach()), "head_dim": within(size("mixer.head_dim", missing=128)),
        "num_key_value_heads": within(size("mixer.kv_heads", missing=8)), "rope_parameters": within(OrPublished()),
        "gating": choice({True: "head", "per-head": "head", "per-element": "channel"}, "mixer.per", missing=True),
        "rms_norm_eps": number(*EPS, "mixer.attention.qk_norm.eps", missing=1e-6),
        "hidden_act": activation("ffn.activation", "ffn.expert.activation", "ffn.shared.activation", missing="silu"),
        "intermediate_size": size("ffn.hidden"), "moe_intermediate_size": size("ffn.expert.hidden", missing=512),
        "shared_expert_intermediate_size": size("ffn.shared.hidden", missing=512),
        "num_experts": count("ffn.experts", missing=256), "num_experts_per_tok": size("ffn.top_k", missing=8),
        "moe_routed_scaling_factor": number("ffn.scale", missing=1.0),
        "attention_bias": only(False), "moe_apply_router_weight_on_input": only(False),
        "moe_router_logit_softcapping": only(0.0), "swa_attention_sink_enabled": only(False),
        # what the lists say, and what the class always does, in published configs
        "decoder_sparse_step": only(1), "mlp_only_layers": only(dense_layers), "norm_topk_prob": only(True),
        "qkv_bias": only(False), "gating_types": only(gating_types),
    },
)
FAMILIES = {"laguna": LAGUNA}
