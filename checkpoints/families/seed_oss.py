"""Seed-OSS, 36B: Llama with biases on q, k and v, and heads 128 wide whatever hidden_size is.

The base of RoPE is 10000 where no key says it; the published config says 1e7, and a context of 524288.
"""

from checkpoints.families.llama import LLAMA_SHAPE
from checkpoints.names.config_table import flag

SEED_OSS = LLAMA_SHAPE.but(
    "seed_oss", "SeedOssForCausalLM", irrelevant=frozenset({"residual_dropout"}),
    missing={"num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 524288},
    keys={
        "attention_bias": flag("mixer.qkv_bias", missing=True),
        "attention_out_bias": flag("mixer.out_bias", missing=False), "mlp_bias": flag("ffn.bias", missing=False),
    },
)
FAMILIES = {"seed_oss": SEED_OSS}
