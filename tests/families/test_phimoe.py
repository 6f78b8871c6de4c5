"""Phi-3.5-MoE: its published config, its router against transformers' own function, and what is refused."""

import pytest
import torch
from transformers.models.phimoe.modeling_phimoe import sparsemixer

from checkpoints.families import FAMILIES, read_config, write_config
from nanollm.config import MLP, Attention, Layer, LongRope, ModelConfig, MoE, Norm, Rope
from nanollm.errors import ConfigError
from nanollm.layers.moe import sparse_route
from nanollm.model import Decoder

SCALING = dict(
    long_factor=[2.0] * 64, long_mscale=1.243163121016122, original_max_position_embeddings=4096,
    short_factor=[1.0] * 64, short_mscale=1.243163121016122, type="longrope",
)
PHI = dict(
    model_type="phimoe", attention_bias=True, hidden_act="silu", hidden_dropout=0.0, hidden_size=4096,
    input_jitter_noise=0.01, intermediate_size=6400, lm_head_bias=True, max_position_embeddings=131072,
    num_attention_heads=32, num_experts_per_tok=2, num_hidden_layers=32, num_key_value_heads=8, num_local_experts=16,
    original_max_position_embeddings=4096, rms_norm_eps=1e-5, rope_scaling=SCALING, rope_theta=10000.0,
    router_aux_loss_coef=0.0, router_jitter_noise=0.01, sliding_window=131072, tie_word_embeddings=False,
    vocab_size=32064,
)


def read(**keys) -> ModelConfig:
    return read_config(PHI | keys)[1]


def test_published_sizes():
    norm, rope = (
        Norm("layer", 1e-5, bias=True),
        Rope(10_000.0, scaling=LongRope((1.0,) * 64, (2.0,) * 64, 4096, 1.243163121016122)),
    )
    moe = MoE(16, 2, MLP(6400), False, sparse=0.01, round_weights=True)
    layer = Layer(Attention(32, 8, 128, rope, 131072, qkv_bias=True, out_bias=True), moe, norm, pre_ffn=norm)
    assert read() == ModelConfig(32064, 4096, (layer,) * 32, norm, context=131072, head_bias=True)
    with torch.device("meta"):
        assert sum(p.numel() for p in Decoder(read()).parameters()) == 41_873_153_344


def test_what_is_written_reads_back():
    for config in (
        read(),
        read(attention_bias=False, lm_head_bias=False, sliding_window=None, rope_scaling=None, router_jitter_noise=0.2),
    ):
        values = write_config(config, FAMILIES["phimoe"])[1]
        assert values["model_type"] == "phimoe" and read_config(values)[1] == config


REFUSED = {
    "two temperatures": (
        dict(rope_scaling=SCALING | {"long_mscale": 1.3}),
        r"rope_scaling.long_mscale is 1.3; expected short_mscale \(1.24.*\): two temperatures are not implemented",
    ),
    "no temperature": (
        dict(rope_scaling={key: value for key, value in SCALING.items() if "mscale" not in key}),
        "rope_scaling.short_mscale is missing",
    ),
    "another scaling": (
        dict(rope_scaling=dict(type="yarn", factor=4.0)), "rope_scaling.type is 'yarn'; expected 'longrope'",
    ),
    "three experts": (dict(num_experts_per_tok=3), "num_experts_per_tok is 3; expected 2"),
    "no threshold": (dict(router_jitter_noise=0.0), "router_jitter_noise is 0.0; expected a finite number above 0"),
    "another original context": (
        dict(original_max_position_embeddings=8192), "original_max_position_embeddings is 4096; expected 8192",
    ),
    "a key inside": (dict(rope_scaling=SCALING | {"mscale": 1.0}), "nothing here knows .* rope_scaling.mscale"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    keys, words = REFUSED[case]
    with pytest.raises(ConfigError, match=words):
        read(**keys)


@pytest.mark.parametrize("eps", [0.01, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_router_is_that_of_transformers(eps, dtype):
    """Logits of every size, negative ones, ties, and zeros; the choice, and the weights as they are rounded."""
    logits = torch.randn(500, 6, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 1, 500)[:, None]
    logits[:9], logits[9:30, 3], logits[30] = -logits[:9].abs(), 0.0, 0.0
    logits = logits.to(dtype)
    weights, chosen = sparse_route(logits, 2, eps)
    expected, experts = sparsemixer(logits, eps, training=False)
    assert torch.equal(chosen, experts) and torch.equal(weights.to(dtype), expected)
    assert (weights < 1).any() and (weights.sum(-1) > 1.5).any()  # neither all alone nor a softmax over two
