"""Hunyuan-A13B (hunyuan_v1_moe): the dense Hunyuan's attention, and experts in every layer.

64 experts, 8 a token, the softmax of the router in float32, the chosen weights divided by their sum; one that every
token visits, of the same width. Published configs say numbers that all layers have in common once, or once for each
layer. Tencent, June 2025, https://github.com/Tencent-Hunyuan/Hunyuan-A13B
"""

from typing import Any

from checkpoints.families.hunyuan import HUNYUAN, HUNYUAN_NAMES
from checkpoints.families.llama import EXPERT, GATED
from checkpoints.names.config_table import Draft, Key, activation, field, only, part, size
from checkpoints.names.ops import Stack
from checkpoints.names.reader import Reader
from checkpoints.names.table import override, rule, under
from nanollm.config import MLP, MoE

HUNYUAN_MOE_NAMES = override(
    HUNYUAN_NAMES, rule("model.layers.{i}.mlp.gate.wg", "layers.{i}.ffn.router"),
    *under("model.layers.{i}.mlp.experts.{e}", "layers.{i}.ffn.experts", EXPERT, Stack),
    *under("model.layers.{i}.mlp.shared_mlp", "layers.{i}.ffn.shared", GATED),
)


class OnceOrEach(Key):
    """A number, or a list with the same number for each layer."""

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        """The number. Raises ConfigError for layers that differ."""
        value, number = r.get(key, None), len(draft.layers)
        if isinstance(value, list) and (len(value) != number or any(one != value[0] for one in value)):
            raise r.error(key, f"a number, or {number} times the same")
        super().read(r.of(r.values | {key: value[0]}) if isinstance(value, list) else r, draft, key)


def each(value: Any) -> Any:
    """For `only`: a value, or what a function says of the draft, once for each layer."""
    return lambda draft: [value(draft) if callable(value) else value] * len(draft.layers)


WIDTH = field("ffn.expert.hidden")
HUNYUAN_MOE = HUNYUAN.but(
    "hunyuan_v1_moe", "HunYuanMoEV1ForCausalLM", names=(HUNYUAN_MOE_NAMES,),
    layer={"ffn": part(MoE, expert=part(MLP), shared=part(MLP), renormalize=True, router_float32=True)},
    keys={
        "intermediate_size": size("ffn.expert.hidden", "ffn.shared.hidden", missing=11008),
        "hidden_act": activation("ffn.expert.activation", "ffn.shared.activation", missing="silu"),
        "num_experts": OnceOrEach(Reader.count, "ffn.experts", missing=1),
        "moe_topk": OnceOrEach(Reader.size, "ffn.top_k", missing=1),
        # what the class always does, and the hub's configs also say
        "moe_intermediate_size": only(WIDTH, each(WIDTH)), "num_shared_expert": only(1, each(1)),
        "norm_topk_prob": only(True), "use_mixed_mlp_moe": only(True), "moe_layer_num_skipped": only(0),
        "use_mla": only(False), "group_limited_greedy": only(False), "moe_drop_tokens": only(False),
        "moe_random_routing_dropped_token": only(False), "position_embedding_xdrope": only(False),
        "routed_scaling_factor": only(False, 1.0), "topk_group": only(False),
    },
)
FAMILIES = {"hunyuan_v1_moe": HUNYUAN_MOE}
