"""MPT's config.json and its attn_config: the published sizes, and the variants that transformers passes over in
silence, refused."""

import pytest
import torch

from checkpoints.families import FAMILIES, read_config, write_config
from nanollm.config import MLP, Alibi, Attention, Layer, ModelConfig, Norm
from nanollm.errors import ConfigError
from nanollm.model import Decoder

ATTENTION = dict(
    alibi=True, alibi_bias_max=8, attn_impl="torch", attn_pdrop=0, attn_type="multihead_attention",
    attn_uses_sequence_id=False, clip_qkv=None, prefix_lm=False, qk_ln=False, softmax_scale=None,
)
MPT_7B = dict(
    model_type="mpt", d_model=4096, emb_pdrop=0, embedding_fraction=1.0, expansion_ratio=4,
    init_config={"name": "kaiming_normal_", "fan_mode": "fan_in"}, init_device="cpu", learned_pos_emb=True,
    logit_scale=None, max_seq_len=2048, n_heads=32, n_layers=32, no_bias=True, norm_type="low_precision_layernorm",
    resid_pdrop=0, tokenizer_name="EleutherAI/gpt-neox-20b", use_cache=False, verbose=0, vocab_size=50432,
    attn_config=ATTENTION,
)
NORM = Norm("layer", 1e-5)


def read(attention: dict | None = None, **keys) -> ModelConfig:
    return read_config(MPT_7B | {"attn_config": ATTENTION | (attention or {})} | keys)[1]


def test_published_sizes():
    layer = Layer(Attention(32, 32, 128, alibi=Alibi()), MLP(16384, "gelu", gated=False), NORM, pre_ffn=NORM)
    assert (
        read()
        == ModelConfig(50432, 4096, (layer,) * 32, NORM, tied=True, context=2048)
        == read(attn_config={})
        == read(attn_config=None)
    )
    with torch.device("meta"):
        assert sum(p.numel() for p in Decoder(read()).parameters()) == 6_649_286_656


def test_attention():
    assert (
        read({"clip_qkv": 6}).layers[0].mixer.clip == 6.0 and read({"softmax_scale": 0.1}).layers[0].mixer.scale == 0.1
    )


def test_what_is_written_reads_back():
    for config in (read(), read({"clip_qkv": 6, "softmax_scale": 0.1}, tie_word_embeddings=False, n_heads=64)):
        assert read_config(write_config(config, FAMILIES["mpt"])[1])[1] == config


@pytest.mark.parametrize("attention, keys, complaint", [
    ({"alibi": False}, {}, "attn_config.alibi is False; expected True"),
    ({"alibi_bias_max": 16}, {}, "attn_config.alibi_bias_max is 16; expected 8"),
    ({"qk_ln": True}, {}, "attn_config.qk_ln is True; expected False"),
    ({"prefix_lm": True}, {}, "attn_config.prefix_lm is True; expected False"),
    ({"attn_uses_sequence_id": True}, {}, "attn_config.attn_uses_sequence_id is True; expected False"),
    ({"attn_type": "multiquery_attention"}, {}, "attn_config.attn_type is 'multiquery_attention'"),
    ({"rope": True}, {}, "attn_config.rope is True; expected False"),
    ({"kv_n_heads": 8}, {}, "nothing here knows what these mean: attn_config.kv_n_heads = 8"),
    ({"clip_qkv": 0}, {}, "attn_config.clip_qkv is 0; expected a finite number above 0"),
    ({}, {"attn_config": 8}, "attn_config is 8; expected an object"),
    ({}, {"no_bias": False}, "no_bias is False; expected True"),
    ({}, {"norm_type": "rmsnorm"}, "norm_type is 'rmsnorm'"),
    ({}, {"logit_scale": "inv_sqrt_d_model"}, "logit_scale is 'inv_sqrt_d_model'; expected None"),
    ({}, {"expansion_ratio": 3}, "expansion_ratio is 3; expected 4"),
    ({}, {"ffn_config": {"ffn_type": "mptglu"}}, "nothing here knows what these mean: ffn_config"),
])
def test_refusals(attention, keys, complaint):
    with pytest.raises(ConfigError, match=complaint):
        read(attention, **keys)
