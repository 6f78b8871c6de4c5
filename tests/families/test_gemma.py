"""Gemma's config.json: the published sizes, what missing keys mean, what is refused. Logits:
tests/fixtures/gemma.py."""

import pytest

from checkpoints.families import FAMILIES, read_config, write_config
from nanollm.config import MLP, Attention, Linear, Norm, Rope
from nanollm.errors import ConfigError

NORM = Norm(eps=1e-6, offset=1.0, cast_after_gain=True)


def values(kind, dim, hidden, layers, heads, kv_heads=None, **keys):
    sizes = dict(
        model_type=kind, vocab_size=256000, hidden_size=dim, intermediate_size=hidden, num_hidden_layers=layers,
        num_attention_heads=heads,
    )
    return sizes | ({} if kv_heads is None else {"num_key_value_heads": kv_heads}) | keys


def read(*args, **keys):
    return read_config(values(*args, **keys))[1]


GEMMA = ("gemma", 2048, 16384, 18, 8, 1)
GEMMA2 = ("gemma2", 2304, 9216, 26, 8, 4)
GEMMA3 = ("gemma3_text", 1152, 6912, 26, 4, 1)


def test_gemma_and_codegemma():
    plain = read(*GEMMA)
    assert plain == read(
        *GEMMA, hidden_act="gelu", hidden_activation=None, rope_theta=10000.0, head_dim=256, torch_dtype="bfloat16"
    )
    assert plain == read(
        *GEMMA, hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh", tie_word_embeddings=True
    )  # CodeGemma
    assert plain.layers[0].mixer == Attention(8, 1, 256, Rope()) and plain.layers[0].ffn == MLP(16384, "gelu_tanh")
    assert (
        plain.layers[0].pre_mixer == plain.layers[0].pre_ffn == plain.final_norm == NORM
        and plain.layers[0].post_mixer is None
    )
    assert plain.tied and plain.context == 8192 and plain.embed_scale == 2048**0.5 and plain.head_softcap is None
    assert read("gemma", 3072, 24576, 28, 16).layers[0].mixer == Attention(16, 16, 256, Rope())


def test_gemma2():
    small = read(*GEMMA2)
    assert (
        small.layers[0].mixer == Attention(8, 4, 256, Rope(), 4096, softcap=50.0)
        and small.layers[1].mixer.window is None
    )
    assert small.head_softcap == 30.0 and small.layers[0].post_mixer == small.layers[0].post_ffn == NORM
    assert small == read(
        *GEMMA2, sliding_window=4096, sliding_window_size=4096, cache_implementation="hybrid", query_pre_attn_scalar=256
    )
    large = read("gemma2", 4608, 36864, 46, 32, 16, head_dim=128, query_pre_attn_scalar=144)
    assert large.layers[0].mixer == Attention(32, 16, 128, Rope(), 4096, scale=1 / 12, softcap=50.0)
    free = read(*GEMMA2, attn_logit_softcapping=None, final_logit_softcapping=None)
    assert free.head_softcap is None and free.layers[0].mixer.softcap is None


def test_gemma3():
    small = read(
        *GEMMA3,
        sliding_window=512, rope_local_base_freq=10000, rope_theta=1000000, sliding_window_pattern=6,
        rope_scaling=None,
    )
    assert small.layers[0].mixer == Attention(4, 1, 256, Rope(1e4), 512, NORM) and small.layers[5].mixer == Attention(
        4, 1, 256, Rope(1e6), None, NORM
    )
    assert [i for i, layer in enumerate(small.layers) if layer.mixer.window is None] == [5, 11, 17, 23]
    nested = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
    }
    assert (
        small
        == read(*GEMMA3, sliding_window=512)
        == read(*GEMMA3, sliding_window=512, rope_parameters=nested, _sliding_window_pattern=6)
    )
    large = read("gemma3_text", 5376, 21504, 62, 32, 16, head_dim=128, query_pre_attn_scalar=168, sliding_window=1024,
                 rope_scaling={"factor": 8.0, "rope_type": "linear"})
    assert large.layers[0].mixer == Attention(32, 16, 128, Rope(1e4), 1024, NORM, scale=168**-0.5)
    assert large.layers[5].mixer == Attention(32, 16, 128, Rope(1e6, scaling=Linear(8.0)), None, NORM, scale=168**-0.5)
    mine = [FULL, SLIDING] * 2
    assert [
        layer.mixer.window
        for layer in read("gemma3_text", 64, 96, 4, 8, layer_types=mine, _sliding_window_pattern=6).layers
    ] == [None, 4096] * 2


FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.mark.parametrize(
    "which, keys",
    [
        (GEMMA, {"tie_word_embeddings": False, "attention_bias": True}),
        (GEMMA2, {"attn_logit_softcapping": None, "query_pre_attn_scalar": 144}),
        (GEMMA3, {"sliding_window_pattern": 3, "query_pre_attn_scalar": 168, "final_logit_softcapping": 30.0}),
        (GEMMA3, {"layer_types": [SLIDING] * 26}), (GEMMA3, {"layer_types": [FULL] * 26}),
        (GEMMA3, {"layer_types": [FULL, SLIDING] * 13, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    ],
)
def test_what_is_written_reads_back(which, keys):
    written = write_config(read(*which, **keys), FAMILIES[which[0]])[1]
    assert read_config(written)[1] == read(*which, **keys)


REFUSED = [
    (GEMMA, "hidden_act", "silu"), (GEMMA, "hidden_activation", "gelu"), (GEMMA2, "hidden_activation", "gelu"),
    (GEMMA3, "hidden_activation", "silu"), (GEMMA, "use_bidirectional_attention", True),
    (GEMMA2, "use_bidirectional_attention", True), (GEMMA3, "use_bidirectional_attention", True),
    (GEMMA2, "sliding_window_size", 2048), (GEMMA2, "sliding_window", None), (GEMMA2, "layer_types", [FULL] * 25),
    (GEMMA2, "layer_types", ["chunked_attention"] * 26),
    (GEMMA2, "query_pre_attn_scalar", 0), (GEMMA2, "attn_logit_softcapping", 0.0),
    (GEMMA2, "final_logit_softcapping", "30"), (GEMMA3, "attn_logit_softcapping", 50.0),
    (GEMMA3, "_sliding_window_pattern", 3), (GEMMA3, "sliding_window_pattern", 0),
    (GEMMA2, "sliding_window_pattern", 3), (GEMMA, "sliding_window", 4096),
]


@pytest.mark.parametrize("which, key, value", REFUSED)
def test_refused(which, key, value):
    with pytest.raises(ConfigError, match=f"{key} (is|=) "):
        read(*which, **{key: value})


@pytest.mark.parametrize(
    "rope, cause",
    [
        (
            {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}, "rope_parameters.rope_type = 'linear'",
        ),  # flat, which transformers passes over
        ({FULL: {"rope_type": "axial", "rope_theta": 1e6}}, "full_attention.rope_parameters.rope_type is 'axial'"),
        ({SLIDING: {"rope_type": "default", "rope_theta": 0}}, "sliding_attention.rope_parameters.rope_theta is 0"),
        ({FULL: [1e6]}, "rope_parameters.full_attention is .*expected an object"),
    ],
)
def test_refused_ropes(rope, cause):
    with pytest.raises(ConfigError, match=cause):
        read(*GEMMA3, rope_parameters=rope)
