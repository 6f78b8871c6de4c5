"""Hunyuan 3 (hy_v3): Qwen3's attention with a norm on every query and key head, and DeepSeek-V3's experts.

Sigmoids, a correction for the choice, 8 of 192 experts, renormalised and scaled; one that every token visits, whose
output is added in float32 as published (`enable_moe_fp32_combine`), here in the working dtype. The layers that
`mlp_layer_types` calls dense, the first where it is missing, have an MLP. The layer behind the last, which predicts the
token after the next, is left out.
"""

from checkpoints.families.deepseek import AHEAD, V3_EXPERTS, SharedExperts
from checkpoints.families.glm_moe import NamedDense
from checkpoints.families.llama import ATTENTION_BIAS, EXPERT, GATED, LLAMA_SHAPE
from checkpoints.families.qwen import QWEN3_NAMES
from checkpoints.names.config_rows import HeadDim, RopeKeys
from checkpoints.names.config_table import count, number, only, part, size
from checkpoints.names.ops import Stack
from checkpoints.names.table import override, under
from nanollm.config import Norm

HY_V3_NAMES = override(
    QWEN3_NAMES,
    *under("model.layers.{i}.mlp", "layers.{i}.ffn", {"router.gate": "router", "expert_bias": "router.correction"}),
    *under("model.layers.{i}.mlp.experts.{e}", "layers.{i}.ffn.experts", EXPERT, Stack),
    *under("model.layers.{i}.mlp.shared_mlp", "layers.{i}.ffn.shared", GATED),
)
HY_V3 = LLAMA_SHAPE.but(
    "hy_v3", "HYV3ForCausalLM", names=(HY_V3_NAMES,),
    layer={"mixer.qk_norm": part(Norm)},
    missing={"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072,
             "intermediate_size": 13312},
    keys={
        "mlp_layer_types": NamedDense(missing=1, **V3_EXPERTS, renormalize=True),
        "intermediate_size": size("ffn.hidden"), "moe_intermediate_size": size("ffn.expert.hidden", missing=1536),
        "num_experts": count("ffn.experts", missing=192), "num_experts_per_tok": size("ffn.top_k", missing=8),
        "num_shared_experts": SharedExperts(missing=1),
        "router_scaling_factor": number("ffn.scale", missing=2.826),
        "head_dim": HeadDim(missing=128), "attention_bias": ATTENTION_BIAS, "mlp_bias": only(False),
        "rope_parameters": RopeKeys(theta=11_158_840.0),
    },
    irrelevant=frozenset({"enable_moe_fp32_combine", "num_nextn_predict_layers"}), ahead=AHEAD,
)
FAMILIES = {"hy_v3": HY_V3}
