"""BLOOM and BLOOMZ, 560M to 176B.

    x = norm(E[token])                                           a LayerNorm right after the embedding: embed_norm
    x += dense(attention(norm1(x)));  x += mlp(norm2(x))         LayerNorms and all matrices with biases, the head tied

ALiBi in place of a rotation; 176B has 112 heads, which is no power of two. The MLP is 4 D wide and plain, its GELU the tanh form with
√(2/π) cut to eight digits. `query_key_value` has q k v of one head after the other. On the hub the names lack `transformer.`.

A width is `n_embed` or hidden_size, the number of heads `num_attention_heads` or n_head, by the age of the folder. `seq_length`, where
there is one, is what it was trained at. `slow_but_exact` sums as the training did, in slices of `pretraining_tp`: rounding, no more.
"""

from typing import Any

from checkpoints.families.gpt2 import one_name, read_heads
from checkpoints.families.legacy import functions, write_decoder
from checkpoints.names.ops import Groups
from checkpoints.names.reader import Reader
from checkpoints.names.table import override, rule, stripped
from nanollm.config import MLP, Alibi, Attention, Layer, ModelConfig, Norm

NAMES = override(
    {},
    rule("transformer.word_embeddings", "embed"),
    rule("transformer.word_embeddings_layernorm", "embed_norm"),
    rule("transformer.h.{i}.input_layernorm", "layers.{i}.pre_mixer"),
    rule("transformer.h.{i}.self_attention.query_key_value", [f"layers.{{i}}.mixer.{part}" for part in "qkv"], Groups),
    rule("transformer.h.{i}.self_attention.dense", "layers.{i}.mixer.o"),
    rule("transformer.h.{i}.post_attention_layernorm", "layers.{i}.pre_ffn"),
    rule("transformer.h.{i}.mlp.dense_h_to_4h", "layers.{i}.ffn.up"),
    rule("transformer.h.{i}.mlp.dense_4h_to_h", "layers.{i}.ffn.down"),
    rule("transformer.ln_f", "norm"),
    rule("lm_head", "head"),
)
IRRELEVANT = frozenset("""
    attention_softmax_in_fp32 bias_dropout_fusion gradient_checkpointing masked_softmax_fusion offset_alibi skip_bias_add skip_bias_add_qkv
    slow_but_exact unk_token_id
""".split())


def read(r: Reader) -> ModelConfig:
    """One layer, repeated. Raises ConfigError where the residual is the norm's output, which no published BLOOM has."""
    r.must("apply_residual_connection_post_layernorm", False)
    r.must("n_inner", None)
    dim = r.size(one_name(r, "hidden_size", "n_embed"))
    heads, head_dim = read_heads(r, dim, one_name(r, "n_head", "num_attention_heads"))
    norm = Norm("layer", eps=r.number("layer_norm_epsilon", 1e-5), bias=True)
    attention = Attention(heads, heads, head_dim, alibi=Alibi(), qkv_bias=True, out_bias=True)
    layer = Layer(attention, MLP(4 * dim, "gelu_tanh", gated=False, bias=True), norm, pre_ffn=norm)
    return ModelConfig(
        vocab=r.size("vocab_size"), dim=dim, layers=(layer,) * r.count(one_name(r, "n_layer", "num_hidden_layers")), final_norm=norm,
        tied=r.flag("tie_word_embeddings", True), context=r.size("seq_length", None), embed_norm=norm,
    )


def write(config: ModelConfig) -> dict[str, Any]:
    """Heads of another width, another MLP or no norm of the embedding do not read back."""
    values = write_decoder(config, "bloom", "BloomForCausalLM", Attention, MLP)
    context = {} if config.context is None else {"seq_length": config.context}
    return values | context | {
        "n_layer": values.pop("num_hidden_layers"),
        "n_head": config.layers[0].mixer.heads,
        "layer_norm_epsilon": config.final_norm.eps,
    }


BLOOM = functions("bloom", read, write, (NAMES, stripped(NAMES, "transformer.")), irrelevant=IRRELEVANT)
FAMILIES = {"bloom": BLOOM}
