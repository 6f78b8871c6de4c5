"""Llama 4: published configs, which layers are of which kind, chunks by their definition, and what is refused."""

import dataclasses

import pytest
import torch

from checkpoints.families import FAMILIES, read_config, write_config
from nanollm.config import (
    MLP,
    Attention,
    ChunkedAttention,
    InputWeightedMoE,
    Layer,
    Llama3,
    LogTokenSteps,
    ModelConfig,
    MoE,
    Norm,
    Rope,
)
from nanollm.errors import ConfigError
from nanollm.layers.chunked_attention import ChunkMask
from nanollm.layers.forward_context import ForwardContext
from nanollm.layers.input_weighted_moe import InputWeightedMoE as InputWeightedExperts
from nanollm.model import Decoder
from tests.oracles import make_loud

SCOUT = dict(
    model_type="llama4_text", attention_bias=False, attention_chunk_size=8192, for_llm_compressor=False, head_dim=128,
    hidden_act="silu", hidden_size=5120, interleave_moe_layer_step=1, intermediate_size=8192,
    intermediate_size_mlp=16384, max_position_embeddings=10485760, no_rope_layers=[], num_attention_heads=40,
    num_experts_per_tok=1, num_hidden_layers=48, num_key_value_heads=8, num_local_experts=16, rms_norm_eps=1e-5,
    rope_scaling={"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "rope_type": "llama3",
                  "original_max_position_embeddings": 8192},
    rope_theta=500000.0, use_qk_norm=True, vocab_size=202048,
)
SHORT = SCOUT | dict(num_hidden_layers=6)


def read(**keys) -> ModelConfig:
    return read_config(SHORT | keys)[1]


def test_published_sizes():
    rope, norm = Rope(5e5, "interleaved", scaling=Llama3(8.0, 8192), rounds="result"), Norm(eps=1e-5)
    moe = InputWeightedMoE(16, 1, MLP(8192), False, MLP(8192), score="sigmoid", round_weights=True)
    mixer = ChunkedAttention(40, 8, 128, rope, 8192, dataclasses.replace(norm, gain=False))
    chunked = Layer(mixer, moe, norm, pre_ffn=norm)
    tempered = dataclasses.replace(chunked, mixer=Attention(40, 8, 128, growth=LogTokenSteps(8192, 0.1)))
    config = read_config(SCOUT)[1]
    assert config == ModelConfig(202048, 5120, (chunked, chunked, chunked, tempered) * 12, norm, context=10485760)
    with torch.device("meta"):
        layer = 5120 * 128 * 2 * (40 + 8) + 16 * 5120 + 17 * 3 * 5120 * 8192 + 2 * 5120
        assert sum(p.numel() for p in Decoder(config).parameters()) == 48 * layer + (2 * 202048 + 1) * 5120


def test_which_layers_are_of_which_kind():
    def mixers(**keys):
        def letter(mixer):
            return "C" if isinstance(mixer, ChunkedAttention) else "T" if mixer.growth else "A"
        return "".join(letter(layer.mixer) for layer in read(**keys).layers)

    def experts(**keys):
        return "".join("-M"[isinstance(layer.ffn, MoE)] for layer in read(**keys).layers)
    assert mixers() == "CCCTCC" and mixers(no_rope_layer_interval=2) == "CTCTCT"
    assert mixers(no_rope_layers=[1, 0, 0, 1, 1, 1], attn_temperature_tuning=False) == "CAACCC"
    assert experts() == "MMMMMM" and experts(interleave_moe_layer_step=2) == "-M-M-M"
    assert experts(moe_layers=[0, 5], interleave_moe_layer_step=2) == "M----M"
    assert read(interleave_moe_layer_step=2).layers[0].ffn == MLP(16384)


def test_what_is_written_reads_back():
    for keys in (
        {}, dict(moe_layers=[]), dict(use_qk_norm=False, attention_chunk_size=7), dict(no_rope_layers=[1] * 6),
        dict(no_rope_layers=[0] * 5 + [1], attn_temperature_tuning=False), dict(floor_scale=5),
    ):
        assert read_config(write_config(read(**keys), FAMILIES["llama4_text"])[1])[1] == read(**keys)


def test_chunks_by_their_definition():
    """Two documents and padding in one row: a query sees what is before it in its own chunk of its own document."""
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, -1]])
    seen = ChunkMask(ForwardContext(positions, False, torch.float32), None, 3).dense[0, 0]
    places, document = positions[0].tolist(), [0] * 7 + [1] * 4 + [2]
    for t, p in enumerate(places):
        for s, k in enumerate(places):
            same = document[s] == document[t] and s <= t and (p < 0 or k // 3 == p // 3)
            assert bool(seen[t, s]) == same, (t, s)


@torch.no_grad()
def test_the_weight_goes_into_the_expert():
    config = InputWeightedMoE(3, 2, MLP(10), True, MLP(6))
    moe, x = InputWeightedExperts(config, 8), torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0))
    make_loud(moe)
    routed, y = moe.router(x[0]), moe.shared(x[0])
    for t in range(5):
        for g, e in zip(routed.weights[t], routed.chosen[t], strict=True):
            own, experts = g * x[0, t], moe.experts
            y[t] += experts.down[e] @ (torch.nn.functional.silu(experts.gate[e] @ own) * (experts.up[e] @ own))
    assert torch.allclose(moe(x)[0], y, atol=1e-5)


REFUSED = {
    "no chunks": (dict(attention_chunk_size=None), "attention_chunk_size is None"),
    "too few layers": (dict(no_rope_layers=[1, 0]), "expected 6 times 0 or 1"),
    "other masks": (dict(layer_types=["full_attention"] * 6), "layer_types"),
    "two periods": (dict(nope_layer_interval=3), "nope_layer_interval is 3; expected 4"),
    "another growth": (dict(attn_scale=0.2), "attn_scale is 0.2; expected 0.1"),
    "a layer too many": (dict(moe_layers=[6]), "moe_layers is .* expected a list of layers from 0 to 5"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    keys, words = REFUSED[case]
    with pytest.raises(ConfigError, match=words):
        read(**keys)
