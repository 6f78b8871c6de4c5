"""GLM-4.5, 4.6 and 4.7 (glm4_moe) and GLM-4.7-Flash (glm4_moe_lite): DeepSeek-V3's experts in another block.

                        glm4_moe                                          glm4_moe_lite
    attention           Llama's; the first half of a head turns           latent, DeepSeek-V3's
    biases              on q, k and v (`attention_bias`), none on o       none
    norms of q and k    every head, where `use_qk_norm` says so           those of the latents, with ε 1e-6
    layers with MLP     the first `first_k_dense_replace`                 those that `mlp_layer_types` calls dense

The router is V3's: sigmoids, a correction for the choice, the best groups (published: one group, which is none), the
chosen weights renormalised and then scaled. "GLM-4.5: Agentic, Reasoning, and Coding Foundation Models",
arXiv 2508.06471, §2.1. The layer behind the last, which predicts the token after the next, is left out.
"""

from typing import Any

from checkpoints.families.deepseek import (
    AHEAD,
    CORRECTION,
    DEEPSEEK_V3,
    SHARED,
    V3_EXPERTS,
    V3_ROUTING,
    FirstDense,
    Groups,
)
from checkpoints.families.llama import LLAMA_SHAPE
from checkpoints.families.qwen import QWEN3_NAMES
from checkpoints.families.qwen_moe import with_experts
from checkpoints.names.config_rows import RopeKeys
from checkpoints.names.config_table import Switch, flag, only, part
from checkpoints.names.reader import Reader
from nanollm.config import Norm

WORDS = {"dense": "mlp", "sparse": "experts"}


def named_kinds(r: Reader, layers: int) -> list[str]:
    """The kinds that a list with "dense" or "sparse" for each layer says; none where there is no list."""
    words = r.get("mlp_layer_types", None)
    if words is None:
        return []
    if not isinstance(words, list) or len(words) != layers or not all(word in WORDS for word in words):
        raise r.error("mlp_layer_types", f"{layers} times {' or '.join(WORDS)}")
    return [WORDS[word] for word in words]


class NamedDense(FirstDense):
    """A list with "dense" or "sparse" for each layer; where it is missing only the first are dense. In published
    configs `first_k_dense_replace` says the same, and must."""

    def kinds(self, r: Reader, layers: int) -> list[str]:
        """The kind of each layer."""
        kinds = named_kinds(r, layers) or ["mlp" if i < self.missing else "experts" for i in range(layers)]
        r.must("first_k_dense_replace", [*kinds, "experts"].index("experts"))
        return kinds

    def keys(self, kinds: list[str]) -> dict[str, Any]:
        """The list."""
        back = {kind: word for word, kind in WORDS.items()}
        return {"mlp_layer_types": [back[kind] for kind in kinds]}


GLM4_MOE = LLAMA_SHAPE.but(
    "glm4_moe", "Glm4MoeForCausalLM", names=with_experts(QWEN3_NAMES, CORRECTION, *SHARED),
    keys=V3_ROUTING | {
        "attention_bias": flag("mixer.qkv_bias", missing=False),
        "use_qk_norm": Switch("mixer.qk_norm", part(Norm)),
        "first_k_dense_replace": FirstDense(missing=1, **V3_EXPERTS), "n_group": Groups(count=1, kept=1, best=2),
        "rope_parameters": RopeKeys(fraction=0.5),
    },
    missing={
        "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "intermediate_size": 10944,
        "moe_intermediate_size": 1408, "n_routed_experts": 128, "routed_scaling_factor": 1.0,
    },
    irrelevant=frozenset({"num_nextn_predict_layers"}), ahead=AHEAD,
)
GLM4_MOE_LITE = DEEPSEEK_V3.but(
    "glm4_moe_lite", "Glm4MoeLiteForCausalLM", without=("first_k_dense_replace",),
    missing={
        "rms_norm_eps": 1e-5, "max_position_embeddings": 202752, "moe_intermediate_size": 1536, "n_routed_experts": 64,
        "num_experts_per_tok": 4, "routed_scaling_factor": 1.8, "q_lora_rank": 768, "v_head_dim": 256,
        "qk_nope_head_dim": 192,
    },
    keys={
        "mlp_layer_types": NamedDense(missing=1, **V3_EXPERTS), "n_group": Groups(count=1, kept=1, best=2),
        "partial_rotary_factor": only(1.0),  # in published configs: of the part that turns
    },
)
FAMILIES = {"glm4_moe": GLM4_MOE, "glm4_moe_lite": GLM4_MOE_LITE}
