"""OLMo-1, OLMo-2 and OLMoE: Llama's block with other norms.

                 before the mixer and the ffn    after them      on q and k                    final
    OLMo-1       LayerNorm with no parameters    –               –                             the same
    OLMo-2       –                               RMS             RMS over all heads at once    RMS
    OLMoE        RMS                             –               RMS over all heads at once    RMS

OLMo-2's norms round to the working dtype after the gain, OLMoE's before it; OLMo-1 and -2 rotate in float32. `clip_qkv` cuts q, k
and v off at ± its value (8.0 in OLMo-1.7-7B and OLMo-1B-0724, null in OLMo-1B and -7B), in OLMoE after the norm. OLMo-1 has no
tensor for its norms and no key for their ε, which is 1e-5. OLMoE: 64 experts, 8 a token, their weights not renormalised. The OLMo-1
uploads whose names do not end in -hf (fused `att_proj`, `ff_proj`, model_type "hf_olmo") are another layout.
"""

import dataclasses
from typing import Any

from checkpoints.families.legacy import functions, read_attention, read_decoder, read_mlp, write_llama_shape
from checkpoints.families.llama import INV_FREQ, LLAMA_NAMES
from checkpoints.names.ops import Stack
from checkpoints.names.reader import Reader
from checkpoints.names.table import override, rule
from nanollm.config import MLP, Attention, Layer, ModelConfig, MoE, Norm

EPS = 1e-5                                               # of OLMo-1's norms, always
OLMOE_CONTEXT = 4096                                     # what a missing max_position_embeddings means

QK_NORM_RULES = (
    rule("model.layers.{i}.self_attn.q_norm", "layers.{i}.mixer.q_norm"),
    rule("model.layers.{i}.self_attn.k_norm", "layers.{i}.mixer.k_norm"),
)
OLMO2_NAMES = override(
    {ours: each for ours, each in LLAMA_NAMES.items() if not ours.endswith((".pre_mixer", ".pre_ffn"))},
    rule("model.layers.{i}.post_attention_layernorm", "layers.{i}.post_mixer"),
    rule("model.layers.{i}.post_feedforward_layernorm", "layers.{i}.post_ffn"),
    *QK_NORM_RULES,
)
OLMOE_NAMES = override(
    LLAMA_NAMES,
    rule("model.layers.{i}.mlp.gate", "layers.{i}.ffn.router"),
    rule("model.layers.{i}.mlp.experts.{e}.gate_proj.weight", "layers.{i}.ffn.experts.gate", Stack),
    rule("model.layers.{i}.mlp.experts.{e}.up_proj.weight", "layers.{i}.ffn.experts.up", Stack),
    rule("model.layers.{i}.mlp.experts.{e}.down_proj.weight", "layers.{i}.ffn.experts.down", Stack),
    *QK_NORM_RULES,
)


def read_olmo_attention(r: Reader, context: int = 2048, qk_norm: Norm | None = None, clip: float | None = None) -> Attention:
    bias = r.flag("attention_bias", False)
    return read_attention(r, context=context, qk_norm=qk_norm, qkv_bias=bias, out_bias=bias, clip=clip)


def rotated_in_float32(attention: Attention) -> Attention:
    return dataclasses.replace(attention, rope=dataclasses.replace(attention.rope, rounds="result"))


def read_olmo(r: Reader) -> ModelConfig:
    norm = Norm("layer", eps=EPS, gain=False)
    attention = rotated_in_float32(read_olmo_attention(r, clip=r.number("clip_qkv", None)))
    layer = Layer(attention, read_mlp(r), pre_mixer=norm, pre_ffn=norm)
    return read_decoder(r, [layer] * r.count("num_hidden_layers"), norm)


def read_olmo2(r: Reader) -> ModelConfig:
    eps = r.number("rms_norm_eps", 1e-5)
    norm, qk_norm = Norm(eps=eps, cast_after_gain=True), Norm(eps=eps, cast_after_gain=True, scope="all")
    attention = rotated_in_float32(read_olmo_attention(r, qk_norm=qk_norm))
    layer = Layer(attention, read_mlp(r), pre_mixer=None, post_mixer=norm, pre_ffn=None, post_ffn=norm)
    return read_decoder(r, [layer] * r.count("num_hidden_layers"), norm)


def read_olmoe(r: Reader) -> ModelConfig:
    """`intermediate_size` is the width of one expert."""
    eps = r.number("rms_norm_eps", 1e-5)
    norm = Norm(eps=eps)
    attention = read_olmo_attention(r, OLMOE_CONTEXT, Norm(eps=eps, scope="all"), r.number("clip_qkv", None))
    if attention.heads * attention.head_dim != r.size("hidden_size"):
        raise r.error("head_dim", "hidden_size / num_attention_heads, which is what the norm of q is as wide as")
    moe = MoE(
        experts=r.count("num_experts", 64),
        top_k=r.size("num_experts_per_tok", 8),
        expert=read_mlp(r),
        renormalize=r.flag("norm_topk_prob", False),
        round_weights=True,
    )
    layer = Layer(attention, moe, pre_mixer=norm, pre_ffn=norm)
    return read_decoder(r, [layer] * r.count("num_hidden_layers"), norm, OLMOE_CONTEXT)


def write_olmo_shape(config: ModelConfig, model_type: str, architecture: str, ffn: type = MLP) -> dict[str, Any]:
    """One switch for the biases of q, k, v and o."""
    values = write_llama_shape(config, model_type, architecture, ffn)
    return values | {"attention_bias": config.layers[0].mixer.out_bias}


def write_olmo(config: ModelConfig) -> dict[str, Any]:
    """Norms with a gain, or of another ε, do not read back."""
    values = write_olmo_shape(config, "olmo", "OlmoForCausalLM")
    del values["rms_norm_eps"]
    return values | {"clip_qkv": config.layers[0].mixer.clip}


def write_olmo2(config: ModelConfig) -> dict[str, Any]:
    return write_olmo_shape(config, "olmo2", "Olmo2ForCausalLM")


def write_olmoe(config: ModelConfig) -> dict[str, Any]:
    """A shared expert, or weights that are not rounded, do not read back."""
    values = write_olmo_shape(config, "olmoe", "OlmoeForCausalLM", MoE)
    layer = config.layers[0]
    return values | {
        "clip_qkv": layer.mixer.clip,
        "num_experts": layer.ffn.experts,
        "num_experts_per_tok": layer.ffn.top_k,
        "norm_topk_prob": layer.ffn.renormalize,
    }


# some fine-tuned OLMo-1 carry Llama's key for ε, which their norms do not read
OLMO = functions("olmo", read_olmo, write_olmo, (LLAMA_NAMES,), INV_FREQ, irrelevant=frozenset({"rms_norm_eps"}))
OLMO2 = functions("olmo2", read_olmo2, write_olmo2, (OLMO2_NAMES,), INV_FREQ)
OLMOE = functions("olmoe", read_olmoe, write_olmoe, (OLMOE_NAMES,), INV_FREQ)
FAMILIES = {"olmo": OLMO, "olmo2": OLMO2, "olmoe": OLMOE}
