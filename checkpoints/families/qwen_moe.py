"""Qwen1.5-MoE, Qwen2-57B-A14B and Qwen3-MoE: Qwen2's and Qwen3's block with experts in place of the MLP.

    qwen2_moe    bias on q, k and v (`qkv_bias`); softmax over all experts, the chosen weights as they are; a shared expert, of a width of
                 its own, times σ(w·x). A2.7B: 60 experts, 4 a token
    qwen3_moe    RMS norm on every query and key head, no shared expert, the chosen weights renormalised (`norm_topk_prob`, which is
                 false where it is missing). 30B-A3B and 235B-A22B: 128 experts, 8 a token

Layer i has experts unless `mlp_only_layers` names it or i + 1 is no multiple of `decoder_sparse_step`; then it has an MLP of
`intermediate_size`. The chosen weights are rounded to the working dtype.

`use_sliding_window` is false wherever it was published. If it were true, all layers of a qwen3_moe would slide, and in a qwen2_moe
without `layer_types` every other one of the first `max_window_layers`: not the last ones, as in qwen2. transformers 5 writes
Qwen3's `num_experts` as `num_local_experts`.
"""

import dataclasses
from typing import Any

from checkpoints.families.family import Family
from checkpoints.families.llama import INV_FREQ, LLAMA_NAMES, read_attention, read_decoder, write_llama_shape
from checkpoints.families.qwen import QWEN3_NAMES
from checkpoints.names.expert_ops import GateUp
from checkpoints.names.ops import Stack
from checkpoints.names.reader import Reader
from checkpoints.names.table import Rule, Table, override, rule
from nanollm.config import MLP, Layer, ModelConfig, MoE, Norm
from nanollm.errors import ConfigError

CONTEXT = 32768                                          # what a missing max_position_embeddings means

ROUTER = rule("model.layers.{i}.mlp.gate", "layers.{i}.ffn.router")
EACH_EXPERT: tuple[Rule, ...] = (ROUTER, *(
    rule(f"model.layers.{{i}}.mlp.experts.{{e}}.{name}_proj.weight", f"layers.{{i}}.ffn.experts.{name}", Stack) for name in ("gate", "up", "down")))
FUSED_EXPERTS: tuple[Rule, ...] = (
    ROUTER,
    rule("model.layers.{i}.mlp.experts.gate_up_proj", ["layers.{i}.ffn.experts.gate", "layers.{i}.ffn.experts.up"], GateUp),
    rule("model.layers.{i}.mlp.experts.down_proj", "layers.{i}.ffn.experts.down"),
)
SHARED: tuple[Rule, ...] = (
    *(rule(f"model.layers.{{i}}.mlp.shared_expert.{name}_proj", f"layers.{{i}}.ffn.shared.{name}") for name in ("gate", "up", "down")),
    rule("model.layers.{i}.mlp.shared_expert_gate", "layers.{i}.ffn.shared_gate"),
)


def with_experts(base: Table, *rules: Rule) -> tuple[Table, Table]:
    """`base` and these rules, with a tensor an expert, as on the hub; and with all experts of a layer in one."""
    return override(base, *EACH_EXPERT, *rules), override(base, *FUSED_EXPERTS, *rules)


# ---- reading

def read_routed(r: Reader) -> list[bool]:
    """Which layers have experts."""
    count, step, only = r.count("num_hidden_layers"), r.size("decoder_sparse_step", 1), r.get("mlp_only_layers", None) or []
    if not isinstance(only, list) or not all(type(i) is int and 0 <= i < count for i in only):
        raise r.error("mlp_only_layers", f"a list of layers from 0 to {count - 1}")
    return [i not in only and (i + 1) % step == 0 for i in range(count)]


def read_experts(r: Reader, experts: int, top_k: int, width: int, shared: int | None = None) -> MoE:
    """The numbers are the family's defaults; `shared` of None: it has no shared expert."""
    activation = r.activation("hidden_act", "silu")
    return MoE(
        experts=experts,
        top_k=r.size("num_experts_per_tok", top_k),
        expert=MLP(r.size("moe_intermediate_size", width), activation),
        renormalize=r.flag("norm_topk_prob", False),
        shared=MLP(r.size("shared_expert_intermediate_size", shared), activation) if shared else None,
        shared_gate=shared is not None,
        round_weights=True,
    )


def read_every_other_window(r: Reader) -> list[int | None]:
    """The window of each layer of a qwen2_moe. transformers writes a sliding_window of 0 where none is used."""
    count, window = r.count("num_hidden_layers"), None
    if r.flag("use_sliding_window", False):
        window = r.size("sliding_window", 4096)
    else:
        r.get("sliding_window", None)                    # means nothing
    first = r.get("max_window_layers", 28)
    if type(first) is not int or first < 0:
        raise r.error("max_window_layers", "a whole number")
    types = r.get("layer_types", None)
    if types is None:
        types = ["sliding_attention" if window and i % 2 == 0 and i < first else "full_attention" for i in range(count)]
    known = ("full_attention", "sliding_attention") if window else ("full_attention",)
    if not isinstance(types, list) or len(types) != count or not all(one in known for one in types):
        raise r.error("layer_types", f"{count} times {' or '.join(known)}")
    return [window if one == "sliding_attention" else None for one in types]


def read_qwen2_moe(r: Reader) -> ModelConfig:
    """Layers differ in window, and in whether they have experts."""
    norm = Norm(eps=r.number("rms_norm_eps", 1e-6))
    mlp = MLP(r.size("intermediate_size", 5632), r.activation("hidden_act", "silu"))
    moe = read_experts(r, r.count("num_experts", 60), top_k=4, width=1408, shared=5632)
    bias = r.flag("qkv_bias", True)
    layers = [Layer(read_attention(r, context=CONTEXT, kv_heads=16, window=window, qkv_bias=bias), moe if routed else mlp, norm, pre_ffn=norm)
              for routed, window in zip(read_routed(r), read_every_other_window(r))]
    return read_decoder(r, layers, norm, CONTEXT)


def read_qwen3_moe(r: Reader) -> ModelConfig:
    """Layers differ in whether they have experts."""
    norm = Norm(eps=r.number("rms_norm_eps", 1e-6))
    mlp = MLP(r.size("intermediate_size", 6144), r.activation("hidden_act", "silu"))
    experts = r.count("num_local_experts" if "num_local_experts" in r.values else "num_experts", 128)
    r.must("num_experts", experts)
    moe = read_experts(r, experts, top_k=8, width=768)
    window = r.size("sliding_window", 4096, or_null=True)
    window = window if r.flag("use_sliding_window", False) else None
    r.get("max_window_layers", None)                     # stands in published configs, and is read by nobody
    bias = r.flag("attention_bias", False)
    attention = read_attention(r, context=CONTEXT, kv_heads=4, window=window, qk_norm=norm, qkv_bias=bias, out_bias=bias)
    return read_decoder(r, [Layer(attention, moe if routed else mlp, norm, pre_ffn=norm) for routed in read_routed(r)], norm, CONTEXT)


# ---- writing

def first_routed(config: ModelConfig) -> Layer:
    """The first layer that has experts. Raises ConfigError if there is none."""
    found = next((layer for layer in config.layers if isinstance(layer.ffn, MoE)), None)
    if found is None or not isinstance(found.ffn.expert, MLP):
        raise ConfigError("no layer has experts" if found is None else f"experts are {type(found.ffn.expert).__name__}, not MLP")
    return found


def dense_width(config: ModelConfig) -> int:
    """The width of the layers without experts; where there are none it says nothing."""
    return next((layer.ffn.hidden for layer in config.layers if isinstance(layer.ffn, MLP)), first_routed(config).ffn.expert.hidden)


def all_routed(config: ModelConfig) -> ModelConfig:
    """As if all layers were the first one that has experts, to be written; reading it back tells where they are not."""
    return dataclasses.replace(config, layers=(first_routed(config),) * len(config.layers))


def write_moe(config: ModelConfig, model_type: str, architecture: str) -> dict[str, Any]:
    """What both write."""
    layer = first_routed(config)
    return write_llama_shape(all_routed(config), model_type, architecture, MoE) | {
        "intermediate_size": dense_width(config),
        "moe_intermediate_size": layer.ffn.expert.hidden,
        "num_experts": layer.ffn.experts,
        "num_experts_per_tok": layer.ffn.top_k,
        "norm_topk_prob": layer.ffn.renormalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i, each in enumerate(config.layers) if isinstance(each.ffn, MLP)],
        "use_sliding_window": layer.mixer.window is not None,
        "sliding_window": layer.mixer.window,
    }


def write_qwen2_moe(config: ModelConfig) -> dict[str, Any]:
    """A head_dim of its own stands in the config all the same: transformers reads it. `layer_types` says which layers slide."""
    values, layer = write_moe(config, "qwen2_moe", "Qwen2MoeForCausalLM"), first_routed(config)
    if layer.ffn.shared is None:
        raise ConfigError("Qwen2-MoE wants a shared expert")
    windows = [getattr(each.mixer, "window", None) for each in config.layers]
    used = next((window for window in windows if window is not None), None)
    return values | {
        "shared_expert_intermediate_size": layer.ffn.shared.hidden,
        "qkv_bias": layer.mixer.qkv_bias,
        "use_sliding_window": used is not None,
        "sliding_window": used,
        "max_window_layers": len(windows) if used else 0,
        "layer_types": ["full_attention" if window is None else "sliding_attention" for window in windows],
    }


def write_qwen3_moe(config: ModelConfig) -> dict[str, Any]:
    values, layer = write_moe(config, "qwen3_moe", "Qwen3MoeForCausalLM"), first_routed(config)
    return values | {"attention_bias": layer.mixer.out_bias}


QWEN2_MOE = Family("qwen2_moe", read_qwen2_moe, write_qwen2_moe, with_experts(LLAMA_NAMES, *SHARED), INV_FREQ)
QWEN3_MOE = Family("qwen3_moe", read_qwen3_moe, write_qwen3_moe, with_experts(QWEN3_NAMES), INV_FREQ)
