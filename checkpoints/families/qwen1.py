"""Qwen, the first: Llama with biases on q, k and v, and two ways of reading past the context that it was trained for. 1.8B, 7B, 14B, 72B.

    RoPE     θ grows in steps: α = 1, 3, 7, … for sequences up to seq_length, twice, four times as long        use_dynamic_ntk
    log n    the query of the n-th token is multiplied by log n / log seq_length, if that is more than 1        use_logn_attn

The 72B has neither, and theta 1e6. On disk w2 is the gate and w1 the up projection, and either is *half* as wide as the config says.

There are two layouts of config.json: that of August 2023 (n_embd, n_layer, n_head, ffn_hidden_size, n_positions) and that of a
month later (hidden_size, …, as transformers has them). They differ in what missing keys mean, too.

α follows from the length of the sequence. The published code takes that of the prompt, and keeps α while it generates, so what it
says depends on where a prompt ended; here it is always the length of the sequence that is read (nanollm/layers/scaling.py).
"""

from typing import Any

from checkpoints.families.legacy import functions, write_decoder
from checkpoints.names.ops import Blocks
from checkpoints.names.reader import Reader
from checkpoints.names.table import override, rule
from nanollm.config import MLP, Attention, Layer, ModelConfig, Norm, Rope, SteppedNTK
from nanollm.errors import ConfigError

# for each layout: the keys of the sizes, and what is meant by keys that are missing
FIRST = dict(dim="n_embd", layers="n_layer", heads="n_head", hidden="ffn_hidden_size", context="n_positions", eps=1e-5, stretched=False)
SECOND = dict(dim="hidden_size", layers="num_hidden_layers", heads="num_attention_heads", hidden="intermediate_size",
              context="max_position_embeddings", eps=1e-6, stretched=True)

QWEN1_NAMES = override(
    {},
    rule("transformer.wte", "embed"),
    rule("transformer.h.{i}.ln_1", "layers.{i}.pre_mixer"),
    rule("transformer.h.{i}.attn.c_attn", ["layers.{i}.mixer.q", "layers.{i}.mixer.k", "layers.{i}.mixer.v"], Blocks),
    rule("transformer.h.{i}.attn.c_proj", "layers.{i}.mixer.o"),
    rule("transformer.h.{i}.ln_2", "layers.{i}.pre_ffn"),
    rule("transformer.h.{i}.mlp.w2", "layers.{i}.ffn.gate"),
    rule("transformer.h.{i}.mlp.w1", "layers.{i}.ffn.up"),
    rule("transformer.h.{i}.mlp.c_proj", "layers.{i}.ffn.down"),
    rule("transformer.ln_f", "norm"),
    rule("lm_head", "head"),
)


def read(r: Reader) -> ModelConfig:
    """Either layout; n_embd is in the first alone."""
    layout = FIRST if "n_embd" in r.values else SECOND
    for key, only in (("no_bias", True), ("rotary_pct", 1.0), ("pos_emb", "rotary"), ("activation", "swiglu"), ("scale_attn_weights", True),
                      ("apply_residual_connection_post_layernorm", False), ("n_inner", None), ("use_cache_quantization", False)):
        r.must(key, only)
    theta, vocab = r.number("rotary_emb_base", 10_000.0, above=1), r.size("vocab_size")
    r.must("rope_theta", theta)                          # said twice in the 72B
    r.must("padded_vocab_size", vocab)
    steps, logn = (r.flag(key, layout["stretched"]) for key in ("use_dynamic_ntk", "use_logn_attn"))
    original = r.size("seq_length") if steps or logn else r.size("seq_length", None)
    dim, heads, head_dim, width = r.size(layout["dim"]), r.size(layout["heads"]), r.size("kv_channels", 128), r.size(layout["hidden"], 22016)
    if heads * head_dim != dim:
        raise r.error("kv_channels", f"{layout['dim']} / {layout['heads']}, which is {dim} / {heads}")
    if width % 2:
        raise r.error(layout["hidden"], "an even number, of which a half is the width of the MLP")
    rope = Rope(theta, scaling=SteppedNTK(original) if steps else None)
    attention = Attention(heads, heads, head_dim, rope, qkv_bias=True, logn=original if logn else None)
    norm = Norm(eps=r.number("layer_norm_epsilon", layout["eps"]))
    return ModelConfig(
        vocab=vocab,
        dim=dim,
        layers=(Layer(attention, MLP(width // 2), pre_mixer=norm, pre_ffn=norm),) * r.count(layout["layers"]),
        final_norm=norm,
        tied=r.flag("tie_word_embeddings", False),
        context=r.size(layout["context"], 8192),
    )


def write(config: ModelConfig) -> dict[str, Any]:
    """The second layout. A stretch and log n with different contexts do not read back."""
    base = write_decoder(config, "qwen", "QWenLMHeadModel", Attention, MLP)
    attention = config.layers[0].mixer
    if attention.rope is None:
        raise ConfigError("layers[0].mixer.rope is None")
    steps = isinstance(attention.rope.scaling, SteppedNTK)
    return base | {
        "num_attention_heads": attention.heads,
        "kv_channels": attention.head_dim,
        "intermediate_size": 2 * config.layers[0].ffn.hidden,
        "layer_norm_epsilon": config.final_norm.eps,
        "max_position_embeddings": config.context,
        "seq_length": attention.rope.scaling.original if steps else attention.logn or config.context,
        "use_dynamic_ntk": steps,
        "use_logn_attn": attention.logn is not None,
        "rotary_emb_base": attention.rope.theta,
        "rotary_pct": 1.0,
        "no_bias": True,
        "scale_attn_weights": True,
    }


QWEN1 = functions(
    "qwen", read, write, (QWEN1_NAMES,), frozenset({"transformer.h.{i}.attn.rotary_emb.inv_freq", "transformer.rotary_emb.inv_freq"}),
    irrelevant=frozenset("attn_pdrop bf16 bias_dropout_fusion emb_dropout_prob fp16 fp32 onnx_safe params_dtype softmax_in_fp32 tokenizer_type "
                         "use_cache_kernel use_flash_attn".split()),
)
FAMILIES = {"qwen": QWEN1}
