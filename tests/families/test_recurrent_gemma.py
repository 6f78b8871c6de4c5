"""RecurrentGemma: what the published config says, what is refused, and the recurrence in its two forms."""

import pytest
import torch

from checkpoints.families import FAMILIES, read_config, write_config
from nanollm.config import MLP, RGLRU, Attention, Layer, Norm, Rope
from nanollm.errors import ConfigError
from nanollm.layers.recurrent import linear_scan, linear_scan_chunked

HUB_2B = dict(
    model_type="recurrent_gemma", _block_types=["recurrent", "recurrent", "attention"],
    architectures=["RecurrentGemmaForCausalLM"], attention_bias=False, attention_dropout=0.0,
    attention_window_size=2048, bos_token_id=2, conv1d_width=4, embeddings_scale_by_sqrt_dim=True, eos_token_id=1,
    final_w_init_variance_scale=0.07692307692307693, head_dim=256, hidden_activation="gelu_pytorch_tanh",
    hidden_size=2560, intermediate_size=15360, logits_soft_cap=30.0, lru_width=2560, num_attention_heads=10,
    num_hidden_layers=26, num_key_value_heads=1, pad_token_id=0, partial_rotary_factor=0.5, rms_norm_eps=1e-6,
    rope_theta=10000.0, torch_dtype="float32", transformers_version="4.40.0.dev0", use_cache=True, vocab_size=256000,
    w_init_variance_scale=0.01,
)
NORM = Norm(eps=1e-6, offset=1.0, cast_after_gain=True)


def test_2b():
    config = read_config(HUB_2B)[1]
    mlp = MLP(7680, "gelu_tanh", bias=True)
    attention = Attention(10, 1, 256, Rope(10_000.0, fraction=0.5), window=2048, out_bias=True)
    assert config.layers[0] == config.layers[25] == Layer(RGLRU(2560, 10, 4), mlp, NORM, pre_ffn=NORM)
    assert [i for i, layer in enumerate(config.layers) if layer == Layer(attention, mlp, NORM, pre_ffn=NORM)] == [
        *range(2, 26, 3)
    ]
    assert (
        config.tied
        and config.final_norm == NORM
        and config.head_softcap == 30
        and config.embed_scale == 50.5
        and config.context is None
    )
    values = write_config(config, FAMILIES["recurrent_gemma"])[1]
    assert values["model_type"] == "recurrent_gemma" and read_config(values)[1] == config
    least = read_config(
        {
            key: HUB_2B[key]
            for key in ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
        }
    )[1]
    assert least.layers[0] == Layer(RGLRU(2560, 10, 4), MLP(3840, "gelu_tanh", bias=True), NORM, pre_ffn=NORM)
    assert least.layers[2].mixer == Attention(10, 10, 256, Rope(10_000.0, fraction=0.5), window=2048, out_bias=True)


@pytest.mark.parametrize("keys, cause", [
    (dict(embeddings_scale_by_sqrt_dim=False), "embeddings_scale_by_sqrt_dim is False"),
    (dict(head_dim=128), "head_dim is 128; expected 256"),
    (dict(_block_types=["recurrent", "mamba"]), "expected a list of recurrent and attention"),
    (dict(block_types=[]), "block_types is .*; expected a list of recurrent and attention"),
    (dict(intermediate_size=15361), "intermediate_size is 15361; expected an even number"),
    (dict(lru_width=2555), "heads = 10: expected a divisor of width"),
    (dict(rope_scaling={"type": "linear", "factor": 2.0}), "the rope_type is Linear; expected default"),
    (dict(logits_soft_cap=0), "logits_soft_cap is 0"),
])
def test_refused(keys, cause):
    with pytest.raises(ConfigError, match=cause):
        read_config(HUB_2B | keys)


# ---- the two forms of the recurrence

@pytest.mark.parametrize("length", [1, 15, 16, 17, 50])
def test_chunked_scan_is_the_scan_with_its_gradients(length):
    draw = torch.Generator().manual_seed(length)
    a, b, h = (
        torch.rand(2, length, 6, generator=draw), torch.randn(2, length, 6, generator=draw),
        torch.randn(2, 6, generator=draw),
    )
    a[:, length // 2] = 0                                                       # a document begins
    inputs = [z.double().requires_grad_() for z in (a, b, h)]
    results = []
    for scan in (linear_scan, linear_scan_chunked):
        y, last = scan(*inputs)
        results.append([y, last, *torch.autograd.grad((y * y).sum() + (last**3).sum(), inputs)])
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, atol=1e-12, rtol=1e-10)
