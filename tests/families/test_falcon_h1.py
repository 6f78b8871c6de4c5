"""Falcon-H1: the multipliers and where they stand, what is refused, and each multiplier by itself."""

import pytest
import torch

from checkpoints.families import FAMILIES, read_config, write_config
from nanollm.config import MLP, Attention, Layer, Mamba2, ModelConfig, Norm, ParallelMixer, Rope, ScaledMLP
from nanollm.errors import ConfigError
from nanollm.layers.mlp import MLP as MLPModule
from nanollm.layers.scaled_mlp import ScaledMLP as ScaledMLPModule
from nanollm.model import Decoder
from tests.oracles import make_loud

HALF_B = dict(  # the shape of Falcon-H1-0.5B
    model_type="falcon_h1", architectures=["FalconH1ForCausalLM"], attention_bias=False, attention_dropout=0.0,
    attention_in_multiplier=1.0, attention_out_multiplier=0.9375, attn_layer_indices=None, bos_token_id=1,
    embedding_multiplier=5.656854249492381, eos_token_id=11, head_dim=64, hidden_act="silu", hidden_size=1024,
    initializer_range=0.02, intermediate_size=2048, key_multiplier=0.39, lm_head_multiplier=0.0390625,
    mamba_chunk_size=128, mamba_conv_bias=True, mamba_d_conv=4, mamba_d_head=64, mamba_d_ssm=1536, mamba_d_state=128,
    mamba_expand=2, mamba_n_groups=1, mamba_n_heads=24, mamba_norm_before_gate=False, mamba_proj_bias=False,
    mamba_rms_norm=False, mamba_use_mlp=True, max_position_embeddings=16384, mlp_bias=False,
    mlp_multipliers=[0.8838834764831844, 0.5859375], num_attention_heads=8, num_hidden_layers=36,
    num_key_value_heads=2, num_logits_to_keep=1, pad_token_id=0, projectors_bias=False, rms_norm_eps=1e-5,
    rope_scaling=None, rope_theta=1e11, ssm_in_multiplier=1.25,
    ssm_multipliers=[0.3535533905932738, 0.25, 0.3535533905932738, 0.5, 0.3535533905932738],
    ssm_out_multiplier=0.23570226039551587, tie_word_embeddings=False, torch_dtype="bfloat16", use_cache=True,
    vocab_size=32784,
)
NORM = Norm(eps=1e-5)


def test_half_a_billion():
    config = read_config(HALF_B)[1]
    scales = (0.3535533905932738, 0.25, 0.3535533905932738, 0.5, 0.3535533905932738)
    mixer = ParallelMixer(
        Attention(8, 2, 64, Rope(1e11)), Mamba2(24, 64, 1, 128, 4, eps=None, scales=scales), 1.0, 0.9375, 1.25,
        0.23570226039551587, 0.39,
    )
    ffn = ScaledMLP(MLP(2048), 0.8838834764831844, 0.5859375)
    assert set(config.layers) == {Layer(mixer, ffn, NORM, pre_ffn=NORM)} and config.head_scale == 0.0390625
    assert read_config(write_config(config, FAMILIES["falcon_h1"])[1])[1] == config


def test_defaults_and_a_norm():
    plain = {key: value for key, value in HALF_B.items() if "multiplier" not in key}
    mixer = read_config(plain | dict(mamba_rms_norm=True, mamba_d_head="auto"))[1].layers[0].mixer
    assert mixer == ParallelMixer(Attention(8, 2, 64, Rope(1e11)), Mamba2(24, 64, 1, 128, 4, eps=1e-5))
    wide = read_config(HALF_B | dict(mamba_d_ssm=None, mamba_n_heads=32))[1].layers[0].mixer
    assert wide.scan.heads * wide.scan.head_dim == 2048


@pytest.mark.parametrize("keys, cause", [
    (dict(mamba_n_heads=25), "mamba_n_heads is 25; expected mamba_d_ssm / mamba_d_head"),
    (dict(mamba_rms_norm=True, mamba_norm_before_gate=True), "mamba_norm_before_gate is True; expected false"),
    (dict(ssm_multipliers=[1.0] * 4), "ssm_multipliers is .*expected 5 finite numbers"),
    (dict(mlp_multipliers=[1.0, -1.0]), "mlp_multipliers is .*expected 2 finite numbers"),
    (dict(projectors_bias=True), "projectors_bias is True; expected False"),
    (dict(key_multiplier=0), "key_multiplier is 0"),
    (dict(attn_layer_indices=[1]), "attn_layer_indices is .1."),
])
def test_refused(keys, cause):
    with pytest.raises(ConfigError, match=cause):
        read_config(HALF_B | keys)


def test_the_multipliers_of_the_mlp_by_hand():
    scaled, plain = ScaledMLPModule(ScaledMLP(MLP(24), 0.5, 3.0), 16), MLPModule(MLP(24), 16)
    make_loud(plain)
    scaled.load_state_dict(plain.state_dict())
    plain.gate.weight.data *= 0.5
    x = torch.randn(2, 5, 16)
    assert torch.allclose(scaled(x), 3 * plain(x), atol=1e-5)


def test_a_multiplier_can_be_moved_into_the_weights():
    """Which is what they are for: a model with them is the one without them whose weights are multiplied."""
    def model(mixer: ParallelMixer) -> Decoder:
        return Decoder(ModelConfig(50, 32, (Layer(mixer, MLP(48)),)))

    attention, scan = Attention(4, 2, 8, Rope()), Mamba2(6, 8, 2, 5, 3, eps=None)
    scales = (0.5, 1.5, 0.8, 1.2, 0.7)
    ours = model(ParallelMixer(attention, Mamba2(6, 8, 2, 5, 3, eps=None, scales=scales), 1.5, 0.5, 0.7, 2.0, 0.4))
    plain = model(ParallelMixer(attention, scan))
    make_loud(ours)
    plain.load_state_dict(ours.state_dict())
    mixer = plain.layers[0].mixer
    for part, scale in ((mixer.attention.q, 1.5), (mixer.attention.k, 1.5 * 0.4), (mixer.attention.v, 1.5),
                        (mixer.attention.o, 0.5), (mixer.scan.in_proj, 0.7), (mixer.scan.out_proj, 2.0)):
        part.weight.data *= scale
    for rows, scale in zip(mixer.scan.in_proj.weight.data.split([48, 48, 10, 10, 6]), scales, strict=True):
        rows *= scale
    x = torch.randint(0, 50, (2, 20))
    assert torch.allclose(ours(x), plain(x), atol=1e-4)
