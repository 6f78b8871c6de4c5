"""Phi-1, Phi-1.5 and Phi-2.

    h = norm(x);  x += dense(attention(h)) + fc2(gelu_tanh(fc1(h)))        one LayerNorm a layer, which both branches read

Biases on everything, the head included; RoPE in the half layout on the first part of each head: a half (Phi-1 and 1.5: 32 of 64
channels), two fifths in Phi-2 (32 of 80). `qk_layernorm` puts a LayerNorm on each query and key head; no published Phi has it. Phi-3 is a Llama,
and its model_type another. The first uploads (model_type "phi-msft", "mixformer-sequential") have other names, and are refused.
"""

from typing import Any

from checkpoints.families.gpt2 import read_heads
from checkpoints.families.gpt_neox import write_partial_rope
from checkpoints.families.legacy import functions, write_decoder
from checkpoints.names.reader import Reader
from checkpoints.names.rope import read_rope
from checkpoints.names.table import override, rule
from nanollm.config import MLP, Attention, Layer, ModelConfig, Norm

NAMES = override(
    {},
    rule("model.embed_tokens", "embed"),
    rule("model.layers.{i}.input_layernorm", "layers.{i}.pre_mixer"),
    *(rule(f"model.layers.{{i}}.self_attn.{part}_proj", f"layers.{{i}}.mixer.{part}") for part in "qkv"),
    *(rule(f"model.layers.{{i}}.self_attn.{part}_layernorm", f"layers.{{i}}.mixer.{part}_norm") for part in "qk"),
    rule("model.layers.{i}.self_attn.dense", "layers.{i}.mixer.o"),
    rule("model.layers.{i}.mlp.fc1", "layers.{i}.ffn.up"),
    rule("model.layers.{i}.mlp.fc2", "layers.{i}.ffn.down"),
    rule("model.final_layernorm", "norm"),
    rule("lm_head", "head"),
)


def read(r: Reader) -> ModelConfig:
    """One layer, repeated; a missing partial_rotary_factor means a half."""
    dim, context = r.size("hidden_size"), r.size("max_position_embeddings", 2048)
    heads, head_dim = read_heads(r, dim, "num_attention_heads")
    norm = Norm("layer", eps=r.number("layer_norm_eps", 1e-5), bias=True)
    attention = Attention(
        heads, r.size("num_key_value_heads", None) or heads, head_dim, read_rope(r, 10_000.0, context, fraction=0.5),
        qk_norm=norm if r.flag("qk_layernorm", False) else None, qkv_bias=True, out_bias=True,
    )
    mlp = MLP(r.size("intermediate_size"), r.activation("hidden_act", "gelu_new"), gated=False, bias=True)
    return ModelConfig(
        vocab=r.size("vocab_size"), dim=dim, layers=(Layer(attention, mlp, norm, pre_ffn=None, parallel=True),) * r.count("num_hidden_layers"),
        final_norm=norm, tied=r.flag("tie_word_embeddings", False), context=context, head_bias=True,
    )


def write(config: ModelConfig) -> dict[str, Any]:
    """A second norm in a layer, or a missing bias, does not read back."""
    values = write_decoder(config, "phi", "PhiForCausalLM", Attention, MLP)
    layer = config.layers[0]
    return values | {
        "num_attention_heads": layer.mixer.heads,
        "num_key_value_heads": layer.mixer.kv_heads,
        "intermediate_size": layer.ffn.hidden,
        "hidden_act": "gelu_new" if layer.ffn.activation == "gelu_tanh" else layer.ffn.activation,
        "layer_norm_eps": config.final_norm.eps,
        "max_position_embeddings": config.context,
        "qk_layernorm": layer.mixer.qk_norm is not None,
    } | write_partial_rope(layer.mixer.rope)


PHI = functions("phi", read, write, (NAMES,), frozenset({"model.layers.{i}.self_attn.rotary_emb.inv_freq"}))
FAMILIES = {"phi": PHI}
