"""K-EXAONE-236B-A23B: EXAONE 4's attention in Llama's wiring, and DeepSeek-V3's experts.

    x += attention(norm(x));  x += experts(norm(x))       a norm on every head of q and k; three layers of four slide
                                                          (128) and rotate, the fourth sees all, not rotated
    experts    sigmoids, a correction for the choice, 8 of 128, renormalised, × 2.5; one that every token visits; the
               layers that `mlp_layer_types` calls dense, or else the first `first_k_dense_replace`, have an MLP

The correction is mlp.e_score_correction_bias; what predicts ahead (mtp.…) is left out. Bae et al. 2026, K-EXAONE
Technical Report, arXiv 2601.01739.
"""

from checkpoints.families.deepseek import SHARED, V3_EXPERTS, V3_ROUTING, FirstDense, Groups, SharedExperts
from checkpoints.families.exaone import LocalTurns
from checkpoints.families.glm_moe import NamedDense, named_kinds
from checkpoints.families.llama import LLAMA_SHAPE
from checkpoints.families.qwen import QWEN3_NAMES
from checkpoints.families.qwen_moe import with_experts
from checkpoints.names.config_table import count, part, size
from checkpoints.names.reader import Reader
from checkpoints.names.table import rule
from nanollm.config import Norm

CORRECTION = rule("model.layers.{i}.mlp.e_score_correction_bias", "layers.{i}.ffn.router.correction")


class NamedOrFirstDense(NamedDense):
    """A list of kinds, and where there is none the number of first layers that are dense."""

    def kinds(self, r: Reader, layers: int) -> list[str]:
        """The kind of each layer."""
        first = FirstDense.kinds(self, r, layers)
        return named_kinds(r, layers) or first


EXAONE_MOE = LLAMA_SHAPE.but(
    "exaone_moe", "ExaoneMoeForCausalLM", names=with_experts(QWEN3_NAMES, CORRECTION, *SHARED),
    layer={"mixer.qk_norm": part(Norm)}, without=("first_k_dense_replace",),
    missing={
        "num_key_value_heads": 32, "rms_norm_eps": 1e-5, "intermediate_size": 16384, "moe_intermediate_size": 1024,
    },
    keys={key: row for key, row in V3_ROUTING.items() if not key.startswith(("n_", "first"))} | {
        "mlp_layer_types": NamedOrFirstDense(missing=1, **V3_EXPERTS), "layer_types": LocalTurns(or_null=True),
        "num_experts": count("ffn.experts", missing=64), "num_experts_per_tok": size("ffn.top_k", missing=8),
        "num_shared_experts": SharedExperts(missing=1), "n_group": Groups(count=1, kept=1, best=2),
    },
    ahead="mtp.fc.weight",
)
FAMILIES = {"exaone_moe": EXAONE_MOE}
