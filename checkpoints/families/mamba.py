"""Mamba, the first, and Falcon-Mamba: a selective scan in place of attention and MLP both.

    x += mixer(norm(x))          inner width = intermediate_size, or expand · hidden_size where that is missing

    mamba            the `-hf` repositories; the original ones, which have no model_type, are read in mamba2.py
    falcon_mamba     RMS norms without gain on the low-rank Δ, on B and on C, with an ε of their own, `mixer_rms_eps`

`time_step_rank` is a number, or "auto", which is hidden_size / 16 rounded up. Two defaults differ from all other
families: head and embedding are tied, and the residual stream stays in float32 whatever the weights are.

Falcon-Mamba's norm of Δ is before dt_proj. (The fused kernel that transformers would train with has it after: another model.)
"""

import math
from typing import Any

from checkpoints.families.legacy import functions, write_decoder
from checkpoints.names.reader import Reader
from checkpoints.names.table import override, rule
from nanollm.config import Layer, Mamba, Mamba2, ModelConfig, Norm
from nanollm.errors import ConfigError

MAMBA_NAMES = override(
    {},
    rule("backbone.embeddings", "embed"),
    rule("backbone.layers.{i}.norm", "layers.{i}.pre_mixer"),
    rule("backbone.layers.{i}.mixer.in_proj", "layers.{i}.mixer.in_proj"),
    rule("backbone.layers.{i}.mixer.conv1d", "layers.{i}.mixer.conv1d"),
    rule("backbone.layers.{i}.mixer.x_proj", "layers.{i}.mixer.x_proj"),
    rule("backbone.layers.{i}.mixer.dt_proj", "layers.{i}.mixer.dt_proj"),
    rule("backbone.layers.{i}.mixer.A_log", "layers.{i}.mixer.A_log"),
    rule("backbone.layers.{i}.mixer.D", "layers.{i}.mixer.D"),
    rule("backbone.layers.{i}.mixer.out_proj", "layers.{i}.mixer.out_proj"),
    rule("backbone.norm_f", "norm"),
    rule("lm_head", "head"),
)
OLD_NAMES = override(MAMBA_NAMES, rule("backbone.embedding", "embed"))


def read_falcon_mamba(r: Reader) -> ModelConfig:
    return read(r, Norm(eps=r.number("mixer_rms_eps", 1e-6), gain=False))


def read(r: Reader, inner_norm: Norm | None = None) -> ModelConfig:
    """A layer is the mixer alone. `intermediate_size` counts, where it stands: Falcon-Mamba-7B has 8192 and an `expand` of 16 that is none."""
    dim, expand = r.size("hidden_size"), r.size("expand", 2)
    inner = r.size("intermediate_size", None) or expand * dim
    r.must("d_inner", inner)
    r.must("hidden_act", "silu")
    r.must("rms_norm", True)
    r.must("ssm_cfg", {})
    mixer = Mamba(
        inner=inner,
        state=r.size("state_size", 16),
        conv=r.size("conv_kernel", 4),
        dt_rank=read_rank(r, "time_step_rank", dim),
        conv_bias=r.flag("use_conv_bias", True),
        bias=r.flag("use_bias", False),
        inner_norm=inner_norm,
    )
    return read_stack(r, mixer, tied=True)


def read_rank(r: Reader, key: str, dim: int) -> int:
    """R, a number or "auto"."""
    return math.ceil(dim / 16) if r.get(key, "auto") == "auto" else r.size(key)


def read_stack(r: Reader, mixer: Mamba | Mamba2, tied: bool) -> ModelConfig:
    """What holds the mixers of both generations; `tied` is the family's default."""
    norm = Norm(eps=r.number("layer_norm_epsilon", 1e-5))
    layer = Layer(mixer, None, pre_mixer=norm, pre_ffn=None)
    return ModelConfig(
        vocab=r.size("vocab_size"),
        dim=r.size("hidden_size"),
        layers=(layer,) * r.count("num_hidden_layers"),
        final_norm=norm,
        tied=r.flag("tie_word_embeddings", tied),
        float32_residual=r.flag("residual_in_fp32", True),
    )


def write_mamba(config: ModelConfig) -> dict[str, Any]:
    """An inner norm does not read back."""
    return write(config, "mamba", "MambaForCausalLM")


def write_falcon_mamba(config: ModelConfig) -> dict[str, Any]:
    """A gain of the inner norm does not read back."""
    values = write(config, "falcon_mamba", "FalconMambaForCausalLM")
    norm = config.layers[0].mixer.inner_norm
    return values | {"mixer_rms_eps": None if norm is None else norm.eps}


def write(config: ModelConfig, model_type: str, architecture: str) -> dict[str, Any]:
    """`expand` is a whole number, although `intermediate_size` stands beside it."""
    base = write_stack(config, model_type, architecture, Mamba)
    mixer = config.layers[0].mixer
    return base | {
        "expand": whole_multiple(mixer.inner, config.dim),
        "intermediate_size": mixer.inner,
        "time_step_rank": mixer.dt_rank,
    }


def whole_multiple(inner: int, dim: int) -> int:
    """What `expand` is."""
    if inner % dim:
        raise ConfigError(f"Mamba wants inner ({inner}) to be a multiple of dim ({dim})")
    return inner // dim


def write_stack(config: ModelConfig, model_type: str, architecture: str, mixer: type) -> dict[str, Any]:
    """What both generations write in the same words."""
    base = write_decoder(config, model_type, architecture, mixer, type(None))
    first = config.layers[0].mixer
    return base | {
        "state_size": first.state,
        "conv_kernel": first.conv,
        "use_conv_bias": first.conv_bias,
        "use_bias": first.bias,
        "residual_in_fp32": config.float32_residual,
        "layer_norm_epsilon": config.final_norm.eps,
        "hidden_act": "silu",
    }


IRRELEVANT = frozenset(                                  # initialisation, which code runs it, and the sizes by their old names
    "rescale_prenorm_residual time_step_floor time_step_init_scheme time_step_max time_step_min "
    "time_step_scale use_associative_scan use_mambapy use_falcon_mambapy d_model fused_add_norm n_layer pad_vocab_size_multiple".split())

MAMBA = functions("mamba", read, write_mamba, (MAMBA_NAMES, OLD_NAMES), irrelevant=IRRELEVANT)
FALCON_MAMBA = functions("falcon_mamba", read_falcon_mamba, write_falcon_mamba, (MAMBA_NAMES,), irrelevant=IRRELEVANT)
FAMILIES = {"mamba": MAMBA, "falcon_mamba": FALCON_MAMBA}
