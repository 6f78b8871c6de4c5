"""FlexOlmo-7x7B: OLMo-2's block, and OLMoE's experts in place of the MLP.

x += norm(o(attention(x)));  x += norm(Σ_e g_e expert_e(x)): norms after, which round after the gain; a norm over all
heads of q and of k; rotation in float32, base 5e5. 7 experts, each trained on its own data, 5 a token, their weights
not renormalised. Shi et al. 2025 (arXiv 2507.07024), §3.
"""

from checkpoints.families.olmo import OLMO2, OLMO2_NAMES, OLMOE
from checkpoints.families.qwen_moe import with_experts
from checkpoints.names.config_rows import RopeKeys

FLEX_OLMO = OLMO2.but(
    "flex_olmo", "FlexOlmoForCausalLM", names=with_experts(OLMO2_NAMES), layer={"ffn": OLMOE.layer.get("ffn")},
    keys={key: OLMOE.keys[key] for key in ("num_experts", "num_experts_per_tok", "norm_topk_prob")} | {
        "rope_parameters": RopeKeys(theta=500_000.0)},
    missing={"max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "num_experts": 7, "num_experts_per_tok": 5},
)
FAMILIES = {"flex_olmo": FLEX_OLMO}
