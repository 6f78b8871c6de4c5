"""Mamba, the first: a selective scan in place of attention and MLP both.

    x += mixer(norm(x))          inner width = expand · hidden_size

`time_step_rank` is a number, or "auto", which is hidden_size / 16 rounded up. Two defaults differ from all other
families: head and embedding are tied, and the residual stream stays in float32 whatever the weights are.

The `-hf` repositories are read. The original ones (`d_model`, `ssm_cfg`, no model_type) hold pickles; their tensors have
the same names, but for `backbone.embedding`.
"""

import math
from typing import Any

from checkpoints.families.family import Family
from checkpoints.families.llama import write_decoder
from checkpoints.reader import Reader
from checkpoints.table import override, rule
from nanollm.config import Layer, Mamba, ModelConfig, Norm
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
ORIGINAL_NAMES = override(MAMBA_NAMES, rule("backbone.embedding", "embed"))


def read(r: Reader) -> ModelConfig:
    """A layer is the mixer alone. `intermediate_size` and `d_inner` say again what `expand` says."""
    dim, expand = r.size("hidden_size"), r.size("expand", 2)
    inner = expand * dim
    for repeated in ("intermediate_size", "d_inner"):
        r.must(repeated, inner)
    r.must("hidden_act", "silu")
    r.must("rms_norm", True)
    r.must("ssm_cfg", {})
    auto = r.get("time_step_rank", "auto") == "auto"
    mixer = Mamba(
        inner=inner,
        state=r.size("state_size", 16),
        conv=r.size("conv_kernel", 4),
        dt_rank=math.ceil(dim / 16) if auto else r.size("time_step_rank"),
        conv_bias=r.flag("use_conv_bias", True),
        bias=r.flag("use_bias", False),
    )
    norm = Norm(eps=r.number("layer_norm_epsilon", 1e-5))
    layer = Layer(mixer, None, pre_mixer=norm, pre_ffn=None)
    return ModelConfig(
        vocab=r.size("vocab_size"),
        dim=dim,
        layers=(layer,) * r.count("num_hidden_layers"),
        final_norm=norm,
        tied=r.flag("tie_word_embeddings", True),
        float32_residual=r.flag("residual_in_fp32", True),
    )


def write(config: ModelConfig) -> dict[str, Any]:
    """`expand` is a whole number."""
    base = write_decoder(config, "mamba", "MambaForCausalLM", Mamba, type(None))
    mixer = config.layers[0].mixer
    if mixer.inner % config.dim:
        raise ConfigError(f"Mamba wants inner ({mixer.inner}) to be a multiple of dim ({config.dim})")
    return base | {
        "expand": mixer.inner // config.dim,
        "intermediate_size": mixer.inner,
        "state_size": mixer.state,
        "conv_kernel": mixer.conv,
        "time_step_rank": mixer.dt_rank,
        "use_conv_bias": mixer.conv_bias,
        "use_bias": mixer.bias,
        "residual_in_fp32": config.float32_residual,
        "layer_norm_epsilon": config.final_norm.eps,
        "hidden_act": "silu",
    }


MAMBA = Family(
    "mamba", read, write, (MAMBA_NAMES, ORIGINAL_NAMES),
    irrelevant=frozenset(                                # initialisation, which code runs it, and the sizes by their old names
        "rescale_prenorm_residual time_step_floor time_step_init_scheme time_step_max time_step_min "
        "time_step_scale use_associative_scan use_mambapy d_model fused_add_norm n_layer pad_vocab_size_multiple".split()),
)
