"""What the keys of InternLM 1, 2 and 3 mean and which are refused."""

import pytest

from checkpoints.families import read_config, write_config
from checkpoints.families.internlm import INTERNLM, INTERNLM2, INTERNLM3
from nanollm.config import MLP, Attention, DynamicNTK, Layer, Linear, ModelConfig, Norm, Rope
from nanollm.errors import ConfigError

SIZES = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6)


def read(kind: str, **keys) -> ModelConfig:
    return read_config(dict(model_type=kind, **SIZES) | keys)[1]


def rope(kind: str, **keys) -> Rope:
    return read(kind, **keys).layers[0].mixer.rope


def test_defaults():
    norm, attention = Norm(eps=1e-6), Attention(6, 6, 8, Rope(1e4), qkv_bias=True, out_bias=True)
    assert (
        read("internlm")
        == read("internlm2")
        == ModelConfig(97, 48, (Layer(attention, MLP(80), norm, None, norm),) * 2, norm, context=2048)
    )
    norm = Norm(eps=1e-5)
    assert read("internlm3") == ModelConfig(
        97, 48, (Layer(Attention(6, 2, 128, Rope(1e4)), MLP(80), norm, None, norm),) * 2, norm, context=32768
    )


def test_rotary():
    assert rope("internlm", rotary={"base": 10000, "type": "dynamic"}) == Rope(1e4, scaling=DynamicNTK(1.0, 2048))
    stretched = rope(
        "internlm", rotary={"base": 5e4, "type": "dynamic", "scaling_factor": 2.0}, max_position_embeddings=4096
    )
    assert stretched == Rope(5e4, scaling=DynamicNTK(2.0, 4096))
    assert rope("internlm", rotary={"base": 10000, "type": "origin"}) == rope("internlm") == Rope(1e4)
    # the 20B says both, and both mean the same base
    assert rope(
        "internlm", rotary={"base": 10000, "type": "dynamic"}, rope_theta=10000.0, rope_scaling=None
    ).scaling == DynamicNTK(1.0, 2048)
    assert rope("internlm2", rope_theta=1e6, rope_scaling={"type": "linear", "factor": 2.0}) == Rope(
        1e6, scaling=Linear(2.0)
    )


def test_internlm3_in_both_dialects():
    for qkv, rest in (("qkv_bias", "bias"), ("attention_bias", "mlp_bias")):
        layer = read("internlm3", **{qkv: True, rest: True}).layers[0]
        assert layer.mixer.qkv_bias and layer.mixer.out_bias and layer.ffn.bias


@pytest.mark.parametrize(
    "kind, keys, complaint",
    [
        (
            "internlm", dict(rotary={"base": 10000, "type": "linear"}),
            "rotary.type is 'linear'; expected 'dynamic' or 'origin'",
        ),
        ("internlm", dict(rotary={"type": "dynamic"}), "rotary.base is missing"),
        (
            "internlm", dict(rotary={"base": 10000, "type": "dynamic", "beta": 2}),
            "nothing here knows what these mean: rotary.beta",
        ),
        (
            "internlm", dict(rotary={"base": 10000, "type": "dynamic"}, rope_theta=5e5),
            "rope_theta is 500000.0; expected 10000.0",
        ),
        (
            "internlm",
            dict(rotary={"base": 10000, "type": "dynamic"}, rope_scaling={"type": "dynamic", "factor": 2.0}),
            "rope_scaling is .* None",
        ),
        ("internlm2", dict(head_dim=16), "head_dim is 16; expected 8 or None"),
        ("internlm3", dict(qkv_bias=True, bias=False), "bias is False; expected True"),
        ("internlm3", dict(qkv_bias=True), "bias is missing; expected True"),
        ("internlm3", dict(attention_bias=False, mlp_bias=True), "mlp_bias is True; expected False"),
    ],
)
def test_refusals(kind, keys, complaint):
    with pytest.raises(ConfigError, match=complaint):
        read(kind, **keys)


def test_written_anew_it_reads_back():
    stretched = dict(rope_scaling={"type": "dynamic", "factor": 2.0}, num_key_value_heads=2)
    for family, config in (
        (INTERNLM, read("internlm", rotary={"base": 10000, "type": "dynamic"})),
        (INTERNLM2, read("internlm2", bias=False, **stretched)),
        (INTERNLM3, read("internlm3", qkv_bias=True, bias=True, **stretched)),
    ):
        assert write_config(config, family)[0] is family                 # write_config compares what it reads back
