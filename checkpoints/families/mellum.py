"""Mellum 2, 12B-A2.5B (JetBrains): Qwen3-MoE with windows; the layers that slide have one RoPE, the full ones another.

`layer_types` and `mlp_layer_types` say which layers slide (1024) and which have an MLP in place of experts; without
them none does. The chosen weights are renormalised. What predicts ahead (mtp.…) is left out.
"""

from typing import Any

from checkpoints.families.gemma import TwoRopes
from checkpoints.families.glm_moe import NamedDense
from checkpoints.families.qwen_moe import QWEN3_MOE
from checkpoints.names.config_rows import FULL, SLIDING, Windows
from checkpoints.names.config_table import Draft, only
from checkpoints.names.reader import Reader
from nanollm.config import MLP


class NoneSlides(Windows):
    """Where there is no `layer_types`, no layer."""

    def pattern(self, r: Reader, layers: int) -> list[bool]:
        return [False] * layers


class Ropes(TwoRopes):
    """One for the layers that slide, another for the full ones, in the new dialect alone."""
    BASES = {SLIDING: ("rope_local_base_freq", 1e4), FULL: ("rope_theta", 5e5)}

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        return {key: super().write(draft, key)[key]}


def dense_layers(draft: Draft) -> list[int]:
    """The numbers of the layers that have an MLP."""
    return [i for i, layer in enumerate(draft.layers) if layer.get("ffn").kind is MLP]


MELLUM = QWEN3_MOE.but(
    "mellum", "MellumForCausalLM", without=("mlp_only_layers", "qkv_bias", "use_qk_norm"),
    missing={
        "head_dim": 128, "max_position_embeddings": 131072, "num_experts": 64, "moe_intermediate_size": 896,
        "norm_topk_prob": True, "intermediate_size": 7168,
    },
    keys={
        "mlp_layer_types": NamedDense(missing=0, round_weights=True), "layer_types": NoneSlides(1024),
        "rope_parameters": Ropes(),
        # Qwen3-MoE's keys in published configs, which must say what the lists do
        "use_sliding_window": only(lambda draft: any(draft.each("mixer.window"))),
        "decoder_sparse_step": only(1), "mlp_only_layers": only(dense_layers),
    },
    irrelevant=QWEN3_MOE.irrelevant | frozenset({
        "num_nextn_predict_layers", "mtp_layer_types", "mtp_mlp_layer_types"}), ahead="mtp.",
)
FAMILIES = {"mellum": MELLUM}
