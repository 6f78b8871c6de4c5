"""InternLM, InternLM2, InternLM2.5 and InternLM3: Llama with one switch for the biases, and angles that follow the length.

    InternLM     `bias` on q, k, v and o (7B true, 20B false); Llama's names
    InternLM2    the same, with names of its own and q, k, v fused by key/value head: wqkv rows  q q k v  q q k v  (2 queries a group)
                 w1 is the gate, w3 the up, w2 the down projection. model_type internlm2; in the first uploads internlm
    InternLM3    `qkv_bias` for q, k, v and `bias` for o and the MLP, which transformers takes only if both are alike, as do we; head_dim 128

All three stretch RoPE by dynamic NTK past the context they were trained for (2048; 32768). InternLM-1 says it in a word of its own,
`rotary: {"base": 10000, "type": "dynamic"}`, and without that word its code turned plainly.
"""

import dataclasses
from typing import Any

from checkpoints.families.legacy import functions, read_attention, read_decoder, read_mlp, write_llama_shape
from checkpoints.families.llama import INV_FREQ, LLAMA_NAMES
from checkpoints.names.ops import Groups
from checkpoints.names.reader import Reader
from checkpoints.names.table import override, rule
from nanollm.config import Attention, DynamicNTK, Layer, ModelConfig, Norm, Rope

CONTEXT, CONTEXT3 = 2048, 32768                          # what a missing max_position_embeddings means; of InternLM3

INTERNLM2_NAMES = override(
    {},
    rule("model.tok_embeddings", "embed"),
    rule("model.layers.{i}.attention_norm", "layers.{i}.pre_mixer"),
    rule("model.layers.{i}.attention.wqkv", ["layers.{i}.mixer.q", "layers.{i}.mixer.k", "layers.{i}.mixer.v"], Groups),
    rule("model.layers.{i}.attention.wo", "layers.{i}.mixer.o"),
    rule("model.layers.{i}.ffn_norm", "layers.{i}.pre_ffn"),
    rule("model.layers.{i}.feed_forward.w1", "layers.{i}.ffn.gate"),
    rule("model.layers.{i}.feed_forward.w3", "layers.{i}.ffn.up"),
    rule("model.layers.{i}.feed_forward.w2", "layers.{i}.ffn.down"),
    rule("model.norm", "norm"),
    rule("output", "head"),
)


def read_internlm(r: Reader) -> ModelConfig:
    """InternLM and InternLM2, which differ in the names of their tensors."""
    norm = Norm(eps=r.number("rms_norm_eps", 1e-6))
    bias = r.flag("bias", True)
    attention = read_rotary(r, read_attention(r, context=CONTEXT, qkv_bias=bias, out_bias=bias))
    if attention.heads * attention.head_dim != r.size("hidden_size"):
        raise r.error("head_dim", "hidden_size / num_attention_heads")
    layer = Layer(attention, read_mlp(r), pre_mixer=norm, pre_ffn=norm)
    return read_decoder(r, [layer] * r.count("num_hidden_layers"), norm, CONTEXT)


def read_rotary(r: Reader, attention: Attention) -> Attention:
    """The attention with its `rotary` object, if there is one. What Llama's keys say beside it must be the same or nothing."""
    rotary = r.inside("rotary")
    if rotary is None:
        return attention
    base, context = rotary.number("base", above=1), r.size("max_position_embeddings", CONTEXT)
    kind, factor = rotary.must("type", "dynamic", "origin"), rotary.number("scaling_factor", 1.0)
    rotary.close()
    for key, value in (("rope_theta", base), ("rope_scaling", None), ("rope_parameters", None)):
        r.must(key, value)
    return dataclasses.replace(attention, rope=Rope(base, scaling=DynamicNTK(factor, context) if kind == "dynamic" else None))


def read_internlm3(r: Reader) -> ModelConfig:
    """Both dialects: transformers calls qkv_bias attention_bias, and bias mlp_bias."""
    norm = Norm(eps=r.number("rms_norm_eps", 1e-5))
    bias, rest = r.flag("qkv_bias", r.flag("attention_bias", False)), r.flag("bias", r.flag("mlp_bias", False))
    if bias != rest:
        raise r.error("mlp_bias" if "mlp_bias" in r.values else "bias", f"{bias}, as for q, k and v")
    attention = read_attention(r, context=CONTEXT3, kv_heads=2, head_dim=128, qkv_bias=bias, out_bias=bias)
    layer = Layer(attention, read_mlp(r, bias=bias), pre_mixer=norm, pre_ffn=norm)
    return read_decoder(r, [layer] * r.count("num_hidden_layers"), norm, CONTEXT3)


def write_internlm(config: ModelConfig) -> dict[str, Any]:
    return write_llama_shape(config, "internlm", "InternLMForCausalLM") | {"bias": config.layers[0].mixer.out_bias}


def write_internlm2(config: ModelConfig) -> dict[str, Any]:
    return write_llama_shape(config, "internlm2", "InternLM2ForCausalLM") | {"bias": config.layers[0].mixer.out_bias}


def write_internlm3(config: ModelConfig) -> dict[str, Any]:
    values = write_llama_shape(config, "internlm3", "InternLM3ForCausalLM")
    bias = config.layers[0].mixer.out_bias
    return values | {"qkv_bias": bias, "bias": bias}


IRRELEVANT = frozenset({"attn_implementation"})          # which kernel; the same logits
INTERNLM = functions("internlm", read_internlm, write_internlm, (LLAMA_NAMES, INTERNLM2_NAMES), INV_FREQ, IRRELEVANT)
INTERNLM2 = functions("internlm2", read_internlm, write_internlm2, (INTERNLM2_NAMES,), irrelevant=IRRELEVANT)
INTERNLM3 = functions("internlm3", read_internlm3, write_internlm3, (LLAMA_NAMES,), INV_FREQ, IRRELEVANT)
FAMILIES = {"internlm": INTERNLM, "internlm2": INTERNLM2, "internlm3": INTERNLM3}
