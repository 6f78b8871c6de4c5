"""BLOOM's config.json by its several names, what is refused; and a sequence far longer than the fixtures'."""

import dataclasses

import pytest
import torch

import checkpoints
from checkpoints.families import FAMILIES, read_config, write_config
from nanollm.config import MLP, Alibi, Attention, Layer, ModelConfig, Norm
from nanollm.errors import ConfigError
from nanollm.model import Decoder
from tests.fixtures import FIXTURES
from tests.oracles import difference, reference_logits, tokens, write

BLOOM = dict(
    model_type="bloom", apply_residual_connection_post_layernorm=False, attention_dropout=0.0,
    attention_softmax_in_fp32=True, hidden_dropout=0.0, initializer_range=0.02, layer_norm_epsilon=1e-5,
    masked_softmax_fusion=True, n_embed=14336, n_layer=70, num_attention_heads=112, pretraining_tp=4,
    slow_but_exact=False, unk_token_id=0, use_cache=True, vocab_size=250880,
)
BLOOM_560M = dict(
    model_type="bloom", bias_dropout_fusion=True, hidden_size=1024, layer_norm_epsilon=1e-5, n_head=16, n_inner=None,
    n_layer=24, offset_alibi=100, seq_length=2048, skip_bias_add=True, skip_bias_add_qkv=False, vocab_size=250880,
)
NORM = Norm("layer", 1e-5, bias=True)


def read(base: dict = BLOOM, **keys) -> ModelConfig:
    return read_config(base | keys)[1]


def test_published_sizes():
    layer = Layer(
        Attention(112, 112, 128, alibi=Alibi(), qkv_bias=True, out_bias=True),
        MLP(4 * 14336, "gelu_tanh", False, True), NORM, pre_ffn=NORM,
    )
    assert read() == ModelConfig(250880, 14336, (layer,) * 70, NORM, tied=True, embed_norm=NORM)
    assert read(BLOOM_560M).context == 2048
    with torch.device("meta"):
        assert sum(p.numel() for p in Decoder(read()).parameters()) == 176_247_271_424
        assert sum(p.numel() for p in Decoder(read(BLOOM_560M)).parameters()) == 559_214_592


def test_what_is_written_reads_back():
    for config in (read(), read(BLOOM_560M, tie_word_embeddings=False)):
        assert read_config(write_config(config, FAMILIES["bloom"])[1])[1] == config


@pytest.mark.parametrize(
    "keys, complaint",
    [
        (
            {"apply_residual_connection_post_layernorm": True},
            "apply_residual_connection_post_layernorm is True; expected False",
        ),
        ({"n_inner": 4096}, "n_inner is 4096; expected None"),
        ({"n_head": 16}, "num_attention_heads is 112; expected 16"),
        ({"hidden_size": 1024}, "n_embed is 14336; expected 1024"),
        ({"num_attention_heads": 100}, "num_attention_heads is 100; expected a divisor"),
        ({"alibi": False}, "nothing here knows what these mean: alibi"),
    ],
)
def test_refusals(keys, complaint):
    with pytest.raises(ConfigError, match=complaint):
        read(**keys)


def test_distance_and_key_position_are_one_penalty_far_out(tmp_path):
    """slope × key position there, slope × distance here: at 300 tokens, six heads, 300 × 1/2 is the largest."""
    fixture = dataclasses.replace(FIXTURES["bloom-176b"], gain=0.15)
    theirs, x = write(fixture, tmp_path), tokens(fixture, 1, 300)
    assert difference(checkpoints.load(tmp_path)(x), reference_logits(fixture, theirs, x)) < 1e-5
