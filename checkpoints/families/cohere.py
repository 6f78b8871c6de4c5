"""Cohere's Command-R, Aya (cohere) and Command-R7B, Command-A (cohere2): one norm, and attention and feed-forward beside each other.

    x += o(attention(h)) + down(silu(gate(h)) · up(h)),  h = norm(x)       LayerNorm with a gain and no bias; no bias anywhere
    logits = s · E h                                                       tied; s = logit_scale

    Command-R, Aya       RoPE in the interleaved layout, base 8e6 or 4e6; s = 1/16
    Command-R+           every head of q and k has a LayerNorm, with a gain of its own; base 7.5e7; s = 0.8333
    Command-R7B, -A      three layers slide (4096) and rotate, the fourth sees everything and does not rotate; base 5e4; s = 1/4

The rotation is computed in float32, from tables that were rounded, and rounded once more.
"""

import dataclasses
from typing import Any

from checkpoints.families.gemma import read_sliding, write_sliding
from checkpoints.families.legacy import functions, read_attention, read_mlp, write_llama_shape
from checkpoints.families.llama import INV_FREQ, LLAMA_NAMES
from checkpoints.families.qwen import QWEN3_NAMES
from checkpoints.names.reader import Reader
from nanollm.config import Attention, Layer, ModelConfig, Norm

CONTEXT = 8192                                           # what a missing max_position_embeddings means


def read_interleaved(r: Reader, theta: float) -> Attention:
    bias = r.flag("attention_bias", False)
    attention = read_attention(r, theta, CONTEXT, qkv_bias=bias, out_bias=bias)
    r.must("head_dim", None, r.size("hidden_size") // attention.heads)
    return dataclasses.replace(attention, rope=dataclasses.replace(attention.rope, layout="interleaved", rounds="tables"))


def read_decoder(r: Reader, attentions: list[Attention], norm: Norm) -> ModelConfig:
    """What the two families share: all but the attention."""
    mlp = read_mlp(r)
    return ModelConfig(
        vocab=r.size("vocab_size"),
        dim=r.size("hidden_size"),
        layers=tuple(Layer(attention, mlp, pre_mixer=norm, pre_ffn=None, parallel=True) for attention in attentions),
        final_norm=norm,
        tied=r.flag("tie_word_embeddings", True),
        context=r.size("max_position_embeddings", CONTEXT),
        head_scale=r.number("logit_scale", 0.0625),
    )


def read_norm(r: Reader) -> Norm:
    return Norm("layer", eps=r.number("layer_norm_eps", 1e-5))


def read_cohere(r: Reader) -> ModelConfig:
    norm = read_norm(r)
    qk_norm = dataclasses.replace(norm, scope="each") if r.flag("use_qk_norm", False) else None
    attention = dataclasses.replace(read_interleaved(r, 500_000.0), qk_norm=qk_norm)
    return read_decoder(r, [attention] * r.count("num_hidden_layers"), norm)


def read_cohere2(r: Reader) -> ModelConfig:
    """Layers that slide rotate, the others do neither."""
    attention, period = read_interleaved(r, 10_000.0), r.size("sliding_window_pattern", 4)
    attentions = [dataclasses.replace(attention, window=window, rope=attention.rope if window else None) for window in read_sliding(r, period)]
    config = read_decoder(r, attentions, read_norm(r))
    for key, value in (                                  # the hub's configs also say in words what the class always does
        ("layer_switch", period), ("order_of_interleaved_layers", "local_attn_first"), ("position_embedding_type", "rope_gptj"),
        ("rotary_pct", 1.0), ("use_parallel_block", True), ("use_gated_activation", True), ("use_qk_norm", False),
        ("use_embedding_sharing", config.tied),
    ):
        r.must(key, value)
    return config


def write_cohere(config: ModelConfig) -> dict[str, Any]:
    """RoPE in the half layout, or two norms, do not read back."""
    values = write_llama_shape(config, "cohere", "CohereForCausalLM")
    attention = config.layers[0].mixer
    return values | {
        "layer_norm_eps": values.pop("rms_norm_eps"),
        "attention_bias": attention.out_bias,
        "use_qk_norm": attention.qk_norm is not None,
        "logit_scale": config.head_scale,
    }


def write_cohere2(config: ModelConfig) -> dict[str, Any]:
    """The first layer must rotate."""
    values = write_cohere(config) | write_sliding(config)
    period = [*(layer.mixer.window for layer in config.layers), None].index(None) + 1
    return values | {"architectures": ["Cohere2ForCausalLM"], "model_type": "cohere2", "sliding_window_pattern": period}


COHERE = functions("cohere", read_cohere, write_cohere, (QWEN3_NAMES,), INV_FREQ, frozenset({"model_max_length"}))
COHERE2 = functions(
    "cohere2", read_cohere2, write_cohere2, (LLAMA_NAMES,), INV_FREQ,
    irrelevant=frozenset({"_sliding_window_pattern", "cache_implementation", "model_max_length", "use_parallel_embedding"}),
)
FAMILIES = {"cohere": COHERE, "cohere2": COHERE2}
