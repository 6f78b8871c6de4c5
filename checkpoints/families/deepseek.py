"""DeepSeekMoE-16B, DeepSeek-V2 and V2-Lite, DeepSeek-V3 and R1.

    model_type     attention        scores     experts chosen                        weights                    block
    deepseek       Llama's          softmax    the k best                            as they are                Llama's
    deepseek_v2    latent           softmax    the k best; of the best groups        × routed_scaling_factor
                                               ("group_limited_greedy")
    deepseek_v3    latent           sigmoid    the k best of the best groups, with   renormalised,
                                               a learned correction ("noaux_tc")     × routed_scaling_factor

The first `first_k_dense_replace` layers have an MLP of `intermediate_size`, the others many small experts and `n_shared_experts` that every
token visits, stored as one MLP of that many times the width. Latent attention: nanollm/layers/latent_attention.py; its two inner norms have
ε 1e-6 whatever `rms_norm_eps` is. The rotated part is interleaved (V3: unless `rope_interleave` is false), in V2 in float32. YaRN has two temperatures:
cos and sin times t(mscale) / t(mscale_all_dim), as in rope.py, and the scores times t(mscale_all_dim)².

Where the published code and transformers part:
- V2 with `norm_topk_prob` true, which no checkpoint has: published, renormalised weights are not scaled; transformers 5.23 ignores the
  key. This follows the published code.
- V3's experts outside the kept groups count as −∞ in transformers and in later copies of the published file, and as 0 in its first,
  which differs only where a kept expert's corrected score is below 0. This takes −∞.

V3 has one more layer on disk, number 61, which predicts the token after the next; it is left out, and the load says so. Its weights are
8-bit with a scale for each block of 128 × 128: checkpoints/storage/quantized.py. Moonlight and Kimi-K2 are V3 in other numbers.
"""

import dataclasses
import math
from typing import Any

from checkpoints.families.legacy import (
    all_routed,
    dense_width,
    first_routed,
    functions,
    read_attention,
    read_decoder,
    read_mlp,
    write_decoder,
    write_llama_shape,
)
from checkpoints.families.llama import INV_FREQ, LLAMA_NAMES
from checkpoints.families.qwen_moe import with_experts
from checkpoints.names.reader import ACTIVATIONS, Reader
from checkpoints.names.rope import read_rope, temperature, write_rope
from checkpoints.names.table import Rule, override, rule
from nanollm.config import MLP, Attention, ExpertGroups, LatentAttention, Layer, ModelConfig, MoE, Norm, Rope, Yarn
from nanollm.errors import ConfigError

SHARED: tuple[Rule, ...] = tuple(
    rule(f"model.layers.{{i}}.mlp.shared_experts.{name}_proj", f"layers.{{i}}.ffn.shared.{name}") for name in ("gate", "up", "down"))
LATENT_NAMES = override(
    {ours: each for ours, each in LLAMA_NAMES.items() if not ours.endswith((".k", ".v"))},        # q is V2-Lite's
    rule("model.layers.{i}.self_attn.q_a_proj", "layers.{i}.mixer.q_down"),
    rule("model.layers.{i}.self_attn.q_a_layernorm", "layers.{i}.mixer.q_norm"),
    rule("model.layers.{i}.self_attn.q_b_proj", "layers.{i}.mixer.q_up"),
    rule("model.layers.{i}.self_attn.kv_a_proj_with_mqa", "layers.{i}.mixer.kv_down"),
    rule("model.layers.{i}.self_attn.kv_a_layernorm", "layers.{i}.mixer.kv_norm"),
    rule("model.layers.{i}.self_attn.kv_b_proj", "layers.{i}.mixer.kv_up"),
)
CORRECTION = rule("model.layers.{i}.mlp.gate.e_score_correction_bias", "layers.{i}.ffn.router.correction")
TRAINING = frozenset({"aux_loss_alpha", "seq_aux", "ep_size"})


# ---- reading

def read_layers(r: Reader, mixer: Attention | LatentAttention, moe: MoE, norm: Norm, first: int, every: int = 1) -> list[Layer]:
    """`first`: what a missing first_k_dense_replace means; experts only in every `every`-th layer."""
    mlp, first = read_mlp(r), r.get("first_k_dense_replace", first)
    if type(first) is not int or first < 0:
        raise r.error("first_k_dense_replace", "a whole number")
    return [Layer(mixer, moe if i >= first and i % every == 0 else mlp, norm, pre_ffn=norm) for i in range(r.count("num_hidden_layers"))]


def read_experts(r: Reader, experts: int, width: int, shared: int, **more: Any) -> MoE:
    """The numbers are the family's defaults."""
    activation, width = r.activation("hidden_act", "silu"), r.size("moe_intermediate_size", width)
    shared = r.size("n_shared_experts", shared, or_null=True)
    return MoE(r.count("n_routed_experts", experts), expert=MLP(width, activation), shared=MLP(shared * width, activation) if shared else None, **more)


def read_latent(r: Reader, context: int, layout: str, rounds: str) -> LatentAttention:
    """`context`: what a missing max_position_embeddings means; `layout` and `rounds` as Rope has them."""
    heads, nope, rope_dim = r.size("num_attention_heads"), r.size("qk_nope_head_dim", 128), r.size("qk_rope_head_dim", 64)
    r.must("num_key_value_heads", heads, None)           # keys are not shared by heads here, and the key says nothing
    r.must("attention_bias", False)
    r.must("head_dim", rope_dim)                         # what transformers writes
    r.must("qk_head_dim", nope + rope_dim)
    rope = dataclasses.replace(read_rope(r, 10_000.0, r.size("max_position_embeddings", context), layout=layout), rounds=rounds)
    inner = r.inside("rope_scaling") or r.inside("rope_parameters")
    mscale = inner.number("mscale_all_dim", None, above=-1) if rope.scaling and inner else None
    return LatentAttention(
        heads, nope, rope_dim,
        value=r.size("v_head_dim", 128),
        kv_rank=r.size("kv_lora_rank", 512),
        q_rank=r.size("q_lora_rank", 1536, or_null=True),
        rope=rope,
        scale=tempered(nope + rope_dim, rope, mscale) if mscale else None,
    )


def tempered(width: int, rope: Rope, mscale: float) -> float:
    """The scale of the scores: 1/√width, and YaRN's temperature twice."""
    return width**-0.5 * temperature(rope.scaling.factor, mscale) ** 2


def read_groups(r: Reader, count: int | None, kept: int | None, best: int) -> ExpertGroups | None:
    """The numbers are the family's defaults. One group is none."""
    count, kept = r.size("n_group", count, or_null=True) or 1, r.size("topk_group", kept, or_null=True) or 1
    return ExpertGroups(count, kept, best) if count > 1 else None


def read_v1(r: Reader) -> ModelConfig:
    norm, bias = Norm(eps=r.number("rms_norm_eps", 1e-6)), r.flag("attention_bias", False)
    r.must("scoring_func", "softmax")
    moe = read_experts(r, 64, 1407, 2, top_k=r.size("num_experts_per_tok"), renormalize=r.flag("norm_topk_prob", False), round_weights=True)
    layers = read_layers(r, read_attention(r, qkv_bias=bias, out_bias=bias), moe, norm, 0, r.size("moe_layer_freq", 1))
    return read_decoder(r, layers, norm)


def read_v2(r: Reader) -> ModelConfig:
    """Renormalised weights are not scaled, as the head of the file says."""
    norm = Norm(eps=r.number("rms_norm_eps", 1e-6))
    r.must("scoring_func", "softmax")
    r.must("moe_layer_freq", 1)
    r.must("mlp_bias", False)
    grouped = r.must("topk_method", "greedy", "group_limited_greedy") != "greedy"
    groups, scale, renormalize = read_groups(r, None, None, 1), r.number("routed_scaling_factor", 1.0), r.flag("norm_topk_prob", False)
    moe = read_experts(r, 64, 1407, 2, top_k=r.size("num_experts_per_tok"), renormalize=renormalize, groups=groups if grouped else None,
                       scale=1.0 if renormalize else scale, router_float32=True)
    return read_decoder(r, read_layers(r, read_latent(r, 2048, "interleaved", "result"), moe, norm, 0), norm, 2048)


def read_v3(r: Reader) -> ModelConfig:
    """A half layout of the rotated part is transformers' own."""
    norm = Norm(eps=r.number("rms_norm_eps", 1e-6))
    r.must("scoring_func", "sigmoid")
    r.must("topk_method", "noaux_tc")
    r.must("moe_layer_freq", 1)
    layout = "interleaved" if r.flag("rope_interleave", True) else "half"
    top_k, renormalize, scale = r.size("num_experts_per_tok", 8), r.flag("norm_topk_prob", True), r.number("routed_scaling_factor", 2.5)
    moe = read_experts(r, 256, 2048, 1, top_k=top_k, renormalize=renormalize, score="sigmoid", correction=True, groups=read_groups(r, 8, 4, 2),
                       scale=scale, router_float32=True)
    return read_decoder(r, read_layers(r, read_latent(r, 4096, layout, "each"), moe, norm, 3), norm, 4096)


# ---- writing

def write_experts(config: ModelConfig) -> dict[str, Any]:
    """What all three write of the feed-forwards."""
    moe = first_routed(config).ffn
    return {
        "intermediate_size": dense_width(config),
        "first_k_dense_replace": config.layers.index(first_routed(config)),
        "moe_intermediate_size": moe.expert.hidden,
        "n_routed_experts": moe.experts,
        "n_shared_experts": moe.shared.hidden // moe.expert.hidden if moe.shared else None,
        "num_experts_per_tok": moe.top_k,
        "norm_topk_prob": moe.renormalize,
    }


def write_v1(config: ModelConfig) -> dict[str, Any]:
    base = write_llama_shape(all_routed(config), "deepseek", "DeepseekForCausalLM", MoE)
    routed = [i for i, layer in enumerate(config.layers) if isinstance(layer.ffn, MoE)]
    every = routed[1] - routed[0] if len(routed) > 1 else 1
    return base | write_experts(config) | {"moe_layer_freq": every, "attention_bias": first_routed(config).mixer.out_bias, "scoring_func": "softmax"}


def write_latent(config: ModelConfig, model_type: str, architecture: str) -> dict[str, Any]:
    """What V2 and V3 both write, from the first layer that has experts; reading it back tells whether that was enough."""
    layer = first_routed(config)
    base, mixer = write_decoder(config, model_type, architecture, LatentAttention, object), layer.mixer
    activations = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    return base | write_experts(config) | write_tempered(mixer) | {
        "num_attention_heads": mixer.heads,
        "num_key_value_heads": mixer.heads,
        "qk_nope_head_dim": mixer.nope,
        "qk_rope_head_dim": mixer.rope_dim,
        "v_head_dim": mixer.value,
        "kv_lora_rank": mixer.kv_rank,
        "q_lora_rank": mixer.q_rank,
        "hidden_act": activations[layer.ffn.expert.activation],
        "rms_norm_eps": config.final_norm.eps,
        "max_position_embeddings": config.context,
        "n_group": layer.ffn.groups.count if layer.ffn.groups else 1,
        "topk_group": layer.ffn.groups.kept if layer.ffn.groups else 1,
        "routed_scaling_factor": layer.ffn.scale,
    }


def write_tempered(mixer: LatentAttention) -> dict[str, Any]:
    """RoPE in both dialects; a scale that is not 1/√width as YaRN's two temperatures."""
    values = write_rope(mixer.rope)
    if mixer.scale is None:
        return values
    if not isinstance(mixer.rope.scaling, Yarn) or mixer.rope.scaling.factor <= 1:
        raise ConfigError("a scale of the scores is known here with YaRN only")
    factor, width, own = mixer.rope.scaling.factor, mixer.nope + mixer.rope_dim, mixer.rope.scaling.attention_factor
    all_dim = solved(lambda m: tempered(width, mixer.rope, m), mixer.scale, math.sqrt(mixer.scale * math.sqrt(width)), factor)
    shared = temperature(factor, all_dim)
    mscale = solved(lambda m: temperature(factor, m) / shared, own, own * shared, factor) if own is not None else None
    for each in (values["rope_scaling"], values["rope_parameters"]):
        each.pop("attention_factor", None)
        each |= {"mscale": mscale, "mscale_all_dim": all_dim}
    return values


def solved(function: Any, wanted: float, heat: float, factor: float) -> float:
    """The roundest m with function(m) exactly `wanted`, where temperature(factor, m) is `heat` but for rounding."""
    m = (heat - 1) / (0.1 * math.log(factor))
    found = next((round(m, digits) for digits in range(1, 18) if function(round(m, digits)) == wanted), None)
    if found is None:
        raise ConfigError(f"no mscale is exactly a temperature of {heat:g}")
    return found


def write_v2(config: ModelConfig) -> dict[str, Any]:
    values = write_latent(config, "deepseek_v2", "DeepseekV2ForCausalLM")
    return values | {"topk_method": "greedy" if values["n_group"] == 1 else "group_limited_greedy"}


def write_v3(config: ModelConfig) -> dict[str, Any]:
    layout = first_routed(config).mixer
    values = write_latent(config, "deepseek_v3", "DeepseekV3ForCausalLM")
    return values | {"rope_interleave": layout.rope.layout == "interleaved", "scoring_func": "sigmoid", "topk_method": "noaux_tc"}


DEEPSEEK = functions("deepseek", read_v1, write_v1, with_experts(LLAMA_NAMES, *SHARED), INV_FREQ, TRAINING)
DEEPSEEK_V2 = functions("deepseek_v2", read_v2, write_v2, with_experts(LATENT_NAMES, *SHARED), INV_FREQ, TRAINING)
DEEPSEEK_V3 = functions("deepseek_v3", read_v3, write_v3, with_experts(LATENT_NAMES, CORRECTION, *SHARED), INV_FREQ,
                     TRAINING | {"num_nextn_predict_layers"}, ahead="model.layers.{i}.eh_proj.weight")
FAMILIES = {"deepseek": DEEPSEEK, "deepseek_v2": DEEPSEEK_V2, "deepseek_v3": DEEPSEEK_V3}
