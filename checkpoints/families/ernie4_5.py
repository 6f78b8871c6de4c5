"""ERNIE-4.5, dense (0.3B): Llama with a RoPE that turns neighbours, in float32, and one switch for all biases.

    RoPE        pairs (2j, 2j + 1), base 5e5; only the result is rounded
    use_bias    on q, k, v, o and the feed-forward

Heads are 128 wide whatever hidden_size is; tied. Its mixtures of experts have another model_type.
"""

from checkpoints.families.llama import LLAMA_SHAPE
from checkpoints.names.config_rows import RopeKeys
from checkpoints.names.config_table import flag

ERNIE4_5 = LLAMA_SHAPE.but(
    "ernie4_5", "Ernie4_5ForCausalLM", layer={"mixer.rope.layout": "interleaved", "mixer.rope.rounds": "result"},
    missing={"num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
             "max_position_embeddings": 131072},
    keys={
        "rope_parameters": RopeKeys(theta=500_000.0),
        "use_bias": flag("mixer.qkv_bias", "mixer.out_bias", "ffn.bias", missing=False),
    },
)
FAMILIES = {"ernie4_5": ERNIE4_5}
