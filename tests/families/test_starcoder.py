"""StarCoder2's config.json. Logits: tests/fixtures/starcoder.py."""

import pytest

from checkpoints.families import FAMILIES, read_config, write_config
from nanollm.config import MLP, Attention, Layer, Norm, Rope
from nanollm.errors import ConfigError

NORM = Norm("layer", eps=1e-5, bias=True)
SIZES = "model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads"
HUB = dict(
    model_type="starcoder2", vocab_size=49152, hidden_size=3072, intermediate_size=12288, num_hidden_layers=30,
    num_attention_heads=24, num_key_value_heads=2, activation_function="gelu", hidden_act="gelu_pytorch_tanh",
    layer_norm_epsilon=1e-5, norm_epsilon=1e-5, norm_type="layer_norm", mlp_type="default", use_bias=True,
    rope_theta=999999.4420358813, sliding_window=4096, max_position_embeddings=16384, scale_attn_weights=True,
    attention_softmax_in_fp32=True, scale_attention_softmax_in_fp32=True, embedding_dropout=0.1, residual_dropout=0.1,
)


def read(**keys):
    return read_config(HUB | keys)[1]


def test_starcoder2():
    config = read()
    attention = Attention(24, 2, 128, Rope(999999.4420358813), 4096, qkv_bias=True, out_bias=True)
    assert config.layers[0] == Layer(attention, MLP(12288, "gelu_tanh", gated=False, bias=True), NORM, pre_ffn=NORM)
    assert config.final_norm == NORM and config.tied
    assert not read(tie_word_embeddings=False).tied                    # 15B
    bare = read_config({key: HUB[key] for key in SIZES.split()})[1]
    assert bare.layers[0].mixer == Attention(24, 2, 128, Rope(), qkv_bias=True, out_bias=True) and bare.context == 4096
    assert bare.layers[0].ffn == config.layers[0].ffn
    for each in (config, read(use_bias=False, sliding_window=None)):
        assert read_config(write_config(each, FAMILIES["starcoder2"])[1])[1] == each


@pytest.mark.parametrize(
    "key, value",
    [
        ("norm_type", "rms_norm"), ("mlp_type", "gated"), ("layer_norm_epsilon", 1e-6), ("scale_attn_weights", False),
        ("hidden_act", "sigmoid"), ("use_bias", None),
    ],
)
def test_refused(key, value):
    with pytest.raises(ConfigError, match=f"{key} is "):
        read(**{key: value})
