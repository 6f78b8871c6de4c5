"""Phi's config.json: the published sizes, both dialects, what is refused."""

import pytest
import torch

from checkpoints.families import FAMILIES, read_config, write_config
from nanollm.config import MLP, Attention, Layer, ModelConfig, Norm, Rope
from nanollm.errors import ConfigError
from nanollm.model import Decoder

PHI2 = dict(
    model_type="phi", attention_dropout=0.0, embd_pdrop=0.0, hidden_act="gelu_new", hidden_size=2560,
    initializer_range=0.02, intermediate_size=10240, layer_norm_eps=1e-5, max_position_embeddings=2048,
    num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=32, partial_rotary_factor=0.4,
    qk_layernorm=False, resid_pdrop=0.1, rope_scaling=None, rope_theta=10000.0, tie_word_embeddings=False,
    use_cache=True, vocab_size=51200,
)
NORM = Norm("layer", 1e-5, bias=True)


def read(**keys) -> ModelConfig:
    return read_config(PHI2 | keys)[1]


def test_published_sizes():
    layer = Layer(
        Attention(32, 32, 80, Rope(fraction=0.4), qkv_bias=True, out_bias=True), MLP(10240, "gelu_tanh", False, True),
        NORM, pre_ffn=None, parallel=True,
    )
    assert read() == ModelConfig(51200, 2560, (layer,) * 32, NORM, context=2048, head_bias=True)
    with torch.device("meta"):
        assert sum(p.numel() for p in Decoder(read()).parameters()) == 2_779_683_840
        smaller = read(
            hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, partial_rotary_factor=0.5
        )  # Phi-1 and Phi-1.5
        assert sum(p.numel() for p in Decoder(smaller).parameters()) == 1_418_270_720


def test_both_dialects_read_alike():
    bare = {
        key: value for key, value in PHI2.items() if key not in ("partial_rotary_factor", "rope_theta", "rope_scaling")
    }
    assert (
        read_config(
            bare | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.4}}
        )[1]
        == read()
    )
    for half in (
        {}, {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    ):  # a missing fraction means a half
        assert read_config(bare | half)[1] == read(partial_rotary_factor=0.5)


def test_what_is_written_reads_back():
    for config in (
        read(), read(partial_rotary_factor=1.0),
        read(qk_layernorm=True, num_key_value_heads=8, tie_word_embeddings=True),
    ):
        assert read_config(write_config(config, FAMILIES["phi"])[1])[1] == config


@pytest.mark.parametrize(
    "keys, complaint",
    [
        ({"model_type": "mixformer-sequential"}, "model_type is 'mixformer-sequential'; .*checkpoints.families lists"),
        ({"partial_rotary_factor": 0.9375}, "an even number of rotated channels, not 75 of 80"),
        ({"hidden_act": "mish"}, "hidden_act is 'mish'"),
        ({"num_attention_heads": 33}, "num_attention_heads is 33; expected a divisor"),
        ({"qk_layernorm": 0}, "qk_layernorm is 0; expected true or false"),
        (
            {"n_embd": 2560, "rotary_dim": 32}, "nothing here knows what these mean: n_embd = 2560, rotary_dim = 32",
        ),  # an early upload's
    ],
)
def test_refusals(keys, complaint):
    with pytest.raises(ConfigError, match=complaint):
        read(**keys)
