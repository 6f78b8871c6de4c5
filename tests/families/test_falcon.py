"""Falcon's wirings and its first names, what is refused; and its ALiBi where bfloat16 no longer holds every
position."""

import pytest
import torch

import checkpoints
from checkpoints.families import read_config, write_config
from nanollm.cache import Cache
from nanollm.config import MLP, Alibi, Attention, Layer, ModelConfig, Norm, Rope
from nanollm.errors import ConfigError
from nanollm.model import Decoder
from tests.fixtures import FIXTURES
from tests.oracles import difference, reference_logits, tokens, write

COMMON = dict(
    apply_residual_connection_post_layernorm=False, attention_dropout=0.0, hidden_dropout=0.0, initializer_range=0.02,
    layer_norm_epsilon=1e-5, use_cache=True, vocab_size=65024,
)
F7B = COMMON | dict(
    model_type="falcon", alibi=False, bias=False, hidden_size=4544, multi_query=True, new_decoder_architecture=False,
    num_attention_heads=71, num_hidden_layers=32, num_kv_heads=71, parallel_attn=True,
)
F7B_FIRST = COMMON | dict(
    model_type="RefinedWebModel", alibi=False, bias=False, hidden_size=4544, multi_query=True, n_head=71, n_layer=32,
    parallel_attn=True,
)
F40B = COMMON | dict(
    model_type="falcon", alibi=False, bias=False, hidden_size=8192, new_decoder_architecture=True,
    num_attention_heads=128, num_hidden_layers=60, num_kv_heads=8, parallel_attn=True,
)
F40B_FIRST = COMMON | dict(
    model_type="RefinedWeb", alibi=False, bias=False, hidden_size=8192, n_head=128, n_head_kv=8, n_layer=60,
    parallel_attn=True,
)
F11B = COMMON | dict(
    model_type="falcon", activation="gelu", alibi=False, bias=False, ff_factor=4, ffn_hidden_size=16384,
    hidden_size=4096, max_position_embeddings=8192, multi_query=True, new_decoder_architecture=True,
    num_attention_heads=32, num_hidden_layers=60, num_kv_heads=8, num_ln_in_parallel_attn=1, parallel_attn=True,
    rope_scaling=None, rope_theta=500042.0, tie_word_embeddings=False,
)
RW1B = COMMON | dict(
    model_type="falcon", alibi=True, bias=True, hidden_size=2048, multi_query=False, new_decoder_architecture=False,
    num_attention_heads=32, num_hidden_layers=24, parallel_attn=False, vocab_size=50304,
)
NORM = Norm("layer", 1e-5, bias=True)


def read(base: dict, **keys) -> ModelConfig:
    return read_config(base | keys)[1]


def test_published_sizes():
    attention = Attention(71, 1, 64, Rope())
    shared_norm = Layer(attention, MLP(18176, "gelu", False), NORM, pre_ffn=None, parallel=True)
    assert read(F7B) == read(F7B_FIRST) == ModelConfig(65024, 4544, (shared_norm,) * 32, NORM, tied=True, context=2048)
    assert (
        read(F40B, num_ln_in_parallel_attn=None)
        == read(F40B, num_ln_in_parallel_attn=2)
        == read(F40B)
        != read(F40B, num_ln_in_parallel_attn=1)
    )
    two_norms = Layer(Attention(128, 8, 64, Rope()), MLP(32768, "gelu", False), NORM, pre_ffn=NORM, parallel=True)
    assert read(F40B) == read(F40B_FIRST) == ModelConfig(65024, 8192, (two_norms,) * 60, NORM, tied=True, context=2048)
    one_norm = Layer(
        Attention(32, 8, 128, Rope(500042.0)), MLP(16384, "gelu", False), NORM, pre_ffn=None, parallel=True
    )
    assert read(F11B) == ModelConfig(65024, 4096, (one_norm,) * 60, NORM, context=8192)
    biases = dict(qkv_bias=True, out_bias=True)
    sequential = Layer(
        Attention(32, 32, 64, alibi=Alibi(coarse=True), **biases), MLP(8192, "gelu", False, True), NORM, pre_ffn=NORM
    )
    assert read(RW1B) == ModelConfig(50304, 2048, (sequential,) * 24, NORM, tied=True, context=2048)
    with torch.device("meta"):
        assert [sum(p.numel() for p in Decoder(read(base)).parameters()) for base in (F7B, F40B, RW1B)] == [
            6_921_720_704, 41_303_293_952, 1_311_625_216,
        ]


def test_what_is_written_reads_back():
    for base in (F7B, F40B, F11B, RW1B):
        family, config = read_config(base)
        assert read_config(write_config(config, family)[1]) == (family, config)


@pytest.mark.parametrize("base, keys, complaint", [
    (F40B, {"parallel_attn": False}, "parallel_attn is False; expected True"),
    (F40B, {"num_ln_in_parallel_attn": 3}, "num_ln_in_parallel_attn is 3; expected 2 or 1"),
    (F7B, {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn is 2; expected None or 1"),
    (RW1B, {"num_kv_heads": 8}, r"num_kv_heads is 8; expected num_attention_heads \(32\) where multi_query is false"),
    (F40B, {"num_kv_heads": 7}, "Attention.kv_heads = 7"),
    (F7B, {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm is True"),
    (F7B, {"n_head": 32}, "n_head is 32; expected 71"),
    (F7B, {"activation": "mish"}, "activation is 'mish'"),
    (F7B, {"alibi": None}, "alibi is None; expected true or false"),
])
def test_refusals(base, keys, complaint):
    with pytest.raises(ConfigError, match=complaint):
        read(base, **keys)


@pytest.mark.parametrize("name", ["falcon-rw-1b", "falcon-rw-6-heads"])
def test_alibi_past_what_bfloat16_counts_to(name, tmp_path):
    """bfloat16 has 8 digits: from position 256 on it rounds, and neighbouring keys cost the same. Whole, cached,
    and padded in front."""
    fixture, length = FIXTURES[name], 600
    theirs = write(fixture, tmp_path)
    model, x = checkpoints.load(tmp_path), tokens(fixture, 1, length)
    reference = reference_logits(fixture, theirs, x)
    assert difference(model(x), reference) < 1e-5
    cache, at = Cache(model.config, 1, length), 0
    for end in (1, 250, 255, 300, 513, length - 2, length - 1, length):
        assert difference(model(x[:, at:end], cache=cache), reference[:, at:end]) < 1e-5, end
        at = end
    padded = torch.cat([torch.full((1, 9), 7), x], 1)
    assert (
        difference(model(padded, torch.cat([torch.full((1, 9), -1), torch.arange(length)[None]], 1))[:, 9:], reference)
        < 1e-5
    )
