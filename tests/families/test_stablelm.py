"""StableLM's config.json, and its norms a head on disk. Logits: tests/fixtures/stablelm.py."""

import pytest
import torch
from safetensors.torch import load_file

import checkpoints
from checkpoints.families import FAMILIES, read_config, write_config
from nanollm.config import MLP, Attention, Layer, Norm, Rope
from nanollm.errors import ConfigError
from tests.fixtures import FIXTURES
from tests.oracles import write

NORM = Norm("layer", eps=1e-5, bias=True)
SIZES = "model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads"
HUB = dict(
    model_type="stablelm", vocab_size=100352, hidden_size=2048, intermediate_size=5632, num_hidden_layers=24,
    num_attention_heads=32, num_key_value_heads=32, hidden_act="silu", layer_norm_eps=1e-5,
    partial_rotary_factor=0.25, rope_theta=10000, use_qkv_bias=True, max_position_embeddings=4096,
    tie_word_embeddings=False,
)


def read(**keys):
    return read_config(HUB | keys)[1]


def test_stablelm():
    small = read()
    assert small.layers[0] == Layer(
        Attention(32, 32, 64, Rope(fraction=0.25), qkv_bias=True), MLP(5632), NORM, pre_ffn=NORM
    )
    assert not small.tied and small.final_norm == NORM
    large = read(
        hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_key_value_heads=8, qk_layernorm=True,
        use_parallel_residual=True, use_qkv_bias=False,
    )
    attention = Attention(32, 8, 160, Rope(fraction=0.25), qk_norm=Norm("layer", eps=1e-5, scope="each"))
    assert large.layers[0] == Layer(attention, MLP(13824), NORM, pre_ffn=None, parallel=True)
    bare = read_config({key: HUB[key] for key in SIZES.split()})[1]
    assert bare == read(use_qkv_bias=False)
    for each in (small, large, read(partial_rotary_factor=1.0)):
        assert read_config(write_config(each, FAMILIES["stablelm"])[1])[1].layers == each.layers


def test_row_h_of_a_gain_is_the_norm_of_head_h(tmp_path):
    write(FIXTURES["stablelm-2-12b"], tmp_path)
    stored, model = load_file(tmp_path / "model.safetensors"), checkpoints.load(tmp_path)
    for part, heads in (("q", 4), ("k", 2)):
        gain = model.get_parameter(f"layers.1.mixer.{part}_norm.gain")
        assert len(gain) == heads
        assert all(
            torch.equal(gain[h], stored[f"model.layers.1.self_attn.{part}_layernorm.norms.{h}.weight"])
            for h in range(heads)
        )


@pytest.mark.parametrize(
    "key, value, cause",
    [
        ("head_dim", 32, "head_dim is 32"), ("num_attention_heads", 30, "num_attention_heads is 30"),
        ("qk_layernorm", None, "qk_layernorm is None"),
        ("partial_rotary_factor", 1.5, "fraction = 1.5: expected at most 1"),
        ("partial_rotary_factor", 0.01, "an even number of rotated channels"),
    ],
)
def test_refused(key, value, cause):
    with pytest.raises(ConfigError, match=cause):
        read(**{key: value})
