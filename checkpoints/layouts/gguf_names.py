"""What a GGUF says of a model: its keys as a config.json would have them, and the names of its tensors.

Which files: gguf_files.py. The container: storage/gguf.py. The tokenizer inside: gguf_tokens.py.

    architecture    model_type         RoPE turns    besides Llama's tensors
    llama           llama, mistral     neighbours    rope_freqs: the divisors of "llama3", instead of its formula
                    mixtral                          experts of a layer in one tensor (E, F, D); before 2024 one each
    qwen2           qwen2              halves        –
    qwen2moe        qwen2_moe          halves        experts, and a shared one
    qwen3           qwen3              halves        norms of heads
    qwen3moe        qwen3_moe          halves        norms of heads, experts
    gemma           gemma              halves        –                              gains of norms have 1 added
    gemma2          gemma2             halves        norms after both parts         likewise
    gemma3          gemma3_text        halves        both                           likewise
    phi2            phi                halves        –
    phi3            phi3               halves        fused matrices; rope_factors_long and _short: LongRoPE's lists
    gpt-oss         gpt_oss            halves        sinks, experts with biases; YaRN's ramp is not rounded

Rows of q and k of a `llama` are stored in Meta's order (layouts/original.py), whoever trained it; they are read as they
lie. Numbers are float32 in the file. Each is read as the shortest decimal that rounds to it: 1e-05, and not
9.99999974737875e-06.

What is not in the file is taken as llama.cpp takes it:
- no key says the scale of Gemma's scores. It is 1/√d, but 1/√(D/H) for the 27B models, which are known by their number
  of layers (46 and 62);
- a missing rope.freq_base is 10000, and so is that of Gemma 3's sliding layers;
- converters do not write a window for Mistral 7B v0.1 or for a Qwen2 or 3 that slides: such a model is read as one
  without a window;
- nor do they write whether the ends of YaRN's ramp are rounded (`truncate`): they are not for gpt-oss, and are for all
  others.

Keys of the architecture that are not read here are refused. Those in other namespaces (general, tokenizer, quantize,
split, and what tools add) say nothing about the logits.

Source: llama.cpp as llama-cpp-python 0.3.36 carries it: conversion/ of each model, src/llama-model.cpp,
gguf-py/gguf/tensor_mapping.py.
Shapes: V vocabulary, D model width, H query heads, d head width, r of its channels that turn, E experts, F their width.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from checkpoints.layouts.original import HIGH, LOW, ORIGINAL, SCALED
from checkpoints.names.config_rows import FULL, SLIDING
from checkpoints.names.ops import Blocks, Stack
from checkpoints.names.reader import Reader
from checkpoints.names.table import Table, override, rule
from checkpoints.storage.files import Stored
from checkpoints.storage.gguf import shortest
from nanollm.config import Llama3, Rope
from nanollm.errors import CheckpointError, ConfigError
from nanollm.layers.rope import frequencies

NAMES = override(
    {},
    rule("token_embd", "embed"),
    rule("blk.{i}.attn_norm", "layers.{i}.pre_mixer"),
    *(rule(f"blk.{{i}}.attn_{part}", f"layers.{{i}}.mixer.{part}") for part in "qkv"),
    rule("blk.{i}.attn_output", "layers.{i}.mixer.o"),
    rule("blk.{i}.ffn_norm", "layers.{i}.pre_ffn"),
    *(rule(f"blk.{{i}}.ffn_{part}", f"layers.{{i}}.ffn.{part}") for part in ("gate", "up", "down")),
    rule("output_norm", "norm"),
    rule("output", "head"),
)
HEAD_NORMS = tuple(rule(f"blk.{{i}}.attn_{part}_norm", f"layers.{{i}}.mixer.{part}_norm") for part in "qk")
GEMMA2_NAMES = override(
    NAMES,
    rule("blk.{i}.post_attention_norm", "layers.{i}.post_mixer"),
    rule("blk.{i}.post_ffw_norm", "layers.{i}.post_ffn"),
)
PHI3_NAMES = override(
    NAMES,
    rule("blk.{i}.attn_qkv", ["layers.{i}.mixer.q", "layers.{i}.mixer.k", "layers.{i}.mixer.v"], Blocks),
    rule("blk.{i}.ffn_up", ["layers.{i}.ffn.gate", "layers.{i}.ffn.up"], Blocks),
)
EXPERTS = (
    rule("blk.{i}.ffn_gate_inp", "layers.{i}.ffn.router"),
    *(rule(f"blk.{{i}}.ffn_{part}_exps.weight", f"layers.{{i}}.ffn.experts.{part}") for part in ("gate", "up", "down")),
)
SHARED_GATE = "ffn_gate_inp_shexp.weight"
SHARED_EXPERT = (
    *(rule(f"blk.{{i}}.ffn_{part}_shexp", f"layers.{{i}}.ffn.shared.{part}") for part in ("gate", "up", "down")),
    rule(f"blk.{{i}}.{SHARED_GATE.removesuffix('.weight')}", "layers.{i}.ffn.shared_gate"),
)
EACH_EXPERT = (
    EXPERTS[0],
    *(rule(f"blk.{{i}}.ffn_{part}.{{e}}.weight", f"layers.{{i}}.ffn.experts.{part}", Stack)
      for part in ("gate", "up", "down")),
)
GPT_OSS_NAMES = override(
    NAMES,
    *EXPERTS,
    *(rule(f"blk.{{i}}.ffn_{part}_exps.bias", f"layers.{{i}}.ffn.experts.{part}_bias")
      for part in ("gate", "up", "down")),
    rule("blk.{i}.attn_sinks.weight", "layers.{i}.mixer.sinks"),
    rule("blk.{i}.post_attention_norm", "layers.{i}.pre_ffn"),
)
RMS, LAYER = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"
FREQS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
# of training, of how text is embedded, and of a layout that has been the only one since 2023
SAY_NOTHING = frozenset({"rope.scaling.finetuned", "pooling_type", "tensor_data_layout"})
Values = dict[str, Any]
Tensors = Mapping[str, Stored]


@dataclass(frozen=True)
class Architecture:
    """How a GGUF of this general.architecture is read."""
    families: tuple[str, ...]                    # model_types that share it; the first unless another is asked for
    names: tuple[Table, ...]                     # one of them has the tensors
    read_own: Callable[[Reader, Values, int, Tensors], Values]       # the keys of config.json that not all have
    vectors: frozenset[str] = frozenset()        # stored beside the weights, and read with the keys
    interleaved: bool = False                    # RoPE turns neighbours, not halves
    norm_offset: float = 0.0                     # added to the gains of norms, as nanollm.config.Norm has it


def read_metadata(metadata: Values, kind: str, family: str | None, stored: Tensors, where: str,
                  ignore: Collection[str] = ()) -> Values:
    """What a config.json of Hugging Face's would say. Raises ConfigError or CheckpointError."""
    architecture = ARCHITECTURES[kind]
    if family not in (None, *architecture.families):
        expected = " or ".join(architecture.families)
        raise ConfigError(f"{where}: --family {family}: architecture {kind} is read as {expected}")
    own = {key.removeprefix(f"{kind}."): value for key, value in metadata.items() if key.startswith(f"{kind}.")}
    r = Reader(own, where, ignore, min(len(stored), 10_000), f"{kind}.")
    if "token_embd.weight" not in stored:
        raise CheckpointError(f"{where}: no tensor token_embd.weight")
    dim, heads = r.size("embedding_length"), r.size("attention.head_count")
    head_dim = r.size("attention.key_length", None)
    if head_dim is None and dim % heads:
        expected = f"a divisor of embedding_length ({dim}) where there is no attention.key_length"
        raise r.error("attention.head_count", expected)
    d = head_dim or dim // heads
    values = {
        "model_type": family or architecture.families[0],
        "vocab_size": r.must("vocab_size", stored["token_embd.weight"].shape[0]),
        "hidden_size": dim,
        "intermediate_size": r.size("feed_forward_length"),
        "num_hidden_layers": r.count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": r.size("attention.head_count_kv", heads),
        "max_position_embeddings": r.size("context_length"),
        "tie_word_embeddings": "output.weight" not in stored,
    }
    r.must("attention.value_length", d)
    r.must("attention.causal", True)
    values |= architecture.read_own(r, values, d, stored)
    r.close(SAY_NOTHING)
    r.warn()
    return values


# ---- parts

def rotary_fraction(r: Reader, d: int) -> float:
    """partial_rotary_factor. int(d · factor) channels of a head turn."""
    turned = r.size("rope.dimension_count", d, most=d)
    factor = turned / d
    return factor if int(d * factor) == turned else math.nextafter(factor, 1)            # 44 · (30 / 44) is 29.999…


def whole_heads(r: Reader, d: int) -> Values:
    """head_dim, where all channels of a head turn."""
    r.must("rope.dimension_count", d)
    return {"head_dim": d}


def window(r: Reader) -> int | None:
    """The sliding window. The format says 0 where there is none."""
    return None if r.get("attention.sliding_window", 0) == 0 else r.size("attention.sliding_window")


def no_window(r: Reader, instead: str = "") -> None:
    """Raises ConfigError where there is a window. `instead`: what else to do, for the message."""
    if window(r) is not None:
        raise r.error("attention.sliding_window", f"0, or no such key{instead}")


def theta(r: Reader) -> float:
    """The base of RoPE."""
    return r.number("rope.freq_base", 10_000.0, above=1)


def scaling(r: Reader, values: Values, *kinds: str) -> Values | None:
    """rope_scaling. A factor without a type means linear; no factor, 0 and 1 mean no scaling."""
    kind = r.must("rope.scaling.type", "linear", "none", *kinds)
    original = r.size("rope.scaling.original_context_length", values["max_position_embeddings"])
    if r.get("rope.scaling.factor", 0) in (0, 1) or kind == "none":
        return None
    stretched = {"rope_type": kind, "factor": r.number("rope.scaling.factor")}
    if kind == "yarn":
        r.must("rope.scaling.yarn_ext_factor", 1.0)
        told = {"beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow", "attention_factor": "yarn_attn_factor"}
        stretched |= {key: r.number(f"rope.scaling.{name}")
                      for key, name in told.items() if f"rope.scaling.{name}" in r.values}
        stretched["original_max_position_embeddings"] = original
    return stretched


def numbers(r: Reader, name: str, stored: Tensors, count: int) -> list[float]:
    """A stored vector of so many divisors."""
    if stored[name].shape != (count,):
        raise CheckpointError(f"{r.where}: {name} is {stored[name].shape}; "
                              f"expected {(count,)}, a divisor for each pair of channels")
    found = torch.empty(count)
    stored[name].read_run(0, found)
    if not (found.isfinite() & (found > 0)).all():
        raise CheckpointError(f"{r.where}: {name} has a divisor that is no finite number above 0")
    return list(map(shortest, found.tolist()))


def llama3(r: Reader, d: int, stored: Tensors) -> Values:
    """rope_scaling of Llama 3.1, by whose formula the stored divisors were made. The factor is the largest of them.

    Raises CheckpointError for other divisors, which no config expresses."""
    divisors = torch.tensor(numbers(r, FREQS, stored, -(-d // 2)))
    factor = divisors.max().item()
    stretch = Llama3(factor, ORIGINAL, LOW, HIGH)
    plain, stretched = (frequencies(Rope(theta(r), scaling=one), d, torch.zeros(1, 1)) for one in (None, stretch))
    if not torch.allclose(plain / stretched, divisors, rtol=1e-5, atol=0):
        raise CheckpointError(f"{r.where}: {FREQS} has divisors other than Llama 3.1's formula gives with a factor of "
                              f"{factor:g}; expected those (original context 8192, factors 1 and 4)")
    return {"rope_type": "llama3", "factor": factor, **SCALED}


def biases(stored: Tensors) -> bool:
    """Whether q, k and v have biases, which no key says."""
    return "blk.0.attn_q.bias" in stored


def sliding(r: Reader, values: Values, period: int, default: int) -> Values:
    """Which layers slide: of Gemma 2 and 3 all but every `period`-th, unless the file says otherwise."""
    size, count = window(r) if "attention.sliding_window" in r.values else default, values["num_hidden_layers"]
    pattern = r.get("attention.sliding_window_pattern", period)
    if type(pattern) is int and 0 < pattern <= count + period:
        pattern = [(i + 1) % pattern > 0 for i in range(count)]
    if not isinstance(pattern, list) or len(pattern) != count or not all(type(one) is bool for one in pattern):
        raise r.error("attention.sliding_window_pattern", f"a period, or {count} times true or false")
    return {"sliding_window": size or 4096, "layer_types": [SLIDING if size and slides else FULL for slides in pattern]}


def routed(r: Reader) -> Values:
    """How many experts there are, and how many each token takes."""
    return {"num_local_experts": r.count("expert_count"), "num_experts_per_tok": r.size("expert_used_count")}


def expert_width(stored: Tensors, name: str) -> int | None:
    """F of an expert, which files before April 2024 say by a tensor's shape only."""
    return stored[name].shape[-2] if name in stored and len(stored[name].shape) > 1 else None


def qwen_experts(r: Reader, stored: Tensors) -> Values:
    """The same under Qwen's names, and the width of an expert."""
    width = r.size("expert_feed_forward_length", expert_width(stored, "blk.0.ffn_up_exps.weight"))
    said = routed(r)
    return {"num_experts": said["num_local_experts"], "num_experts_per_tok": said["num_experts_per_tok"],
            "moe_intermediate_size": width}


def scalar(values: Values, d: int, layers_of_27b: int) -> int:
    """query_pre_attn_scalar, whose root divides the scores: d, or D/H in the 27B model, known by its layers."""
    return values["hidden_size"] // values["num_attention_heads"] if values["num_hidden_layers"] == layers_of_27b else d


# ---- architectures

def llama(r: Reader, values: Values, d: int, stored: Tensors) -> Values:
    """Llama and models built like it: Mistral, and with experts Mixtral."""
    moe = values["model_type"] == "mixtral" or values["model_type"] == "llama" and r.get("expert_count", 0) != 0
    if not moe:
        r.must("expert_count", 0)
        r.must("expert_used_count", 0)
    rope = scaling(r, values, "yarn")
    if FREQS in stored:
        if rope is not None:
            raise r.error("rope.scaling.factor", f"no other scaling beside {FREQS}")
        rope = llama3(r, d, stored)
    more = whole_heads(r, d) | {"rms_norm_eps": r.number(RMS), "rope_theta": theta(r), "rope_scaling": rope}
    if moe:
        return more | routed(r) | {"model_type": "mixtral", "sliding_window": window(r)}
    if values["model_type"] == "mistral":
        return more | {"sliding_window": window(r)}
    no_window(r, ", or --family mistral")
    return more | {"attention_bias": biases(stored), "mlp_bias": "blk.0.ffn_gate.bias" in stored}


def qwen2(r: Reader, values: Values, d: int, stored: Tensors) -> Values:
    """Biases on q, k and v are the family's, and no key says so."""
    no_window(r)
    rope = {"rope_theta": theta(r), "rope_scaling": scaling(r, values, "yarn")}
    return whole_heads(r, d) | {"rms_norm_eps": r.number(RMS)} | rope


def qwen3(r: Reader, values: Values, d: int, stored: Tensors) -> Values:
    """As Qwen 2, but with biases only where they are stored."""
    return qwen2(r, values, d, stored) | {"attention_bias": biases(stored)}


def qwen2moe(r: Reader, values: Values, d: int, stored: Tensors) -> Values:
    """Beside the routed experts one that every token takes; the chosen weights are not normalised."""
    shared = r.size("expert_shared_feed_forward_length", expert_width(stored, "blk.0.ffn_up_shexp.weight"))
    return qwen2(r, values, d, stored) | qwen_experts(r, stored) | {
        "norm_topk_prob": False, "shared_expert_intermediate_size": shared}


def qwen3moe(r: Reader, values: Values, d: int, stored: Tensors) -> Values:
    """As Qwen 3, with experts; the weights of the chosen are normalised."""
    return qwen3(r, values, d, stored) | qwen_experts(r, stored) | {"norm_topk_prob": True}


def gpt_oss(r: Reader, values: Values, d: int, stored: Tensors) -> Values:
    """Every other layer slides, the first one too."""
    rope = scaling(r, values, "yarn")
    return whole_heads(r, d) | routed(r) | {
        "rms_norm_eps": r.number(RMS), "rope_theta": theta(r),
        "rope_scaling": rope and rope | ({"truncate": False} if rope["rope_type"] == "yarn" else {}),
        "sliding_window": r.size("attention.sliding_window"), "attention_bias": biases(stored),
        "intermediate_size": r.size("expert_feed_forward_length"),
    }


def gemma(r: Reader, values: Values, d: int, stored: Tensors) -> Values:
    """The keys that Gemma 1, 2 and 3 share."""
    return whole_heads(r, d) | {"rms_norm_eps": r.number(RMS), "rope_theta": theta(r),
                                "rope_scaling": scaling(r, values),
                                "attention_bias": biases(stored)}


def gemma2(r: Reader, values: Values, d: int, stored: Tensors) -> Values:
    """Soft caps that are missing are 50 for the scores and 30 for the logits."""
    caps = {key: r.number(key) for key in ("attn_logit_softcapping", "final_logit_softcapping") if key in r.values}
    more = sliding(r, values, 2, 4096) | caps | {"query_pre_attn_scalar": scalar(values, d, 46)}
    return gemma(r, values, d, stored) | more


def gemma3(r: Reader, values: Values, d: int, stored: Tensors) -> Values:
    """rope_scaling is that of the full layers."""
    return gemma(r, values, d, stored) | sliding(r, values, 6, 0) | {
        "rope_local_base_freq": r.number("rope.freq_base_swa", 10_000.0, above=1),
        "final_logit_softcapping": r.number("final_logit_softcapping", None),
        "query_pre_attn_scalar": scalar(values, d, 62),
    }


def phi2(r: Reader, values: Values, d: int, stored: Tensors) -> Values:
    """LayerNorm, and RoPE on a part of each head."""
    if d * values["num_attention_heads"] != values["hidden_size"]:
        sizes = f"{values['hidden_size']} / {values['num_attention_heads']}"
        raise r.error("attention.key_length", f"embedding_length / attention.head_count ({sizes})")
    return {"layer_norm_eps": r.number(LAYER), "rope_theta": theta(r), "rope_scaling": scaling(r, values),
            "partial_rotary_factor": rotary_fraction(r, d)}


def phi3(r: Reader, values: Values, d: int, stored: Tensors) -> Values:
    """LongRoPE where its lists are stored. attn_factor is then the factor on cos and sin."""
    part, rope = rotary_fraction(r, d), None
    r.must("rope.scaling.type", "longrope", "none")
    if LONG in stored or SHORT in stored:
        if missing := {LONG, SHORT} - set(stored):
            raise CheckpointError(f"{r.where}: no tensor {missing.pop()} beside the other list of LongRoPE's")
        long, short = (numbers(r, name, stored, int(d * part) // 2) for name in (LONG, SHORT))
        rope = {"rope_type": "longrope", "long_factor": long, "short_factor": short,
                "attention_factor": r.number("rope.scaling.attn_factor")}
    more = {"head_dim": d, "rms_norm_eps": r.number(RMS), "rope_theta": theta(r), "rope_scaling": rope,
            "partial_rotary_factor": part}
    original = r.size("rope.scaling.original_context_length", values["max_position_embeddings"])
    return more | {"original_max_position_embeddings": original, "sliding_window": window(r)}


ARCHITECTURES = {
    "llama": Architecture(("llama", "mistral", "mixtral"),
                          (override(NAMES, *EXPERTS), override(NAMES, *EACH_EXPERT)), llama, frozenset({FREQS}),
                          interleaved=True),
    "qwen2": Architecture(("qwen2",), (NAMES,), qwen2),
    "qwen2moe": Architecture(("qwen2_moe",), (override(NAMES, *EXPERTS, *SHARED_EXPERT),), qwen2moe),
    "qwen3": Architecture(("qwen3",), (override(NAMES, *HEAD_NORMS),), qwen3),
    "qwen3moe": Architecture(("qwen3_moe",), (override(NAMES, *HEAD_NORMS, *EXPERTS),), qwen3moe),
    "gemma": Architecture(("gemma",), (NAMES,), gemma, norm_offset=1.0),
    "gemma2": Architecture(("gemma2",), (GEMMA2_NAMES,), gemma2, norm_offset=1.0),
    "gemma3": Architecture(("gemma3_text",), (override(GEMMA2_NAMES, *HEAD_NORMS),), gemma3, norm_offset=1.0),
    "phi2": Architecture(("phi",), (NAMES,), phi2),
    "phi3": Architecture(("phi3",), (PHI3_NAMES,), phi3, frozenset({LONG, SHORT})),
    "gpt-oss": Architecture(("gpt_oss",), (GPT_OSS_NAMES,), gpt_oss),
}
