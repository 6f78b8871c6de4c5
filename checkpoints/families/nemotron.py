"""Minitron and Nemotron-4, dense: LayerNorms with a gain stored as an offset from one, half of a head rotated, relu².

    norm     LayerNorm(x) · (1 + g) + b                     "LayerNorm1P"
    x += o(attention(norm(x)));  x += down(relu(up(norm(x)))²)

No biases on the matrices; heads 128 wide whatever hidden_size is. Parmar et al. 2024, arXiv 2402.16819; Muralidharan et
al. 2024, arXiv 2407.14679. Nemotron-H and the Llama-Nemotrons are others.
"""

from checkpoints.families.llama import ATTENTION_BIAS, EPS, LLAMA_SHAPE
from checkpoints.names.config_rows import RopeKeys
from checkpoints.names.config_table import activation, flag, number, part
from nanollm.config import MLP, Norm

NEMOTRON = LLAMA_SHAPE.but(
    "nemotron", "NemotronForCausalLM", norm=part(Norm, kind="layer", offset=1.0, bias=True),
    layer={"ffn": part(MLP, gated=False)}, missing={"max_position_embeddings": 4096},
    keys={
        "hidden_act": activation("ffn.activation", missing="relu2"),
        "norm_eps": number(*EPS, missing=1e-5), "rope_parameters": RopeKeys(fraction=0.5),
        "attention_bias": ATTENTION_BIAS, "mlp_bias": flag("ffn.bias", missing=False),
    },
    without=("rms_norm_eps",),
)
FAMILIES = {"nemotron": NEMOTRON}
