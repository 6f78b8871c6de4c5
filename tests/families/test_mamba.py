"""Mamba and Falcon-Mamba: what published configs say, what a missing key means, what is refused, rows that wait."""

import pytest
import torch

from checkpoints.families import FAMILIES, read_config, write_config
from nanollm.config import Layer, Mamba, ModelConfig, Norm
from nanollm.errors import ConfigError
from nanollm.layers.mamba import aligned, window

FALCON_7B = dict(
    model_type="falcon_mamba", architectures=["FalconMambaForCausalLM"], bos_token_id=0, conv_kernel=4,
    eos_token_id=11, expand=16, hidden_act="silu", hidden_size=4096, initializer_range=0.1, intermediate_size=8192,
    layer_norm_epsilon=1e-5, num_hidden_layers=64, pad_token_id=11, rescale_prenorm_residual=False,
    residual_in_fp32=True, state_size=16, tie_word_embeddings=False, time_step_floor=0.0001,
    time_step_init_scheme="random", time_step_max=0.1, time_step_min=0.001, time_step_rank=256, time_step_scale=1.0,
    torch_dtype="bfloat16", transformers_version="4.43.0.dev0", use_bias=False, use_cache=True, use_conv_bias=True,
    use_mambapy=False, vocab_size=65024,
)
MAMBA_130M = dict(
    d_model=768, n_layer=24, vocab_size=50277, ssm_cfg={}, rms_norm=True, residual_in_fp32=True, fused_add_norm=True,
    pad_vocab_size_multiple=8,
)
MAMBA_28B = MAMBA_130M | dict(d_model=2560, n_layer=64)


def test_falcon_mamba():
    """`expand` is 16 as published, and means nothing beside `intermediate_size`."""
    config = read_config(FALCON_7B)[1]
    mixer = Mamba(8192, 16, 4, 256, inner_norm=Norm(eps=1e-6, gain=False))
    assert config == ModelConfig(
        65024, 4096, (Layer(mixer, None, Norm(eps=1e-5), pre_ffn=None),) * 64, Norm(eps=1e-5), tied=False,
        float32_residual=True,
    )
    assert read_config(FALCON_7B | dict(mixer_rms_eps=0.25))[1].layers[0].mixer.inner_norm == Norm(eps=0.25, gain=False)
    assert write_config(config, FAMILIES["falcon_mamba"])[1]["model_type"] == "falcon_mamba"


def test_the_original_layout():
    for values, rank in ((MAMBA_130M, 48), (MAMBA_28B, 160)):
        dim, count = values["d_model"], values["n_layer"]
        family, config = read_config(values)
        norm = Norm(eps=1e-5)
        assert family.name == "state-spaces"
        assert config == ModelConfig(
            50280, dim, (Layer(Mamba(2 * dim, 16, 4, rank), None, norm, pre_ffn=None),) * count, norm, tied=True,
            float32_residual=True,
        )
        assert read_config(write_config(config, family)[1]) == (family, config)
    assert read_config(MAMBA_130M | dict(vocab_size=50280, pad_vocab_size_multiple=16))[1].vocab == 50288
    other = read_config(
        MAMBA_130M
        | dict(
            ssm_cfg=dict(
                d_state=8, d_conv=3, expand=3, dt_rank=7, conv_bias=False, bias=True, dt_min=0.01, use_fast_path=True
            )
        )
    )[1]
    assert other.layers[0].mixer == Mamba(3 * 768, 8, 3, 7, conv_bias=False, bias=True)


REFUSED = [
    (dict(rms_norm=False), "rms_norm is False; expected True"),
    (dict(d_intermediate=1024), "d_intermediate is 1024; expected 0"),
    (dict(attn_layer_idx=[9, 18]), "attn_layer_idx is .9, 18.; expected "),
    (dict(ssm_cfg=dict(layer="Mamba3")), "ssm_cfg.layer is 'Mamba3'; expected 'Mamba1' or 'Mamba2'"),
    (dict(ssm_cfg=dict(headdim=64)), "ssm_cfg.headdim = 64"),
    (dict(ssm_cfg=[]), "ssm_cfg is .* expected an object"),
    (dict(pad_vocab_size_multiple=0), "pad_vocab_size_multiple is 0"),
]


@pytest.mark.parametrize("keys, cause", REFUSED)
def test_refused(keys, cause):
    with pytest.raises(ConfigError, match=cause):
        read_config(MAMBA_130M | keys)


def test_each_family_says_what_it_has_no_key_for():
    norm = Norm(eps=1e-5)

    def stack(**more):
        return ModelConfig(
            50, 32, (Layer(Mamba(64, 4, 4, 3, **more), None, norm, pre_ffn=None),) * 2, norm, tied=True,
            float32_residual=True,
        )

    assert write_config(stack())[0].name == "mamba"
    assert write_config(stack(inner_norm=Norm(gain=False)), FAMILIES["falcon_mamba"])[1]["mixer_rms_eps"] == 1e-6
    with pytest.raises(ConfigError, match="falcon_mamba: .*gain is True, and would be read as False"):
        write_config(stack(inner_norm=Norm()), FAMILIES["falcon_mamba"])


def test_what_precedes_a_row_moves_over_its_padding():
    x = torch.arange(1.0, 5.0).expand(3, 1, 4)
    before = torch.tensor([[[-3.0, -2.0, -1.0]]]).expand(3, 1, 3)
    real = torch.tensor([[True] * 4, [False, False, True, True], [False] * 4])
    moved, front = aligned(x, before, real)
    assert moved[0].tolist() == [[1, 2, 3, 4]] and front[0].tolist() == [[-3, -2, -1]]
    assert moved[1].tolist() == [[-2, -1, 3, 4]]
    assert window(moved, front, real).tolist() == [[[2, 3, 4]], [[-1, 3, 4]], [[-3, -2, -1]]]
