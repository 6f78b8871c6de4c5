"""Which Baichuan a config.json means, and what is refused because it could be two; and what XVERSE's says beside
Llama's keys."""

import dataclasses

import pytest

from checkpoints.families import read_config, write_config
from checkpoints.families.baichuan import BAICHUAN
from nanollm.config import MLP, Alibi, Attention, Layer, ModelConfig, Norm, Rope
from nanollm.errors import ConfigError

SIZES = dict(
    model_type="baichuan", intermediate_size=80, num_hidden_layers=2, rms_norm_eps=1e-6, hidden_act="silu",
    tie_word_embeddings=False,
)
SEVEN = dict(hidden_size=4096, num_attention_heads=32)
THIRTEEN = dict(hidden_size=5120, num_attention_heads=40)
TINY = dict(hidden_size=60, num_attention_heads=6)


def read(**keys) -> ModelConfig:
    return read_config(SIZES | keys)[1]


PUBLISHED = {
    "Baichuan-7B": (dict(SEVEN, vocab_size=64000, max_position_embeddings=4096), Rope(), False),
    "Baichuan-13B": (dict(THIRTEEN, vocab_size=64000, model_max_length=4096), None, False),
    "Baichuan2-7B": (
        dict(SEVEN, vocab_size=125696, max_position_embeddings=4096, model_max_length=4096, z_loss_weight=0), Rope(),
        True,
    ),
    "Baichuan2-13B": (dict(THIRTEEN, vocab_size=125696, model_max_length=4096, z_loss_weight=0), None, True),
    "Baichuan-13B, tuned, with a token more": (dict(THIRTEEN, vocab_size=64001, model_max_length=4096), None, False),
    "Baichuan2-7B, tuned, with three more": (
        dict(SEVEN, vocab_size=125699, max_position_embeddings=4096, model_max_length=4096, z_loss_weight=0.0),
        Rope(), True,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs(name):
    keys, rope, unit = PUBLISHED[name]
    heads, width = keys["num_attention_heads"], keys["hidden_size"]
    attention = Attention(heads, heads, width // heads, rope, alibi=None if rope else Alibi())
    norm = Norm(eps=1e-6)
    assert read(**keys) == ModelConfig(
        keys["vocab_size"], width, (Layer(attention, MLP(80), norm, None, norm),) * 2, norm, context=4096,
        unit_head=unit,
    )


@pytest.mark.parametrize(
    "keys, complaint",
    [
        (dict(TINY, vocab_size=97), "model_max_length is missing"),  # no sign of a position
        (
            dict(THIRTEEN, vocab_size=64000, max_position_embeddings=4096),
            "max_position_embeddings is 4096; expected none where hidden_size is 5120",
        ),
        (
            dict(SEVEN, vocab_size=64000, model_max_length=4096),
            "max_position_embeddings is missing; expected one where hidden_size is 4096",
        ),
        (
            dict(SEVEN, vocab_size=64000, max_position_embeddings=4096, z_loss_weight=0),
            "z_loss_weight is 0; expected none where vocab_size is 64000",
        ),
        (
            dict(TINY, vocab_size=97, max_position_embeddings=64, num_key_value_heads=2),
            "nothing here knows what these mean: num_key_value_heads = 2",
        ),
        (dict(TINY, vocab_size=97, max_position_embeddings=64, rope_theta=1e6), "nothing here knows .* rope_theta"),
        (dict(TINY, vocab_size=97, max_position_embeddings=64, hidden_act="mish"), "hidden_act is 'mish'"),
        (
            dict(TINY, vocab_size=97, max_position_embeddings=64, num_attention_heads=7),
            "num_attention_heads is 7; expected a divisor",
        ),
    ],
)
def test_refusals(keys, complaint):
    with pytest.raises(ConfigError, match=complaint):
        read(**keys)


@pytest.mark.parametrize("name", ["RoPE", "ALiBi", "unit rows"])
def test_what_is_written_reads_back(name):
    more = {
        "RoPE": dict(max_position_embeddings=64), "ALiBi": dict(model_max_length=64),
        "unit rows": dict(model_max_length=64, z_loss_weight=0),
    }[name]
    config = read(**TINY, vocab_size=97, **more)
    assert read_config(write_config(config, BAICHUAN)[1])[1] == config
    with pytest.raises(ConfigError, match="softcap is 2.0, and would be read as None"):
        layer = dataclasses.replace(config.layers[0], mixer=dataclasses.replace(config.layers[0].mixer, softcap=2.0))
        write_config(dataclasses.replace(config, layers=(layer,) * 2), BAICHUAN)


def test_llama_under_another_name_with_keys_of_its_own():
    llama = dict(
        model_type="llama", vocab_size=97, hidden_size=60, num_attention_heads=6, intermediate_size=80,
        num_hidden_layers=2,
    )
    xverse = llama | dict(
        model_type="xverse", quantization_bit=0, initializer_weight=False, max_tokenizer_truncation=6144
    )
    aquila = llama | dict(model_type="aquila", architectures=["AquilaModel"], pretraining_tp=1)
    assert read_config(xverse)[1] == read_config(aquila)[1] == read_config(llama)[1]
    with pytest.raises(ConfigError, match="quantization_bit is 8"):
        read_config(xverse | dict(quantization_bit=8))
    with pytest.raises(ConfigError, match="nothing here knows .* num_experts"):  # XVERSE-MoE has the same model_type
        read_config(xverse | dict(num_experts=64))
