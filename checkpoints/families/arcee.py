"""Arcee's AFM-4.5B (arcee) and Jais 2 (jais2): Llama's attention, and a plain feed-forward with a squared ReLU.

    x += o(attention(norm(x)));  x += down(relu(up(norm(x)))²)          So et al. 2021 (arXiv 2109.08668), Primer

    arcee    RMS norms, no biases, YaRN
    jais2    LayerNorms and all matrices with biases; heads 128 wide
"""

from checkpoints.families.llama import ATTENTION_BIAS, EPS, LAYER_NORM, LLAMA_SHAPE
from checkpoints.names.config_table import activation, flag, number, part
from nanollm.config import MLP

ARCEE = LLAMA_SHAPE.but(
    "arcee", "ArceeForCausalLM", layer={"ffn": part(MLP, gated=False)},
    missing={"rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
    keys={
        "hidden_act": activation("ffn.activation", missing="relu2"),
        "attention_bias": ATTENTION_BIAS, "mlp_bias": flag("ffn.bias", missing=False),
    },
)
JAIS2 = ARCEE.but(
    "jais2", "Jais2ForCausalLM", norm=LAYER_NORM,
    missing={"attention_bias": True, "mlp_bias": True, "max_position_embeddings": 8192},
    keys={"layer_norm_eps": number(*EPS, missing=1e-5)}, without=("rms_norm_eps",),
)
FAMILIES = {"arcee": ARCEE, "jais2": JAIS2}
