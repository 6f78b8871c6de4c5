"""Persimmon-8B: LayerNorms everywhere, on every query and key head too, half of each head rotated, and a squared ReLU.

    x += dense(attention(norm(x)));  x += 4h_to_h(relu(h_to_4h(norm(x)))²)      LayerNorms and matrices all with bias

As many key/value heads as heads; on disk q, k and v are one tensor, a head at a time. The base of RoPE is 25000. Untied, with the
largest vocabulary of its time (262144), and the dropout of 0.6 that its config.json speaks of is for training.
"""

from typing import Any

from checkpoints.families.legacy import functions, read_decoder, write_llama_shape
from checkpoints.families.llama import INV_FREQ, LLAMA_NAMES
from checkpoints.names.ops import Groups
from checkpoints.names.reader import Reader
from checkpoints.names.rope import read_rope
from checkpoints.names.table import override, rule
from nanollm.config import MLP, Attention, Layer, ModelConfig, Norm

CONTEXT = 16384                                          # what a missing max_position_embeddings means

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


def read(r: Reader) -> ModelConfig:
    """num_key_value_heads stands in the hub's config, and can only be the number of heads."""
    norm = Norm("layer", eps=r.number("layer_norm_eps", 1e-5), bias=True)
    dim, heads = r.size("hidden_size"), r.size("num_attention_heads")
    if dim % heads:
        raise r.error("num_attention_heads", f"a divisor of hidden_size ({dim})")
    r.must("num_key_value_heads", heads)
    r.must("head_dim", dim // heads)
    rope = read_rope(r, 10_000.0, r.size("max_position_embeddings", CONTEXT), fraction=0.5)
    qk_norm = norm if r.flag("qk_layernorm", True) else None
    attention = Attention(heads, heads, dim // heads, rope, qk_norm=qk_norm, qkv_bias=True, out_bias=True)
    mlp = MLP(r.size("intermediate_size"), r.activation("hidden_act", "relu2"), gated=False, bias=True)
    return read_decoder(r, [Layer(attention, mlp, pre_mixer=norm, pre_ffn=norm)] * r.count("num_hidden_layers"), norm, CONTEXT)


def write(config: ModelConfig) -> dict[str, Any]:
    """A gated MLP, or matrices without bias, do not read back."""
    values = write_llama_shape(config, "persimmon", "PersimmonForCausalLM")
    attention = config.layers[0].mixer
    return values | {
        "layer_norm_eps": values.pop("rms_norm_eps"),
        "partial_rotary_factor": attention.rope.fraction,
        "qk_layernorm": attention.qk_norm is not None,
    }


PERSIMMON = functions("persimmon", read, write, (PERSIMMON_NAMES,), INV_FREQ, frozenset({"rms_norm_eps"}))      # left over from the conversion
FAMILIES = {"persimmon": PERSIMMON}
