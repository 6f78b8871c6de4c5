"""Kolibri-1 (Aleph Alpha): Qwen3's attention between two norms, in windows, and sigmoid experts in every layer.

    x += norm(attention(norm(x)));  x += norm(experts(norm(x)))

Four layers of five slide (513) and rotate, the fifth sees all, not rotated. The router works in float32; its correction
is added to the logits, not to their sigmoids; 6 of 384, renormalised if `norm_topk_prob` says so; one that every token
visits.
"""

from checkpoints.families.deepseek import SHARED
from checkpoints.families.llama import LLAMA_SHAPE
from checkpoints.families.qwen import QWEN3_NAMES
from checkpoints.families.qwen_moe import ROUTED, with_experts
from checkpoints.names.config_rows import HeadDim, Periodic
from checkpoints.names.config_table import count, part, size
from checkpoints.names.table import under
from nanollm.config import MLP, MoE, Norm

OWN = under("model.layers.{i}", "layers.{i}", {
    "post_attn_norm": "post_mixer", "post_ffn_norm": "post_ffn", "moe.router.expert_bias": "ffn.router.correction"})
KOLIBRI1 = LLAMA_SHAPE.but(
    "kolibri1", "Kolibri1ForCausalLM", names=with_experts(QWEN3_NAMES, *SHARED, *OWN),
    layer={
        "mixer.qk_norm": part(Norm), "post_mixer": part(Norm), "post_ffn": part(Norm),
        "ffn": part(MoE, expert=part(MLP), shared=part(MLP), score="sigmoid", correction="logits", router_float32=True),
    },
    missing={"num_key_value_heads": 4, "max_position_embeddings": 262144},
    keys={key: ROUTED[key] for key in ("hidden_act", "norm_topk_prob")} | {
        "head_dim": HeadDim(missing=128), "layer_types": Periodic(5, default=513, full={"mixer.rope": None}),
        "moe_intermediate_size": size("ffn.expert.hidden", missing=512),
        "shared_expert_intermediate_size": size("ffn.shared.hidden", missing=512),
        "num_experts": count("ffn.experts", missing=384, also=("num_local_experts",)),
        "num_experts_per_tok": size("ffn.top_k", missing=6),
    },
    without=("intermediate_size",),
)
FAMILIES = {"kolibri1": KOLIBRI1}
