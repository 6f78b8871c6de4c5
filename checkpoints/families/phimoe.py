"""Phi-3.5-MoE: 16 experts, 2 a token, and a router that weighs each of the two by itself.

    norms      LayerNorm with bias; `rms_norm_eps` is their ε all the same
    biases     on q, k, v and o (`attention_bias`), and on the head (`lm_head_bias`)
    router     SparseMixer, `sparse_route` in nanollm/layers/moe.py, with ε = `router_jitter_noise`: at inference there is no noise, but ε decides
               which experts come near the best. The rounded weights of the two need not add up to 1
    RoPE       LongRoPE with its temperature given, once for short sequences and once for long ones, and the same in the published config

Expert names are Mixtral's. transformers 5.23 takes the short list of divisors whatever the length; the published code, and this, the long
one for sequences beyond the original context. In training the published code draws the experts; see `sparse_route`.
"""

import dataclasses
from typing import Any

from checkpoints.families.legacy import functions, read_decoder, read_mlp, write_llama_shape
from checkpoints.families.llama import INV_FREQ
from checkpoints.families.mixtral import MIXTRAL_NAMES
from checkpoints.names.reader import Reader
from checkpoints.names.rope import read_rope, write_rope
from nanollm.config import Attention, Layer, LongRope, ModelConfig, MoE, Norm, Rope

CONTEXT = 131_072                                        # what a missing max_position_embeddings means
THETA = 1_000_000.0
MSCALES = ("short_mscale", "long_mscale")


def read_long_rope(r: Reader) -> Rope:
    """None, or LongRoPE with its temperatures, which must be one."""
    values = dict(r.values)
    for key in ("rope_scaling", "rope_parameters"):
        inner = r.inside(key)
        if inner is None or inner.get("rope_type", inner.get("type", "default")) == "default":
            continue
        kind = "rope_type" if "rope_type" in inner.values else "type"
        inner.must(kind, "longrope")
        short, long = map(inner.number, MSCALES)
        if short != long:
            raise inner.error("long_mscale", f"short_mscale ({short}): two temperatures are not implemented")
        values[key] = {name: value for name, value in inner.values.items() if name not in MSCALES} | {"attention_factor": short}
    plain = Reader(values, r.where, r.ignore, r.most)    # as other families say it
    original = plain.size("original_max_position_embeddings", None)
    rope = read_rope(plain, THETA, r.size("max_position_embeddings", CONTEXT), original=original)
    r.seen |= plain.seen
    return rope


def read(r: Reader) -> ModelConfig:
    """All layers are alike."""
    norm = Norm("layer", eps=r.number("rms_norm_eps", 1e-5), bias=True)
    bias, dim, heads = r.flag("attention_bias", False), r.size("hidden_size"), r.size("num_attention_heads", 32)
    if dim % heads:
        raise r.error("num_attention_heads", f"a divisor of hidden_size ({dim})")
    head_dim = r.size("head_dim", None) or dim // heads
    attention = Attention(heads, r.size("num_key_value_heads", 8, or_null=True) or heads, head_dim, read_long_rope(r),
                          r.size("sliding_window", None), qkv_bias=bias, out_bias=bias)
    moe = MoE(
        experts=r.count("num_local_experts", 16),
        top_k=r.must("num_experts_per_tok", 2),
        expert=read_mlp(r),
        renormalize=False,
        sparse=r.number("router_jitter_noise", 0.01),
        round_weights=True,
    )
    model = read_decoder(r, [Layer(attention, moe, norm, pre_ffn=norm)] * r.count("num_hidden_layers"), norm, CONTEXT)
    return dataclasses.replace(model, head_bias=r.flag("lm_head_bias", False))


def write(config: ModelConfig) -> dict[str, Any]:
    """From the first layer; a router of another kind, or norms without bias, do not read back."""
    values, layer = write_llama_shape(config, "phimoe", "PhimoeForCausalLM", MoE), config.layers[0]
    ropes = write_rope(layer.mixer.rope)
    if isinstance(layer.mixer.rope.scaling, LongRope):
        for each in (ropes["rope_scaling"], ropes["rope_parameters"]):
            each |= dict.fromkeys(MSCALES, each.pop("attention_factor"))
        values["original_max_position_embeddings"] = layer.mixer.rope.scaling.original
    return values | ropes | {
        "attention_bias": layer.mixer.out_bias,
        "lm_head_bias": config.head_bias,
        "sliding_window": layer.mixer.window,
        "num_local_experts": layer.ffn.experts,
        "num_experts_per_tok": layer.ffn.top_k,
        "router_jitter_noise": layer.ffn.sparse,
    }


PHIMOE = functions("phimoe", read, write, (MIXTRAL_NAMES,), INV_FREQ, frozenset({"input_jitter_noise"}))
FAMILIES = {"phimoe": PHIMOE}
