"""Persimmon-8B: LayerNorms everywhere, on every query and key head too, half of each head rotated, and a squared ReLU.

    x += dense(attention(norm(x)));  x += 4h_to_h(relu(h_to_4h(norm(x)))²)      LayerNorms and matrices all with bias

As many key/value heads as heads; on disk q, k and v are one tensor, a head at a time. The base of RoPE is 25000.
Untied, with a vocabulary of 262144, and 0.6 of dropout, for training only.
"""

from checkpoints.families.llama import EPS, LAYER_NORM, LLAMA_NAMES, LLAMA_SHAPE
from checkpoints.names.config_rows import Heads, RopeKeys
from checkpoints.names.config_table import Switch, activation, field, number, only, part
from checkpoints.names.ops import Groups
from checkpoints.names.table import QKV, override, rule, under
from nanollm.config import MLP

PERSIMMON_NAMES = override(
    LLAMA_NAMES,
    rule("model.final_layernorm", "norm"),
    rule("model.layers.{i}.self_attn.query_key_value", QKV, Groups),
    *under("model.layers.{i}.self_attn", "layers.{i}.mixer", {
        "dense": "o", "q_layernorm": "q_norm", "k_layernorm": "k_norm",
    }),
    *under("model.layers.{i}.mlp", "layers.{i}.ffn", {"dense_h_to_4h": "up", "dense_4h_to_h": "down"}),
)

PERSIMMON = LLAMA_SHAPE.but(
    "persimmon", "PersimmonForCausalLM", names=(PERSIMMON_NAMES,),
    norm=LAYER_NORM, layer={"ffn": part(MLP, gated=False, bias=True), "mixer.qkv_bias": True, "mixer.out_bias": True},
    missing={"max_position_embeddings": 16384},
    keys={
        "num_attention_heads": Heads(),
        # in the hub's config, where they say nothing else
        "num_key_value_heads": only(field("mixer.kv_heads")), "head_dim": only(field("mixer.head_dim")),
        "hidden_act": activation("ffn.activation", missing="relu2"),
        "qk_layernorm": Switch("mixer.qk_norm", LAYER_NORM, missing=True),
        "layer_norm_eps": number(*EPS, missing=1e-5),
        "rope_parameters": RopeKeys(fraction=0.5),
    },
    without=("rms_norm_eps",),
    irrelevant=frozenset({"rms_norm_eps"}),  # left over from the conversion
)
FAMILIES = {"persimmon": PERSIMMON}
