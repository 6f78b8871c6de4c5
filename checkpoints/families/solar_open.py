"""Solar-Open-100B: Llama's attention and DeepSeek-V3's experts in every layer, 8 of 128, and one for every token.

`attention_bias` puts a bias on q, k and v and none on o. The scores are sigmoids, with a correction for the choice.
Published configs have keys of GLM-4.5, whose code it is, at values that say nothing. https://huggingface.co/upstage
"""

from checkpoints.families.deepseek import CORRECTION, SHARED, V3_EXPERTS, V3_ROUTING, Groups
from checkpoints.families.llama import LLAMA_NAMES, LLAMA_SHAPE
from checkpoints.families.qwen_moe import with_experts
from checkpoints.names.config_rows import HeadDim, RopeKeys
from checkpoints.names.config_table import flag, only, part
from nanollm.config import MLP, MoE

SOLAR_OPEN = LLAMA_SHAPE.but(
    "solar_open", "SolarOpenForCausalLM", names=with_experts(LLAMA_NAMES, CORRECTION, *SHARED),
    layer={"ffn": part(MoE, expert=part(MLP), **V3_EXPERTS)},
    missing={
        "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072,
        "moe_intermediate_size": 1280, "n_routed_experts": 128, "routed_scaling_factor": 1.0,
    },
    keys=V3_ROUTING | {
        "head_dim": HeadDim(missing=128), "attention_bias": flag("mixer.qkv_bias", missing=False),
        "n_group": Groups(count=1, kept=1, best=2), "rope_parameters": RopeKeys(theta=1e6),
        "partial_rotary_factor": only(1.0), "first_k_dense_replace": only(0), "use_qk_norm": only(False),
    },
    without=("intermediate_size",), irrelevant=frozenset({"intermediate_size"}),  # no layer has an MLP alone
)
FAMILIES = {"solar_open": SOLAR_OPEN}
