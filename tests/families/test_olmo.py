"""What the keys of OLMo-1, OLMo-2 and OLMoE mean and which are refused."""

import pytest
import torch
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.olmoe.modeling_olmoe import OlmoeRMSNorm

from checkpoints.families import read_config
from nanollm.config import MLP, Attention, Layer, ModelConfig, MoE, Norm, Rope
from nanollm.errors import ConfigError
from nanollm.layers.norm import build_norm

SIZES = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6)


def read(kind: str, **keys) -> ModelConfig:
    return read_config(dict(model_type=kind, **SIZES) | keys)[1]


def test_defaults():
    bare = Norm("layer", eps=1e-5, gain=False)
    assert read("olmo") == ModelConfig(
        97, 48, (Layer(Attention(6, 6, 8, Rope(rounds="result")), MLP(80), bare, None, bare),) * 3, bare, context=2048
    )
    norm, whole = Norm(eps=1e-5, cast_after_gain=True), Norm(eps=1e-5, cast_after_gain=True, scope="all")
    layer = Layer(Attention(6, 6, 8, Rope(rounds="result"), qk_norm=whole), MLP(80), None, norm, None, norm)
    assert read("olmo2") == ModelConfig(97, 48, (layer,) * 3, norm, context=2048)
    moe = MoE(64, 8, MLP(80), renormalize=False, round_weights=True)
    layer = Layer(
        Attention(6, 6, 8, Rope(), qk_norm=Norm(eps=1e-5, scope="all")), moe, Norm(eps=1e-5), None, Norm(eps=1e-5)
    )
    assert read("olmoe") == ModelConfig(97, 48, (layer,) * 3, Norm(eps=1e-5), context=4096)


def test_keys():
    assert read("olmo", clip_qkv=8.0, rms_norm_eps=1e-3) == read("olmo", clip_qkv=8) != read("olmo", clip_qkv=None)
    assert read("olmo", clip_qkv=8.0).layers[0].mixer.clip == 8.0
    assert all(read(kind, attention_bias=True).layers[0].mixer.out_bias for kind in ("olmo", "olmo2", "olmoe"))
    assert read("olmoe", norm_topk_prob=True).layers[0].ffn.renormalize


@pytest.mark.parametrize("kind, theirs", [("olmo2", Olmo2RMSNorm(48, 1e-2)), ("olmoe", OlmoeRMSNorm(48, 1e-2))])
def test_where_a_norm_rounds(kind, theirs):
    """In bfloat16 OLMo-2's logits are not bit-equal (tests/fixtures/olmo.py says why); its norms are."""
    ours = build_norm(read(kind, rms_norm_eps=1e-2).final_norm, 48).bfloat16()
    x = torch.randn(100, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        for mine, other in zip(ours.parameters(), theirs.bfloat16().parameters(), strict=True):
            other.copy_(mine.copy_(torch.linspace(0.3, 1.7, 48)))
        assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("kind, keys, complaint", [
    ("olmo", dict(clip_qkv=0), "clip_qkv is 0; expected a finite number above 0"),
    ("olmo2", dict(clip_qkv=8.0), "nothing here knows what these mean: clip_qkv"),
    ("olmoe", dict(head_dim=16), "head_dim is 16; expected None or 8"),
    ("hf_olmo", {}, "model_type is 'hf_olmo'; .*python -m checkpoints.families lists"),
])
def test_refusals(kind, keys, complaint):
    with pytest.raises(ConfigError, match=complaint):
        read(kind, **keys)
