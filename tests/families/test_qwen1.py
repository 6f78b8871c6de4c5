"""What the keys of Qwen's first release mean, in both layouts, and which are refused."""

import pytest

from checkpoints.families import read_config, write_config
from checkpoints.families.qwen1 import QWEN1
from nanollm.config import MLP, Attention, Layer, LogLength, ModelConfig, Norm, Rope, SteppedNTK
from nanollm.errors import ConfigError

FIRST = dict(model_type="qwen", vocab_size=97, n_embd=256, n_layer=2, n_head=2, n_positions=6144, seq_length=2048)
SECOND = dict(
    model_type="qwen", vocab_size=97, hidden_size=256, num_hidden_layers=2, num_attention_heads=2, seq_length=2048
)


def read(base: dict, **keys) -> ModelConfig:
    return read_config(base | keys)[1]


def model(eps: float, context: int, **attention) -> ModelConfig:
    norm = Norm(eps=eps)
    mixer = Attention(2, 2, 128, **{"rope": Rope(), "qkv_bias": True, **attention})
    return ModelConfig(97, 256, (Layer(mixer, MLP(11008), norm, None, norm),) * 2, norm, context=context)


def test_missing_keys_differ_between_the_layouts():
    assert read(FIRST) == model(1e-5, 6144)
    assert read(SECOND) == model(1e-6, 8192, rope=Rope(scaling=SteppedNTK(2048)), growth=LogLength(2048))
    assert read(FIRST, use_dynamic_ntk=True, use_logn_attn=True, layer_norm_epsilon=1e-6, n_positions=8192) == read(
        SECOND
    )
    assert read(SECOND, use_dynamic_ntk=False, use_logn_attn=False) == model(1e-6, 8192)


def test_each_of_the_two_stretches_alone():
    assert (
        read(SECOND, use_logn_attn=False).layers[0].mixer
        == model(1e-6, 1, rope=Rope(scaling=SteppedNTK(2048))).layers[0].mixer
    )
    assert read(SECOND, use_dynamic_ntk=False).layers[0].mixer == model(1e-6, 1, growth=LogLength(2048)).layers[0].mixer
    without = {key: value for key, value in SECOND.items() if key != "seq_length"}
    assert read(without, use_dynamic_ntk=False, use_logn_attn=False).context == 8192
    for one, other in (("use_dynamic_ntk", "use_logn_attn"), ("use_logn_attn", "use_dynamic_ntk")):
        with pytest.raises(ConfigError, match="seq_length is missing"):
            read(without, **{one: True, other: False})


@pytest.mark.parametrize("keys, complaint", [
    (dict(no_bias=False), "no_bias is False"),
    (dict(rotary_pct=0.5), "rotary_pct is 0.5"),
    (dict(scale_attn_weights=False), "scale_attn_weights is False"),
    (dict(use_cache_quantization=True), "use_cache_quantization is True"),
    (dict(rope_theta=1e6), "rope_theta is 1000000.0; expected 10000.0"),
    (dict(padded_vocab_size=128), "padded_vocab_size is 128; expected 97"),
    (dict(kv_channels=64), "kv_channels is 64; expected hidden_size / num_attention_heads, which is 256 / 2"),
    (dict(intermediate_size=81), "intermediate_size is 81; expected an even number"),
    (dict(n_inner=512), "n_inner is 512"),
    (dict(num_key_value_heads=1), "nothing here knows .* num_key_value_heads"),
    (dict(visual={"layers": 48}), "nothing here knows .* visual"),                          # Qwen-VL
])
def test_refusals(keys, complaint):
    with pytest.raises(ConfigError, match=complaint):
        read(SECOND, **keys)


@pytest.mark.parametrize("keys, complaint", [
    (dict(pos_emb="learned"), "pos_emb is 'learned'"),
    (dict(activation="gelu"), "activation is 'gelu'"),
    (dict(apply_residual_connection_post_layernorm=True), "apply_residual_connection_post_layernorm is True"),
    (dict(hidden_size=256), "nothing here knows .* hidden_size"),                           # both layouts at once
])
def test_refusals_in_the_first_layout(keys, complaint):
    with pytest.raises(ConfigError, match=complaint):
        read(FIRST, **keys)


@pytest.mark.parametrize(
    "keys",
    [
        {}, dict(use_logn_attn=False), dict(use_dynamic_ntk=False),
        dict(use_dynamic_ntk=False, use_logn_attn=False, rotary_emb_base=1e6),
    ],
)
def test_what_is_written_reads_back(keys):
    config = read(SECOND, **keys)
    assert read_config(write_config(config, QWEN1)[1])[1] == config
