"""Nemotron-NAS: the published numbers, and what is refused."""

import pytest

from checkpoints.families import FAMILIES, read_config, write_config
from nanollm.config import MLP, Attention, Layer
from nanollm.errors import ConfigError

ATTENTION = dict(num_sink_tokens=None, replace_with_linear=False, sparsify=None, unshifted_sink=False,
                 use_prefill_window_in_sink_attention=False, window_length=None)


def block(group: int | None, times: float | None, **more: object) -> dict:
    attention = {**ATTENTION, "n_heads_in_group": group, "no_op": group is None, **more}
    return {"attention": attention,
            "ffn": {"ffn_mult": times, "no_op": times is None, "replace_with_linear": False, "sparsify": None}}


SUPER = dict(  # the numbers of Llama-3.3-Nemotron-Super-49B-v1, and some of its layers
    model_type="nemotron-nas", architectures=["DeciLMForCausalLM"], attention_bias=False, hidden_act="silu",
    hidden_size=8192, intermediate_size=None, max_position_embeddings=131072, mlp_bias=False, num_attention_heads=64,
    num_key_value_heads=None, pretraining_tp=1, rms_norm_eps=1e-5, rope_theta=500000.0, tie_word_embeddings=False,
    rope_scaling=dict(factor=8.0, high_freq_factor=4.0, low_freq_factor=1.0, original_max_position_embeddings=8192,
                      rope_type="llama3"),
    vocab_size=128256, num_hidden_layers=5,
    block_configs=[block(8, 2.625), block(8, 5.25), block(None, 1.3125), block(None, 0.5), block(16, None)],
)


def test_super():
    config = read_config(SUPER)[1]
    assert [each.ffn and each.ffn.hidden for each in config.layers] == [14336, 28672, 7168, 2816, None]
    assert [each.mixer and each.mixer.kv_heads for each in config.layers] == [8, 8, None, None, 4]
    first = config.layers[0]
    rope, norm = first.mixer.rope, first.pre_ffn
    assert first == Layer(Attention(64, 8, 128, rope), MLP(14336), norm, pre_ffn=norm)
    assert config.layers[2] == Layer(None, MLP(7168), None, pre_ffn=norm)
    assert config.layers[4] == Layer(Attention(64, 4, 128, rope), None, norm, pre_ffn=None)
    assert read_config(write_config(config, FAMILIES["nemotron-nas"])[1])[1] == config


@pytest.mark.parametrize("blocks, cause", [
    ([block(None, None)], r"block_configs\[0\].attention.no_op is True; expected false"),
    ([block(8, 1.0, window_length=4096)], r"block_configs\[0\].attention.window_length is 4096; expected None"),
    ([block(8, 1.0, replace_with_linear=True)], "replace_with_linear is True"),
    ([block(7, 1.0)], "n_heads_in_group is 7; expected a divisor of num_attention_heads"),
    ([block(8, 1.0, gate=2)], r"block_configs\[0\].attention.gate = 2"),
    ([{"attention": {}}], r"block_configs\[0\] is .*; expected an object with attention and ffn"),
    ([], "block_configs is .*; expected a list of objects"),
    ([block(8, 1.0)], "num_hidden_layers is 5; expected 1"),
])
def test_refused(blocks, cause):
    with pytest.raises(ConfigError, match=cause):
        read_config(SUPER | {"block_configs": blocks})
