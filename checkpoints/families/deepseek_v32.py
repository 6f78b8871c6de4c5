"""DeepSeek-V3.2 (deepseek_v32), GLM-5, 5.1 and 5.2 (glm_moe_dsa): DeepSeek-V3 whose queries read 2,048 keys at most.

                  index                       which layers rank keys            layers with an MLP
    deepseek_v32  rotates in halves           all                               the first 3
    glm_moe_dsa   rotates neighbours          those that `indexer_types` calls  the first 3, or those that
                                              full (GLM-5, 5.1: all)            `mlp_layer_types` calls dense

The sparse attention is nanollm/layers/sparse_attention.py; up to `index_topk` keys the model is one with plain latent
attention. Everything else is V3's: deepseek.py. `indexer_types` may be said by `index_topk_pattern` ("FSSS…"), or by a
period: the layers from number `index_skip_topk_offset` − 1 on, every `index_topk_freq`-th, are full, as are those
before. `head_dim` says nothing. DeepSeek-AI 2025 (arXiv 2512.02556). As published the models rank in 8 bits; this, and
transformers, in float32.
"""

from collections.abc import Callable
from typing import Any

from checkpoints.families.deepseek import CORRECTION, DEEPSEEK_V3, LATENT_NAMES, SHARED, V3_EXPERTS, Groups
from checkpoints.families.exaone_moe import NamedOrFirstDense
from checkpoints.families.qwen_moe import with_experts
from checkpoints.names.config_rows import whole
from checkpoints.names.config_table import Draft, Row, count, only, part, size
from checkpoints.names.reader import Reader
from checkpoints.names.table import override, under
from nanollm.config import Indexer, Rope, SparseLatentAttention

SPARSE_NAMES = override(LATENT_NAMES, *under("model.layers.{i}.self_attn.indexer", "layers.{i}.mixer.index", {
    "wq_b": "q", "wk": "k", "k_norm": "norm", "weights_proj": "weights"}))
FULL, SHARES = "full", "shared"


def every(word: str) -> Callable[[Draft], list[str]]:
    """The word for each layer."""
    return lambda draft: [word] * len(draft.layers)


class WhichRank(Row):
    """Which layers rank keys ("full"), and which read those that one before has chosen ("shared")."""
    shapes = True

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        """Take the indexer from the layers that share. Raises ConfigError where the first one does."""
        number, pattern = len(draft.layers), r.get("index_topk_pattern", None)
        every, first = r.size("index_topk_freq", 1), whole(r, "index_skip_topk_offset", 2)
        if isinstance(pattern, str):
            pattern = [{"F": FULL, "S": SHARES}.get(letter) for letter in pattern]
        if pattern is None:
            pattern = [FULL if max(i - first + 1, 0) % every == 0 else SHARES for i in range(number)]
        kinds = r.get(key, None) or pattern
        known = isinstance(kinds, list) and len(kinds) == number and all(kind in (FULL, SHARES) for kind in kinds)
        if not known or kinds[0] != FULL:
            raise r.error(key, f"{number} times {FULL} or {SHARES}, of which the first is {FULL}")
        for layer, kind in zip(draft.layers, kinds, strict=True):
            if kind == SHARES:
                layer.set("mixer.indexer", None)

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        """The list."""
        return {key: [SHARES if layer.get("mixer.indexer") is None else FULL for layer in draft.layers]}


DEEPSEEK_V32 = DEEPSEEK_V3.but(
    "deepseek_v32", "DeepseekV32ForCausalLM", names=with_experts(SPARSE_NAMES, CORRECTION, *SHARED),
    layer={"mixer": part(SparseLatentAttention, rope=part(Rope, layout="interleaved"), indexer=part(Indexer))},
    missing={"max_position_embeddings": 163840},
    keys={
        "index_n_heads": size("mixer.indexer.heads", missing=64),
        "index_head_dim": size("mixer.indexer.head_dim", missing=128),
        "index_topk": size("mixer.indexer.top", missing=2048),
        "n_routed_experts": count("ffn.experts", missing=256, also=("num_experts",)),
        "q_lora_rank": size("mixer.q_rank", missing=1536),
        "first_k_dense_replace": NamedOrFirstDense(missing=3, **V3_EXPERTS),
        "layer_types": only(*(every(word) for word in ("indexed_attention", "deepseek_sparse_attention"))),
        "mlp_bias": only(False), "rope_interleave": only(True),
    },
    without=("head_dim",), irrelevant=DEEPSEEK_V3.irrelevant | {"head_dim"},
)
GLM_MOE_DSA = DEEPSEEK_V32.but(
    "glm_moe_dsa", "GlmMoeDsaForCausalLM", layer={"mixer.indexer.layout": "interleaved"},
    missing={
        "max_position_embeddings": 202752, "rms_norm_eps": 1e-5, "q_lora_rank": 2048, "v_head_dim": 256,
        "qk_nope_head_dim": 192, "index_n_heads": 32,
    },
    keys={
        "indexer_types": WhichRank(), "n_group": Groups(count=1, kept=1, best=2),
        "indexer_rope_interleave": only(True), "moe_router_dtype": only("float32"),
    },
    irrelevant=DEEPSEEK_V32.irrelevant | {"index_share_for_mtp_iteration"},
)
FAMILIES = {"deepseek_v32": DEEPSEEK_V32, "glm_moe_dsa": GLM_MOE_DSA}
