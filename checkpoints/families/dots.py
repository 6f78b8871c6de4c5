"""dots.llm1: Qwen3's attention with a norm on every query and key head, and DeepSeek-V3's experts.

Sigmoids, a correction for the choice, 6 of 128 experts, 2 that every token visits; the first layer has an MLP. Huo et
al. 2025 (arXiv 2506.05767), §2. `sliding_window` is null where it was published: no layer slides. Where it is a number,
transformers lets those from `max_window_layers` on slide.
"""

from checkpoints.families.deepseek import CORRECTION, SHARED, V3_EXPERTS, V3_ROUTING, FirstDense, Groups
from checkpoints.families.llama import ATTENTION_BIAS, LLAMA_SHAPE
from checkpoints.families.qwen import QWEN3_NAMES, LastLayersSlide
from checkpoints.families.qwen_moe import with_experts
from checkpoints.names.config_table import count, only, part, size
from nanollm.config import Norm

DOTS1 = LLAMA_SHAPE.but(
    "dots1", "Dots1ForCausalLM", names=with_experts(QWEN3_NAMES, CORRECTION, *SHARED),
    layer={"mixer.qk_norm": part(Norm)},
    missing={"num_key_value_heads": 32, "moe_intermediate_size": 1408, "norm_topk_prob": False,
             "n_shared_experts": None, "intermediate_size": 10944, "routed_scaling_factor": 1.0},
    keys=V3_ROUTING | {
        "first_k_dense_replace": FirstDense(missing=0, **V3_EXPERTS), "n_group": Groups(count=1, kept=1, best=2),
        "n_routed_experts": count("ffn.experts"), "num_experts_per_tok": size("ffn.top_k"),
        "attention_bias": ATTENTION_BIAS, "layer_types": LastLayersSlide(first=62, or_null=True),
        "scoring_func": only("sigmoid", "noaux_tc"), "topk_method": only("noaux_tc"), "moe_layer_freq": only(1),
    },
)
FAMILIES = {"dots1": DOTS1}
