"""Mamba-2 and Codestral-Mamba: what published configs say, the limits of a step, what is refused, the norm behind the
gate."""

import math

import pytest
import torch

from checkpoints.families import read_config, write_config
from nanollm.config import Layer, Mamba2, ModelConfig, Norm
from nanollm.errors import ConfigError
from nanollm.layers.mamba2 import GatedNorm

CODESTRAL = dict(
    model_type="mamba2", architectures=["Mamba2ForCausalLM"], bos_token_id=0, chunk_size=256, conv_kernel=4,
    eos_token_id=0, expand=2, head_dim=64, hidden_act="silu", hidden_size=4096, initializer_range=0.1,
    intermediate_size=8192, layer_norm_epsilon=1e-5, n_groups=8, norm_before_gate=True, num_heads=128,
    num_hidden_layers=64, pad_token_id=0, rescale_prenorm_residual=False, residual_in_fp32=True, rms_norm=True,
    state_size=128, tie_word_embeddings=False, time_step_floor=0.0001, time_step_init_scheme="random",
    time_step_limit=[0.0, math.inf], time_step_max=0.1, time_step_min=0.001, time_step_rank=256, time_step_scale=1.0,
    torch_dtype="bfloat16", transformers_version="4.44.0.dev0", use_bias=False, use_cache=True, use_conv_bias=True,
    vocab_size=32768,
)
ORIGINAL = dict(
    d_model=768, d_intermediate=0, n_layer=24, vocab_size=50277, ssm_cfg={"layer": "Mamba2"}, attn_layer_idx=[],
    attn_cfg={}, rms_norm=True, residual_in_fp32=True, fused_add_norm=True, pad_vocab_size_multiple=16,
    tie_embeddings=True,
)
NORM = Norm(eps=1e-5)


def test_codestral():
    config = read_config(CODESTRAL)[1]
    assert config == ModelConfig(
        32768, 4096, (Layer(Mamba2(128, 64, 8, 128, 4), None, NORM, pre_ffn=None),) * 64, NORM, tied=False,
        float32_residual=True,
    )


def test_defaults():
    assert read_config(dict(model_type="mamba2", vocab_size=97, hidden_size=4096, num_hidden_layers=2))[1].layers[
        0
    ].mixer == Mamba2(128, 64, 8, 128, 4)


def test_the_original_layout():
    family, config = read_config(ORIGINAL)
    assert family.name == "state-spaces"
    assert config == ModelConfig(
        50288, 768, (Layer(Mamba2(24, 64, 1, 128, 4), None, NORM, pre_ffn=None),) * 24, NORM, tied=True,
        float32_residual=True,
    )
    ssm = dict(
        layer="Mamba2", d_state=64, d_conv=3, expand=4, headdim=32, ngroups=2, conv_bias=False, bias=True,
        dt_limit=[0.1, 0.5], chunk_size=256, norm_before_gate=False,
    )
    family, config = read_config(ORIGINAL | dict(ssm_cfg=ssm, tie_embeddings=False))
    assert (
        config.layers[0].mixer == Mamba2(96, 32, 2, 64, 3, conv_bias=False, bias=True, least_step=0.1, largest_step=0.5)
        and not config.tied
    )
    assert read_config(write_config(config, family)[1]) == (family, config)


def test_limits_of_a_step():
    def limits(value):
        mixer = read_config(CODESTRAL | dict(time_step_limit=value))[1].layers[0].mixer
        return mixer.least_step, mixer.largest_step
    assert limits([0.0, {"__float__": "Infinity"}]) == limits([0, math.inf]) == (0.0, None)
    assert limits([0.001, 0.1]) == (0.001, 0.1)
    for bad in ([0.1], [0.2, 0.1], [-0.1, 0.1], ["0", 1.0], None, [0.0, math.nan], [0.0, None], 0.1):
        with pytest.raises(ConfigError, match="time_step_limit is .* expected two numbers"):
            limits(bad)


REFUSED = [
    (CODESTRAL, dict(num_heads=64), "num_heads is 64; expected expand · hidden_size / head_dim"),
    (CODESTRAL, dict(expand=3), "num_heads is 128"),
    (CODESTRAL, dict(intermediate_size=4096), "intermediate_size is 4096; expected 8192"),
    (CODESTRAL, dict(rms_norm=False), "rms_norm is False"),
    (CODESTRAL, dict(hidden_act="gelu"), "hidden_act is 'gelu'"),
    (CODESTRAL, dict(n_groups=3), "groups = 3: expected a divisor of heads"),
    (ORIGINAL, dict(attn_layer_idx=[9], attn_cfg={"num_heads": 30}), "attn_layer_idx is .9.; expected "),
    (
        ORIGINAL, dict(ssm_cfg=dict(layer="Mamba2", norm_before_gate=True)),
        "ssm_cfg.norm_before_gate is True; expected False",
    ),
    (ORIGINAL, dict(ssm_cfg=dict(layer="Mamba2", rmsnorm=False)), "ssm_cfg.rmsnorm is False"),
    (ORIGINAL, dict(ssm_cfg=dict(layer="Mamba2", D_has_hdim=True)), "ssm_cfg.D_has_hdim is True"),
    (ORIGINAL, dict(ssm_cfg=dict(layer="Mamba2", d_ssm=768)), "ssm_cfg.d_ssm is 768"),
    (ORIGINAL, dict(ssm_cfg=dict(layer="Mamba2", headdim=100)), "ssm_cfg.headdim is 100; expected a divisor"),
]


@pytest.mark.parametrize("values, keys, cause", REFUSED)
def test_refused(values, keys, cause):
    with pytest.raises(ConfigError, match=cause):
        read_config(values | keys)


def test_an_eps_of_its_own_does_not_read_back():
    with pytest.raises(ConfigError, match="mamba2: .*eps is 0.5, and would be read as 1e-05"):
        write_config(ModelConfig(50, 32, (Layer(Mamba2(8, 8, 2, 4, 4, eps=0.5), None, NORM, pre_ffn=None),), NORM))


def test_the_norm_behind_the_gate_by_hand():
    """Two groups of two channels. A gate of 0 halves nothing: silu(0) = 0."""
    norm = GatedNorm(Mamba2(2, 2, 2, 4, 4), 1e-12)
    norm.gain.data = torch.tensor([1.0, 1.0, 10.0, 10.0])
    z = torch.full((1, 1, 4), 1.2785)                                           # silu(1.2785) = 1
    out = norm(torch.tensor([[[3.0, 4.0, 0.6, -0.8]]]), z)
    assert torch.allclose(
        out, torch.tensor([3.0, 4.0, 6.0, -8.0]) / 12.5**0.5 * torch.tensor([1.0, 1.0, 5.0, 5.0]), atol=1e-4
    )
    z[..., :2] = 0
    assert torch.equal(norm(torch.ones(1, 1, 4), z)[..., :2], torch.zeros(1, 1, 2))
