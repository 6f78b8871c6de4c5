"""Helium-1, 2B: Llama with a RoPE that turns neighbours, and norms that round after the gain.

    RoPE        pairs (2j, 2j + 1), base 1e5 (2e4 as published)
    norm        rounded(x̂ · g), ε 1e-8

Heads are 128 wide and fill the stream: o is square. `attention_bias` is of q, k and v alone. Kyutai, January 2025.
"""

from checkpoints.families.llama import LLAMA_SHAPE
from checkpoints.names.config_rows import RopeKeys
from checkpoints.names.config_table import flag, part
from nanollm.config import Norm

HELIUM = LLAMA_SHAPE.but(
    "helium", "HeliumForCausalLM", norm=part(Norm, cast_after_gain=True), layer={"mixer.rope.layout": "interleaved"},
    missing={"num_key_value_heads": 20, "head_dim": 128, "rms_norm_eps": 1e-8, "max_position_embeddings": 4096},
    keys={
        "rope_parameters": RopeKeys(theta=100_000.0),
        "attention_bias": flag("mixer.qkv_bias", missing=False), "mlp_bias": flag("ffn.bias", missing=False),
    },
)
FAMILIES = {"helium": HELIUM}
