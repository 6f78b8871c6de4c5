"""MiMo-7B: Qwen2 with heads 128 wide, and a layer beside the others that predicts the token after the next one.

That layer, `model.mtp_layers.0`, is for speculative decoding and is left out, which load says. Xiaomi 2025,
arXiv 2505.07608.
"""

from checkpoints.families.qwen import QWEN2
from checkpoints.names.config_table import only

MIMO = QWEN2.but(
    "mimo", "MiMoForCausalLM", keys={"attention_bias": only(True, written=True)},
    irrelevant=frozenset({"num_nextn_predict_layers"}), ahead="model.mtp_layers.0.input_proj.weight",
)
FAMILIES = {"mimo": MIMO}
