"""Youtu-LLM-2B: DeepSeek-V3's latent attention in a Llama's block, with an MLP in every layer; tied. December 2025.

Held to the stored weights. transformers 5.23's class sets row `pad_token_id` of the embedding, and so of the head, to 0
when it loads a folder, whatever is stored there."""

from checkpoints.families.deepseek import DEEPSEEK_V3, LATENT_NAMES
from checkpoints.names.config_table import part
from nanollm.config import MLP

YOUTU = DEEPSEEK_V3.but(
    "youtu", "YoutuForCausalLM", names=(LATENT_NAMES,), layer={"ffn": part(MLP)},
    missing={"max_position_embeddings": 131072, "tie_word_embeddings": True},
    without=(  # what says which experts there are
        "first_k_dense_replace", "moe_layer_freq", "moe_intermediate_size", "n_routed_experts", "n_shared_experts",
        "num_experts_per_tok", "norm_topk_prob", "scoring_func", "topk_method", "n_group", "routed_scaling_factor",
    ),
    irrelevant=frozenset({"embedding_initializer_range"}), ahead="",
)
FAMILIES = {"youtu": YOUTU}
