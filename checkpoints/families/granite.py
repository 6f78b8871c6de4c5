"""Granite 3, 3.1, 3.2, 3.3, dense: Llama with four factors, which training finds for a small model and keeps (muP).

    x  = e · E[token]                                     e = embedding_multiplier    12
    x += r · o(attention(norm(x)));  x += r · mlp(norm(x))    r = residual_multiplier     0.22
    scores = a · q kᵀ                                     a = attention_multiplier    1/d, and not 1/√d
    logits = W norm(x) / l                                l = logits_scaling          8 (2B), 16 (8B)

A factor whose key is missing is 1, that of the scores too. Biases as in Llama: `attention_bias` and `mlp_bias`.
The factors are after Yang et al. 2022 (arXiv 2203.03466).
"""

from checkpoints.families.llama import ATTENTION_BIAS, LLAMA_SHAPE
from checkpoints.names.config_rows import reciprocal
from checkpoints.names.config_table import flag, number

GRANITE = LLAMA_SHAPE.but(
    "granite", "GraniteForCausalLM",
    keys={
        "embedding_multiplier": number("embed_scale", missing=1.0),
        "residual_multiplier": number("residual_scale", missing=1.0),
        "attention_multiplier": number("mixer.scale", missing=1.0),
        "logits_scaling": reciprocal("head_scale", missing=1.0),
        "attention_bias": ATTENTION_BIAS, "mlp_bias": flag("ffn.bias", missing=False),
    },
)
FAMILIES = {"granite": GRANITE}
