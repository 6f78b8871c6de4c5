"""Cohere's config.json: the published sizes, what missing keys mean, what is refused. Logits:
tests/fixtures/cohere.py."""

import pytest

from checkpoints.families import FAMILIES, read_config, write_config
from nanollm.config import MLP, Attention, Layer, Norm, Rope, ScaledMLP
from nanollm.errors import ConfigError

NORM = Norm("layer", eps=1e-5)
SIZES = dict(vocab_size=256000, hidden_size=8192, intermediate_size=22528, num_hidden_layers=4, num_attention_heads=64)
R7B = dict(
    model_type="cohere2", vocab_size=256000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8, head_dim=128, hidden_act="silu", layer_norm_eps=1e-5,
    attention_bias=False, logit_scale=0.25, max_position_embeddings=8192, rope_theta=50000, sliding_window=4096,
    rope_scaling=None, sliding_window_pattern=4, cache_implementation="hybrid", layer_switch=4,
    order_of_interleaved_layers="local_attn_first", position_embedding_type="rope_gptj", rotary_pct=1.0,
    use_embedding_sharing=True, use_gated_activation=True, use_parallel_block=True, use_parallel_embedding=False,
    use_qk_norm=False,
)


def read(**keys):
    return read_config(dict(model_type="cohere") | SIZES | keys)[1]


def interleaved(theta):
    return Rope(theta, "interleaved", rounds="tables")


def test_command_r():
    plain = read(rope_theta=8e6, model_max_length=131072)
    assert plain.layers[0] == Layer(
        Attention(64, 64, 128, interleaved(8e6)), MLP(22528), NORM, pre_ffn=None, parallel=True
    )
    assert plain.tied and plain.head_scale == 0.0625 and plain.context == 8192 and plain.final_norm == NORM
    assert read().layers[0].mixer.rope == interleaved(500_000.0)
    plus = read(
        hidden_size=12288, num_attention_heads=96, num_key_value_heads=8, use_qk_norm=True,
        logit_scale=0.8333333333333334, rope_theta=75e6,
    )
    assert plus.layers[0].mixer == Attention(
        96, 8, 128, interleaved(75e6), qk_norm=Norm("layer", eps=1e-5, scope="each")
    )
    assert plus.head_scale == 0.8333333333333334


def test_command_r7b():
    config = read_config(R7B)[1]
    assert config.layers[0].mixer == Attention(32, 8, 128, interleaved(50000.0), 4096) and config.layers[
        3
    ].mixer == Attention(32, 8, 128)
    assert [i for i, layer in enumerate(config.layers) if layer.mixer.rope is None] == [3, 7, 11, 15, 19, 23, 27, 31]
    bare = read(model_type="cohere2", layer_types=["sliding_attention", "full_attention"] * 2)
    assert [layer.mixer.window for layer in bare.layers] == [4096, None] * 2 and bare.layers[
        0
    ].mixer.rope == interleaved(10_000.0)


def test_what_is_written_reads_back():
    for kind, config in (
        ("cohere", read()), ("cohere", read(use_qk_norm=True, attention_bias=True, tie_word_embeddings=False)),
        ("cohere2", read_config(R7B)[1]),
        ("cohere2", read(model_type="cohere2", layer_types=["sliding_attention"] * 4)),
        ("cohere2", read(model_type="cohere2", layer_types=["full_attention", "sliding_attention"] * 2)),
    ):
        assert read_config(write_config(config, FAMILIES[kind])[1])[1] == config


REFUSED = {
    "head_dim": 64, "layer_switch": 3, "order_of_interleaved_layers": "global_attn_first",
    "position_embedding_type": "alibi", "rotary_pct": 0.5, "use_parallel_block": False, "use_gated_activation": False,
    "use_qk_norm": True, "use_embedding_sharing": False, "sliding_window": None, "logit_scale": None,
    "layer_types": ["full_attention"],
}


@pytest.mark.parametrize("key", REFUSED)
def test_refused(key):
    with pytest.raises(ConfigError, match=f"{key} is "):
        read_config(R7B | {key: REFUSED[key]})


def test_refused_by_command_r():
    for key, value, cause in (
        ("head_dim", 64, "head_dim is 64; expected None or 128"), ("sliding_window", 4096, "sliding_window = 4096"),
        ("num_attention_heads", 60, "num_attention_heads is 60"),
    ):
        with pytest.raises(ConfigError, match=cause):
            read(**{key: value})


def test_layers_and_shared_experts_of_command_a_plus():
    sizes = dict(model_type="cohere2_moe", vocab_size=97, hidden_size=48, num_hidden_layers=6, num_attention_heads=4,
                 intermediate_size=20, head_dim=12)
    config = read_config(sizes | dict(first_k_dense_replace=2, num_shared_experts=3, sliding_window_pattern=3))[1]
    assert [layer.mixer.window for layer in config.layers] == [None, None, 4096, 4096, None, 4096]
    assert [layer.mixer.rope is None for layer in config.layers] == [False, False, False, False, True, False]
    moe = config.layers[2].ffn
    assert (moe.scale, moe.shared) == (0.5, ScaledMLP(MLP(60), out=0.5)) and config.layers[0].ffn == MLP(20)
    summed = read_config(sizes | dict(num_shared_experts=3, shared_expert_combination_strategy="sum"))[1]
    assert (summed.layers[0].ffn.scale, summed.layers[0].ffn.shared) == (1.0, MLP(60))
    assert read_config(sizes | dict(rms_norm_eps=1e-4))[1].final_norm == Norm(eps=1e-4)
