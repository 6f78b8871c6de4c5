"""Orion-14B: Llama with LayerNorms, with bias, whose ε goes by the name `rms_norm_eps`. arXiv 2401.12246."""

from checkpoints.families.llama import HEADS_SHARE_DIM, LAYER_NORM, LLAMA_SHAPE

ORION = LLAMA_SHAPE.but(
    "orion", "OrionForCausalLM", norm=LAYER_NORM, keys=HEADS_SHARE_DIM, missing={"rms_norm_eps": 1e-5},
    irrelevant=frozenset({"max_sequence_length"}),
)
FAMILIES = {"orion": ORION}
