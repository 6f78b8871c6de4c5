"""What the keys of GLM-4 in the layout of transformers mean."""

import pytest

from checkpoints.families import read_config, write_config
from checkpoints.families.glm import GLM, GLM4
from nanollm.config import MLP, Attention, Layer, ModelConfig, Norm, Rope
from nanollm.errors import ConfigError

SIZES = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6)


def read(kind: str, **keys) -> ModelConfig:
    return read_config(dict(model_type=kind, **SIZES) | keys)[1]


def test_defaults():
    norm, attention = Norm(eps=1.5625e-7), Attention(6, 2, 128, Rope(10_000.0, "interleaved", 0.5), qkv_bias=True)
    assert read("glm") == ModelConfig(97, 48, (Layer(attention, MLP(80), norm, None, norm),) * 2, norm, context=131072)
    assert read("glm4") == ModelConfig(
        97, 48, (Layer(attention, MLP(80), norm, norm, norm, norm),) * 2, norm, context=131072
    )


def test_the_part_that_turns_is_written_though_it_be_the_whole():
    config = read("glm", partial_rotary_factor=1.0)
    assert config.layers[0].mixer.rope.fraction == 1.0
    for key in ("rope_parameters", "rope_scaling"):                      # each dialect by itself
        values = {name: value for name, value in write_config(config, GLM)[1].items() if name != key}
        assert read_config(values)[1] == config


def test_refusals():
    with pytest.raises(ConfigError, match="post_mixer is .* would be read as None"):
        write_config(read("glm4"), GLM)
    with pytest.raises(ConfigError, match="post_mixer is None, and would be read as Norm"):
        write_config(read("glm"), GLM4)
    with pytest.raises(ConfigError, match="attention_bias is 'qkv'; expected true or false"):
        read("glm", attention_bias="qkv")
