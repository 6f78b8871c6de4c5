"""Mamba-2 and Codestral-Mamba; and the folders of both generations as their authors write them.

    x += mixer(norm(x))          num_heads · head_dim = expand · hidden_size

    mamba2           transformers' layout: untied unless the config says otherwise, n_groups of 8 unless it says 1
    (no model_type)  state-spaces/mamba-*, mamba2-*: sizes d_model and n_layer, and ssm_cfg, which has the arguments of the mixer where
                     they are not its defaults. `vocab_size` counts tokens: the matrices have as many rows as the next multiple
                     of `pad_vocab_size_multiple`, 50280 for 50277 and 8. Tied. Published as pickles; what is read here is what
                     a conversion to safetensors keeps of them, the names.

Codestral-Mamba's config says `norm_before_gate: true`, which nothing reads: the gate comes first. `time_step_limit` cuts Δ off,
with a null or a spelled-out infinity for no limit. (transformers 5.23 forgets the limit in its step for a single token.)
"""

import math
from typing import Any

from checkpoints.families.legacy import functions
from checkpoints.families.mamba import IRRELEVANT, MAMBA_NAMES, read_rank, read_stack, whole_multiple, write_stack
from checkpoints.names.reader import Reader, is_number
from checkpoints.names.table import override, rule
from nanollm.config import Layer, Mamba, Mamba2, ModelConfig, Norm
from nanollm.errors import ConfigError

INFINITY = {"__float__": "Infinity"}                     # as transformers writes it
INITIAL = frozenset(                                     # of ssm_cfg: first values, and which code runs
    "A_init_range chunk_size conv_init dt_init dt_init_floor dt_max dt_min dt_scale use_fast_path use_mem_eff_path".split())

MAMBA2_NAMES = override(
    MAMBA_NAMES,
    rule("backbone.layers.{i}.mixer.dt_bias", "layers.{i}.mixer.dt_bias"),
    rule("backbone.layers.{i}.mixer.norm", "layers.{i}.mixer.norm"),
)
ORIGINAL_NAMES = override(MAMBA2_NAMES, rule("backbone.embedding", "embed"))


def read_limits(r: Reader, key: str) -> tuple[float, float | None]:
    """The least and the largest Δ; None is no limit."""
    value = r.get(key, [0.0, INFINITY])
    low, high = value if isinstance(value, (list, tuple)) and len(value) == 2 else (None, None)
    endless = high == INFINITY or high == math.inf
    if not is_number(low, -1e-30) or not (endless or is_number(high, low)):
        raise r.error(key, "two numbers, the least and the largest step")
    return float(low), None if endless else float(high)


def read(r: Reader) -> ModelConfig:
    """A layer is the mixer alone."""
    dim, heads, head_dim = r.size("hidden_size"), r.size("num_heads", 128), r.size("head_dim", 64)
    if heads * head_dim != r.size("expand", 2) * dim:
        raise r.error("num_heads", f"expand · hidden_size / head_dim ({r.size('expand', 2)} · {dim} / {head_dim})")
    for repeated in ("intermediate_size", "d_inner"):
        r.must(repeated, heads * head_dim)
    r.must("hidden_act", "silu")
    r.must("rms_norm", True)
    least, largest = read_limits(r, "time_step_limit")
    mixer = Mamba2(
        heads, head_dim,
        groups=r.size("n_groups", 8),
        state=r.size("state_size", 128),
        conv=r.size("conv_kernel", 4),
        eps=r.number("layer_norm_epsilon", 1e-5),
        conv_bias=r.flag("use_conv_bias", True),
        bias=r.flag("use_bias", False),
        least_step=least,
        largest_step=largest,
    )
    return read_stack(r, mixer, tied=False)


def write(config: ModelConfig) -> dict[str, Any]:
    """One ε for all norms."""
    base = write_stack(config, "mamba2", "Mamba2ForCausalLM", Mamba2)
    mixer = config.layers[0].mixer
    return base | {
        "expand": whole_multiple(mixer.heads * mixer.head_dim, config.dim),
        "num_heads": mixer.heads,
        "head_dim": mixer.head_dim,
        "n_groups": mixer.groups,
        "time_step_limit": [mixer.least_step, mixer.largest_step or INFINITY],
    }


# ---- the original layout

def read_original(r: Reader) -> ModelConfig:
    """What `ssm_cfg` does not say has the defaults of the published classes, Mamba and Mamba2."""
    dim = r.size("d_model")
    r.must("rms_norm", True)
    r.must("d_intermediate", 0)                          # an MLP after each mixer
    r.must("attn_layer_idx", [])                         # attention in their place
    r.must("attn_cfg", {})
    ssm = r.inside("ssm_cfg") or Reader({}, r.where, r.ignore, r.most, "ssm_cfg.")
    second = ssm.must("layer", "Mamba1", "Mamba2") == "Mamba2"
    inner = ssm.size("expand", 2) * dim
    shared = dict(state=ssm.size("d_state", 128 if second else 16), conv=ssm.size("d_conv", 4),
                  conv_bias=ssm.flag("conv_bias", True), bias=ssm.flag("bias", False))
    if second:
        head_dim = ssm.size("headdim", 64)
        if inner % head_dim:
            raise ssm.error("headdim", f"a divisor of expand · d_model ({inner})")
        for key, value in (("d_ssm", None), ("D_has_hdim", False), ("rmsnorm", True), ("norm_before_gate", False)):
            ssm.must(key, value)
        least, largest = read_limits(ssm, "dt_limit")
        mixer: Mamba | Mamba2 = Mamba2(inner // head_dim, head_dim, ssm.size("ngroups", 1), **shared, least_step=least, largest_step=largest)
    else:
        mixer = Mamba(inner, dt_rank=read_rank(ssm, "dt_rank", dim), **shared)
    ssm.close(INITIAL)
    rows, tokens = r.size("pad_vocab_size_multiple", 8), r.size("vocab_size", 50277)
    norm = Norm(eps=1e-5)                                # no key says so
    return ModelConfig(
        vocab=-(-tokens // rows) * rows,
        dim=dim,
        layers=(Layer(mixer, None, pre_mixer=norm, pre_ffn=None),) * r.count("n_layer"),
        final_norm=norm,
        tied=r.flag("tie_embeddings", True),
        float32_residual=r.flag("residual_in_fp32", True),
    )


def write_original(config: ModelConfig) -> dict[str, Any]:
    """The vocabulary is written as the rows that there are. An ε other than 1e-5 does not read back."""
    mixer = config.layers[0].mixer
    if not isinstance(mixer, (Mamba, Mamba2)) or any(layer.ffn is not None for layer in config.layers):
        raise ConfigError("layers[0] is no Mamba alone")
    shared = {"d_state": mixer.state, "d_conv": mixer.conv, "conv_bias": mixer.conv_bias, "bias": mixer.bias}
    if isinstance(mixer, Mamba2):
        inner = mixer.heads * mixer.head_dim
        own: dict[str, Any] = {"layer": "Mamba2", "headdim": mixer.head_dim, "ngroups": mixer.groups,
                               "dt_limit": [mixer.least_step, mixer.largest_step or INFINITY]}
    else:
        inner, own = mixer.inner, {"layer": "Mamba1", "dt_rank": mixer.dt_rank}
    return {
        "d_model": config.dim,
        "n_layer": len(config.layers),
        "vocab_size": config.vocab,
        "pad_vocab_size_multiple": 1,
        "ssm_cfg": {**own, "expand": whole_multiple(inner, config.dim), **shared},
        "rms_norm": True,
        "residual_in_fp32": config.float32_residual,
        "tie_embeddings": config.tied,
    }


MAMBA2 = functions("mamba2", read, write, (MAMBA2_NAMES, ORIGINAL_NAMES),
                irrelevant=IRRELEVANT | {"chunk_size", "norm_before_gate", "time_step_rank"})
ORIGINAL = functions("state-spaces", read_original, write_original, (ORIGINAL_NAMES,), irrelevant=frozenset({"fused_add_norm"}))
FAMILIES = {"mamba2": MAMBA2, "state-spaces": ORIGINAL}
