"""Persimmon-8B: LayerNorms everywhere, on every query and key head too, half of each head rotated, and a squared ReLU.

    x += dense(attention(norm(x)));  x += 4h_to_h(relu(h_to_4h(norm(x)))²)      LayerNorms and matrices all with bias

As many key/value heads as heads; on disk q, k and v are one tensor, a head at a time. The base of RoPE is 25000. Untied, with the
largest vocabulary of its time (262144), and the dropout of 0.6 that its config.json speaks of is for training.
"""

from checkpoints.families.llama import EPS, LAYER_NORM, LLAMA_NAMES, LLAMA_SHAPE
from checkpoints.names.config_rows import Heads, RopeKeys
from checkpoints.names.config_table import Switch, activation, field, number, only, part, size
from checkpoints.names.ops import Groups
from checkpoints.names.table import override, rule
from nanollm.config import MLP

PERSIMMON_NAMES = override(
    LLAMA_NAMES,
    rule("model.layers.{i}.self_attn.query_key_value", ["layers.{i}.mixer.q", "layers.{i}.mixer.k", "layers.{i}.mixer.v"], Groups),
    rule("model.layers.{i}.self_attn.dense", "layers.{i}.mixer.o"),
    rule("model.layers.{i}.self_attn.q_layernorm", "layers.{i}.mixer.q_norm"),
    rule("model.layers.{i}.self_attn.k_layernorm", "layers.{i}.mixer.k_norm"),
    rule("model.layers.{i}.mlp.dense_h_to_4h", "layers.{i}.ffn.up"),
    rule("model.layers.{i}.mlp.dense_4h_to_h", "layers.{i}.ffn.down"),
    rule("model.final_layernorm", "norm"),
)

PERSIMMON = LLAMA_SHAPE.but(
    "persimmon", "PersimmonForCausalLM", names=(PERSIMMON_NAMES,),
    norm=LAYER_NORM, layer={"ffn": part(MLP, gated=False, bias=True), "mixer.qkv_bias": True, "mixer.out_bias": True},
    keys={
        "num_attention_heads": Heads(),
        "num_key_value_heads": only(field("mixer.kv_heads")),  # it stands in the hub's config, and says nothing else
        "head_dim": only(field("mixer.head_dim")),
        "hidden_act": activation("ffn.activation", missing="relu2"),
        "qk_layernorm": Switch("mixer.qk_norm", LAYER_NORM, missing=True),
        "layer_norm_eps": number(*EPS, missing=1e-5),
        "max_position_embeddings": size("context", missing=16384),
        "rope_parameters": RopeKeys(fraction=0.5),
    },
    without=("rms_norm_eps",),
    irrelevant=frozenset({"rms_norm_eps"}),  # left over from the conversion
)
FAMILIES = {"persimmon": PERSIMMON}
