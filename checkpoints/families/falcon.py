"""Falcon: 7B, 40B, 180B, Falcon2-11B and the RefinedWeb models rw-1b and rw-7b.

                   norms of a layer                     wiring        key/value heads          position    biases
    7B             one, input_layernorm                 parallel      1                        RoPE        of norms only
    40B, 180B      two, ln_attn and ln_mlp              parallel      8                        RoPE        of norms only
    11B            one, input_layernorm                 parallel      8                        RoPE        of norms only
    rw-1b, rw-7b   input_, post_attention_layernorm     sequential    as many as heads         ALiBi       everywhere

Everything else is alike: LayerNorms with bias, exact GELU in a plain MLP, the head tied, and rows of `query_key_value` by key/value head:
the queries that read it, its key, its value. `new_decoder_architecture` is 40B's and its successors'; without it, `multi_query` and
`parallel_attn` say the rest. ALiBi is its own kind (Alibi.coarse): made in bfloat16, and scaled with the scores.

The first uploads have model_type RefinedWeb (40B) or RefinedWebModel (the others), and n_head, n_layer, n_head_kv for today's
num_attention_heads, num_hidden_layers, num_kv_heads. There was no key for the new architecture yet: n_head_kv told it.

A table of names holds for one wiring, so what is written anew has two families to choose from: TWO_NORMS for 40B's, FALCON for the rest.
"""

from typing import Any

from checkpoints.families.gpt2 import one_name, read_heads
from checkpoints.families.legacy import functions, write_decoder
from checkpoints.names.ops import Groups
from checkpoints.names.reader import Reader
from checkpoints.names.rope import read_rope, write_rope
from checkpoints.names.table import override, rule
from nanollm.config import MLP, Alibi, Attention, Layer, ModelConfig, Norm, Rope
from nanollm.errors import ConfigError

ONE_NORM_NAMES = override(
    {},
    rule("transformer.word_embeddings", "embed"),
    rule("transformer.h.{i}.input_layernorm", "layers.{i}.pre_mixer"),
    rule("transformer.h.{i}.self_attention.query_key_value", [f"layers.{{i}}.mixer.{part}" for part in "qkv"], Groups),
    rule("transformer.h.{i}.self_attention.dense", "layers.{i}.mixer.o"),
    rule("transformer.h.{i}.post_attention_layernorm", "layers.{i}.pre_ffn"),
    rule("transformer.h.{i}.mlp.dense_h_to_4h", "layers.{i}.ffn.up"),
    rule("transformer.h.{i}.mlp.dense_4h_to_h", "layers.{i}.ffn.down"),
    rule("transformer.ln_f", "norm"),
    rule("lm_head", "head"),
)
TWO_NORMS_NAMES = override(
    ONE_NORM_NAMES,
    rule("transformer.h.{i}.ln_attn", "layers.{i}.pre_mixer"),
    rule("transformer.h.{i}.ln_mlp", "layers.{i}.pre_ffn"),
)
BUFFERS = frozenset(f"transformer.h.{{i}}.self_attention.{name}" for name in ("rotary.inv_freq", "maybe_rotary.inv_freq", "rotary_emb.inv_freq"))


def read(r: Reader) -> ModelConfig:
    """The four rows of the table above, and what lies between them where transformers can run it."""
    r.must("apply_residual_connection_post_layernorm", False)
    dim, context = r.size("hidden_size"), r.size("max_position_embeddings", 2048)
    heads, head_dim = read_heads(r, dim, one_name(r, "num_attention_heads", "n_head"))
    eps, bias = r.number("layer_norm_epsilon", 1e-5), r.flag("bias", False)
    norm = Norm("layer", eps=eps, bias=True)
    stated = r.size(one_name(r, "num_kv_heads", "n_head_kv"), None)
    parallel, multi_query = r.flag("parallel_attn", True), r.flag("multi_query", True)
    if r.flag("new_decoder_architecture", "n_head_kv" in r.values):
        kv_heads = stated or heads
        two = r.must("num_ln_in_parallel_attn", 2, 1, None) != 1
        r.must("parallel_attn", True)                    # the other wiring exists without it only
    else:
        kv_heads, two = 1 if multi_query else heads, False
        if not multi_query and stated not in (None, heads):
            raise r.error("num_kv_heads", f"num_attention_heads ({heads}) where multi_query is false")
        r.must("num_ln_in_parallel_attn", None, 1)
    rope = read_rope(r, 10_000.0, context)               # its keys stand there beside ALiBi too
    position = {"alibi": Alibi(coarse=True)} if r.flag("alibi", False) else {"rope": rope}
    layer = Layer(
        Attention(heads, kv_heads, head_dim, qkv_bias=bias, out_bias=bias, **position),
        MLP(r.size("ffn_hidden_size", None) or 4 * dim, r.activation("activation", "gelu"), gated=False, bias=bias),
        norm, pre_ffn=None if parallel and not two else norm, parallel=parallel,
    )
    return ModelConfig(
        vocab=r.size("vocab_size"), dim=dim, layers=(layer,) * r.count(one_name(r, "num_hidden_layers", "n_layer")), final_norm=norm,
        tied=r.flag("tie_word_embeddings", True), context=context,
    )


def write(config: ModelConfig) -> dict[str, Any]:
    """New architecture for what is parallel, but for 7B's single key/value head, which the old one has too."""
    values = write_decoder(config, "falcon", "FalconForCausalLM", Attention, MLP)
    layer = config.layers[0]
    kv_heads, two = layer.mixer.kv_heads, layer.pre_ffn is not None
    new = layer.parallel and (two or kv_heads > 1)
    return values | {
        "num_attention_heads": layer.mixer.heads,
        "num_kv_heads": kv_heads if new else None,
        "new_decoder_architecture": new,
        "num_ln_in_parallel_attn": (2 if two else 1) if new else None,
        "parallel_attn": layer.parallel,
        "multi_query": kv_heads == 1,
        "alibi": layer.mixer.alibi is not None,
        "bias": layer.mixer.out_bias,
        "ffn_hidden_size": layer.ffn.hidden,
        "activation": "gelu_pytorch_tanh" if layer.ffn.activation == "gelu_tanh" else layer.ffn.activation,
        "layer_norm_epsilon": config.final_norm.eps,
        "max_position_embeddings": config.context,
    } | write_rope(layer.mixer.rope or Rope())


def write_two_norms(config: ModelConfig) -> dict[str, Any]:
    if not (config.layers[0].parallel and config.layers[0].pre_ffn):
        raise ConfigError("layers[0] is not parallel with two norms")
    return write(config)


IRRELEVANT = frozenset({"ff_factor", "gradient_checkpointing", "rotary"})            # ffn_hidden_size says the first, alibi the last
FALCON = functions("falcon", read, write, (ONE_NORM_NAMES, TWO_NORMS_NAMES), BUFFERS, IRRELEVANT)
TWO_NORMS = functions("falcon", read, write_two_norms, (TWO_NORMS_NAMES, ONE_NORM_NAMES), BUFFERS, IRRELEVANT)
FAMILIES = {"RefinedWeb": TWO_NORMS, "falcon": FALCON, "RefinedWebModel": FALCON}
