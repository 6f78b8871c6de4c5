"""gpt-oss: 20b and 120b.

Llama's block with biases on q, k, v and o, and three things of its own:

    sinks      a learned score a head, in every softmax, that adds nothing: a head can look at nothing (nanollm/layers/attention.py)
    windows    every other layer sees 128 tokens, the first one included; the others see all. YaRN, whose ramp has open ends
    experts    32 or 128, 4 a token, with biases and a clipped gate (ClippedExperts in nanollm/layers/moe.py); the router has a bias too, and its
               softmax is over the chosen ones, which is that over all, renormalised

Norms round to the working dtype after the gain, and the chosen weights are rounded to it. `hidden_act` is not read by the published code:
the gate is always x·σ(1.702 x). On disk the experts of a layer are one tensor, transposed, columns gate up gate up …, and in the
published folders those two matrices are 4-bit (MXFP4): checkpoints/storage/quantized.py makes bfloat16 of them as they are read.
"""

import dataclasses
from typing import Any

from checkpoints.families.legacy import functions, read_decoder, write_llama_shape
from checkpoints.families.llama import INV_FREQ, LLAMA_NAMES
from checkpoints.names.expert_ops import Interleaved, Turned
from checkpoints.names.reader import Reader
from checkpoints.names.rope import read_rope
from checkpoints.names.table import override, rule
from nanollm.config import MLP, Attention, ClippedGLU, Layer, ModelConfig, MoE, Norm, Rope, Yarn
from nanollm.errors import ConfigError

CONTEXT = 131_072                                        # what a missing max_position_embeddings means
THETA = 150_000.0

GPT_OSS_NAMES = override(
    LLAMA_NAMES,
    rule("model.layers.{i}.self_attn.sinks", "layers.{i}.mixer.sinks"),
    rule("model.layers.{i}.mlp.router", "layers.{i}.ffn.router"),
    rule("model.layers.{i}.mlp.experts.gate_up_proj", ["layers.{i}.ffn.experts.gate", "layers.{i}.ffn.experts.up"], Interleaved),
    rule("model.layers.{i}.mlp.experts.gate_up_proj_bias", ["layers.{i}.ffn.experts.gate_bias", "layers.{i}.ffn.experts.up_bias"], Interleaved),
    rule("model.layers.{i}.mlp.experts.down_proj", "layers.{i}.ffn.experts.down", Turned),
    rule("model.layers.{i}.mlp.experts.down_proj_bias", "layers.{i}.ffn.experts.down_bias"),
)


def read_windows(r: Reader) -> list[int | None]:
    """The window of each layer."""
    count, window = r.count("num_hidden_layers"), r.size("sliding_window", 128)
    types = r.get("layer_types", None)
    if types is None:
        types = ["full_attention" if i % 2 else "sliding_attention" for i in range(count)]
    if not isinstance(types, list) or len(types) != count or not all(one in ("full_attention", "sliding_attention") for one in types):
        raise r.error("layer_types", f"{count} times full_attention or sliding_attention")
    return [window if one == "sliding_attention" else None for one in types]


def read_open_yarn(r: Reader) -> Rope:
    """A config that says nothing of scaling means YaRN all the same."""
    rope = read_rope(r, THETA, r.size("max_position_embeddings", CONTEXT))
    said = r.get("rope_scaling", None) or r.get("rope_parameters", None)
    return rope if said else dataclasses.replace(rope, scaling=Yarn(32.0, 4096, truncate=False))


def read(r: Reader) -> ModelConfig:
    """Layers differ in their window only."""
    norm = Norm(eps=r.number("rms_norm_eps", 1e-5), cast_after_gain=True)
    bias, top_k = r.flag("attention_bias", True), r.size("num_experts_per_tok", 4)
    shape = r.size("num_attention_heads", 64), r.size("num_key_value_heads", 8), r.size("head_dim", 64), read_open_yarn(r)
    r.must("experts_per_token", top_k)                   # the same again, in the published configs
    r.must("hidden_act", "silu")
    moe = MoE(
        experts=r.count("num_local_experts", 128),
        top_k=top_k,
        expert=ClippedGLU(r.size("intermediate_size", 2880), r.number("swiglu_alpha", 1.702), r.number("swiglu_limit", 7.0)),
        renormalize=True,
        router_bias=True,
        round_weights=True,
    )
    attentions = [Attention(*shape, window, qkv_bias=bias, out_bias=bias, sinks=True) for window in read_windows(r)]
    return read_decoder(r, [Layer(attention, moe, norm, pre_ffn=norm) for attention in attentions], norm, CONTEXT)


def write(config: ModelConfig) -> dict[str, Any]:
    """From the first layer; reading it back tells whether that was enough."""
    layer, ffn = config.layers[0], config.layers[0].ffn
    if not isinstance(ffn, MoE) or not isinstance(ffn.expert, ClippedGLU):
        raise ConfigError("layers[0].ffn has no clipped experts")
    plain = dataclasses.replace(ffn, expert=MLP(ffn.expert.hidden))      # whose width and activation are written
    uniform = dataclasses.replace(config, layers=(dataclasses.replace(layer, ffn=plain),) * len(config.layers))
    windows = [getattr(each.mixer, "window", None) for each in config.layers]
    return write_llama_shape(uniform, "gpt_oss", "GptOssForCausalLM", MoE) | {
        "attention_bias": layer.mixer.out_bias,
        "num_local_experts": ffn.experts,
        "num_experts_per_tok": ffn.top_k,
        "swiglu_alpha": ffn.expert.slope,
        "swiglu_limit": ffn.expert.limit,
        "sliding_window": next((window for window in windows if window), 128),
        "layer_types": ["full_attention" if window is None else "sliding_attention" for window in windows],
    }


GPT_OSS = functions("gpt_oss", read, write, (GPT_OSS_NAMES,), INV_FREQ, frozenset({"initial_context_length"}))
FAMILIES = {"gpt_oss": GPT_OSS}
