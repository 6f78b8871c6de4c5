"""Persimmon's config.json. Logits: tests/fixtures/persimmon.py."""

import pytest

from checkpoints.families import FAMILIES, read_config, write_config
from nanollm.config import MLP, Attention, Layer, Norm, Rope
from nanollm.errors import ConfigError

NORM = Norm("layer", eps=1e-5, bias=True)
SIZES = "model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads"
HUB = dict(
    model_type="persimmon", vocab_size=262144, hidden_size=4096, intermediate_size=16384, num_hidden_layers=36,
    num_attention_heads=64, num_key_value_heads=64, hidden_act="relu2", layer_norm_eps=1e-5, rms_norm_eps=1e-6,
    rope_theta=25000.0, rope_scaling=None, max_position_embeddings=16384, hidden_dropout=0.6, attention_dropout=0.0,
)


def read(**keys):
    return read_config(HUB | keys)[1]


def test_persimmon():
    config = read()
    attention = Attention(64, 64, 64, Rope(25000.0, fraction=0.5), qk_norm=NORM, qkv_bias=True, out_bias=True)
    assert config.layers[0] == Layer(attention, MLP(16384, "relu2", gated=False, bias=True), NORM, pre_ffn=NORM)
    assert config.final_norm == NORM and not config.tied
    assert read_config(write_config(config, FAMILIES["persimmon"])[1])[1] == config
    bare = read_config({key: HUB[key] for key in SIZES.split()})[1]
    assert bare == read(rope_theta=10_000.0)
    assert read(qk_layernorm=False).layers[0].mixer.qk_norm is None


@pytest.mark.parametrize(
    "key, value",
    [("num_key_value_heads", 8), ("head_dim", 128), ("num_attention_heads", 60), ("hidden_act", "sigmoid")],
)
def test_refused(key, value):
    with pytest.raises(ConfigError, match=f"{key} is "):
        read(**{key: value})
