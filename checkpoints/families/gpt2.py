"""GPT-2, and StarCoder-1 and SantaCoder, which are GPT-2 with one key/value head.

    x = E[token] + P[position]        P is a learned table: there is no position past its last row
    x += c_proj(attention(ln_1(x)))
    x += c_proj(gelu_tanh(c_fc(ln_2(x))))        LayerNorms and all matrices with biases, the head tied

                                  matrices    rows of c_attn (GPT-2: columns)           MLP width
    GPT-2, DistilGPT-2            (in, out)   q, then k, then v                         n_inner, or 4 D where it is null
    StarCoder-1, SantaCoder       (out, in)   q of all heads, the one k, the one v      likewise
      with multi_query false      (out, in)   q k v of each head                        likewise

GPT-2's first folders lack the `transformer.` before every name, and hold the causal mask as tensors (`attn.bias`). A size may go by
transformers' general name for it, hidden_size for n_embd.

`scale_attn_by_inverse_layer_idx` divides the scores of layer i by i + 1 (the GPT-2s of Stanford): a number, the `scale` of each layer's
Attention. `reorder_and_upcast_attn`, which goes with it, computes the same scores in float32: it moves the rounding of 16-bit runs, not
the meaning, and fused attention keeps its scores in float32 as it is. `attention_softmax_in_fp32` likewise.
"""

from typing import Any

from checkpoints.families.legacy import functions, write_decoder
from checkpoints.names.ops import Blocks, Groups, Op, Same, Transposed
from checkpoints.names.reader import Reader
from checkpoints.names.table import Table, override, rule, stripped
from nanollm.config import MLP, Attention, Layer, ModelConfig, Norm


def names(matrix: Op, fused: Op) -> Table:
    """`matrix`: how a matrix is stored; `fused`: how those of q, k and v are."""
    return override(
        {},
        rule("transformer.wte", "embed"),
        rule("transformer.wpe", "positions"),
        rule("transformer.h.{i}.ln_1", "layers.{i}.pre_mixer"),
        rule("transformer.h.{i}.attn.c_attn", [f"layers.{{i}}.mixer.{part}" for part in "qkv"], fused),
        rule("transformer.h.{i}.attn.c_proj", "layers.{i}.mixer.o", matrix),
        rule("transformer.h.{i}.ln_2", "layers.{i}.pre_ffn"),
        rule("transformer.h.{i}.mlp.c_fc", "layers.{i}.ffn.up", matrix),
        rule("transformer.h.{i}.mlp.c_proj", "layers.{i}.ffn.down", matrix),
        rule("transformer.ln_f", "norm"),
        rule("lm_head", "head"),
    )


GPT2_NAMES = names(Transposed(Same), Transposed(Blocks))
MASKS = frozenset(f"{prefix}h.{{i}}.attn.{mask}" for prefix in ("", "transformer.") for mask in ("bias", "masked_bias"))
IRRELEVANT = frozenset("""
    attention_softmax_in_fp32 attn_pdrop gradient_checkpointing n_ctx n_special predict_special_tokens _num_labels reorder_and_upcast_attn
    scale_attention_softmax_in_fp32 summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
    inference_runner max_batch_size max_sequence_length pad_key_length pre_allocate_kv_cache validate_runner_input
""".split())                                             # the last line: StarCoder's own inference code


def one_name(r: Reader, *keys: str) -> str:
    """Of several names for one size the first that stands. Where more stand, they must agree."""
    present = [key for key in keys if r.get(key, None) is not None] or keys[:1]
    for key in present[1:]:
        r.must(key, r.get(present[0]))
    return present[0]


def read_heads(r: Reader, dim: int, key: str) -> tuple[int, int]:
    """Heads and their width: these families have no key for the width."""
    heads = r.size(key)
    if dim % heads:
        raise r.error(key, f"a divisor of the model's width ({dim})")
    return heads, dim // heads


def read_model(r: Reader, activation: str, one_kv_head: bool) -> ModelConfig:
    """What the two have in common. activation: what a missing activation_function means."""
    r.must("add_cross_attention", False)
    dim = r.size(one_name(r, "n_embd", "hidden_size"))
    context = r.size(one_name(r, "n_positions", "max_position_embeddings"), 1024)
    heads, head_dim = read_heads(r, dim, one_name(r, "n_head", "num_attention_heads"))
    norm = Norm("layer", eps=r.number("layer_norm_epsilon", 1e-5), bias=True)
    mlp = MLP(r.size("n_inner", None) or 4 * dim, r.activation("activation_function", activation), gated=False, bias=True)
    usual = head_dim**-0.5
    scale = usual if r.flag("scale_attn_weights", True) else 1.0
    by_layer = r.flag("scale_attn_by_inverse_layer_idx", False)
    scales = [scale / (i + 1) if by_layer else scale for i in range(r.count(one_name(r, "n_layer", "num_hidden_layers")))]
    attention = [Attention(heads, 1 if one_kv_head else heads, head_dim, qkv_bias=True, out_bias=True, scale=None if one == usual else one) for one in scales]
    return ModelConfig(
        vocab=r.size("vocab_size"), dim=dim, layers=tuple(Layer(one, mlp, norm, pre_ffn=norm) for one in attention), final_norm=norm,
        tied=r.flag("tie_word_embeddings", True), context=context, positions=context,
    )


def read(r: Reader) -> ModelConfig:
    r.must("attention_head_type", "multihead")           # "multiquery" is SantaCoder's first upload, whose q and kv are two tensors
    return read_model(r, "gelu_new", one_kv_head=False)


def read_bigcode(r: Reader) -> ModelConfig:
    r.must("scale_attn_by_inverse_layer_idx", False)     # it has no such key
    multi_query = r.flag("multi_query", True)
    config = read_model(r, "gelu_pytorch_tanh", multi_query)
    r.must("num_key_value_heads", config.layers[0].mixer.kv_heads)      # written by transformers, which goes by multi_query
    return config


def write_model(config: ModelConfig, model_type: str, architecture: str) -> dict[str, Any]:
    """What the two have in common; a model without a table of positions does not read back."""
    values = write_decoder(config, model_type, architecture, Attention, MLP)
    layer = config.layers[0]
    return values | {
        "n_embd": values.pop("hidden_size"),
        "n_layer": values.pop("num_hidden_layers"),
        "n_head": layer.mixer.heads,
        "n_inner": layer.ffn.hidden,
        "n_positions": config.positions,
        "activation_function": "gelu_new" if layer.ffn.activation == "gelu_tanh" else layer.ffn.activation,
        "layer_norm_epsilon": config.final_norm.eps,
        "scale_attn_weights": layer.mixer.scale is None,
    }


def write(config: ModelConfig) -> dict[str, Any]:
    """The first layer's scale says whether there is one, the others whether it follows the layer; reading back tells about the rest."""
    values = write_model(config, "gpt2", "GPT2LMHeadModel")
    by_layer = len({layer.mixer.scale for layer in config.layers}) > 1
    return values | {"scale_attn_by_inverse_layer_idx": by_layer}


def write_bigcode(config: ModelConfig) -> dict[str, Any]:
    """With as many key/value heads as heads this is GPT-2 in another arrangement: multi_query is then false."""
    values = write_model(config, "gpt_bigcode", "GPTBigCodeForCausalLM")
    return values | {"multi_query": config.layers[0].mixer.kv_heads == 1}


GPT2 = functions("gpt2", read, write, (GPT2_NAMES, stripped(GPT2_NAMES, "transformer.")), MASKS, IRRELEVANT)
GPT_BIGCODE = functions("gpt_bigcode", read_bigcode, write_bigcode, (names(Same, Groups),), MASKS, IRRELEVANT)
FAMILIES = {"gpt2": GPT2, "gpt_bigcode": GPT_BIGCODE}
