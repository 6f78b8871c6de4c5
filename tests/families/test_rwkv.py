"""RWKV-4: what the published config says, what is refused, and the average in its two forms and as the paper writes
it."""

import pytest
import torch

from checkpoints.families import FAMILIES, read_config, write_config
from nanollm.config import RWKV, Layer, ModelConfig, Norm
from nanollm.errors import ConfigError
from nanollm.layers.rwkv import wkv_chunked, wkv_sequential
from nanollm.model import Decoder

PILE_169M = dict(
    model_type="rwkv", architectures=["RwkvForCausalLM"], attention_hidden_size=768, bos_token_id=0,
    context_length=1024, eos_token_id=0, hidden_size=768, intermediate_size=3072, layer_norm_epsilon=1e-5,
    num_hidden_layers=12, rescale_every=6, tie_word_embeddings=False, transformers_version="4.29.0", use_cache=True,
    vocab_size=50277,
)
NORM = Norm("layer", 1e-5, bias=True)


def test_169m():
    config = read_config(PILE_169M)[1]
    assert config == ModelConfig(
        50277, 768, (Layer(RWKV(768, 3072, NORM), None, None, pre_ffn=None),) * 12, NORM, context=1024, embed_norm=NORM
    )
    values = write_config(config, FAMILIES["rwkv"])[1]
    assert values["model_type"] == "rwkv" and read_config(values)[1] == config
    assert read_config(dict(model_type="rwkv", vocab_size=50277, hidden_size=768, num_hidden_layers=12))[1] == config
    other = read_config(PILE_169M | dict(layer_norm_epsilon=0.25))[1]
    assert other.layers[0].mixer.norm.eps == other.embed_norm.eps == 0.25 and other.final_norm.eps == 1e-5


def test_refused():
    with pytest.raises(ConfigError, match="attention_hidden_size is 1024; expected 768"):
        read_config(PILE_169M | dict(attention_hidden_size=1024))
    with pytest.raises(ConfigError, match="RWKV.width = 32: expected that of the residual stream .48."):
        Decoder(ModelConfig(50, 48, (Layer(RWKV(32, 64, NORM), None, None, pre_ffn=None),)))
    with pytest.raises(ConfigError, match="rwkv: config.embed_norm is None, and would be read as Norm"):
        model = ModelConfig(50, 32, (Layer(RWKV(32, 64, NORM), None, None, pre_ffn=None),), NORM, context=1024)
        write_config(model, FAMILIES["rwkv"])


def inputs(length: int, size: float = 1.0) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(length)
    k, v = (torch.randn(2, length, 6, generator=draw).double() for _ in range(2))
    w, u = torch.rand(6, generator=draw).double(), torch.randn(6, generator=draw).double()
    return [size * k, v, w, u]


def test_the_average_as_the_paper_writes_it():
    k, v, w, u = inputs(20)
    y, _ = wkv_sequential(k, v, w, u, k.new_zeros(2, 3, 6))
    for t in range(20):
        weights = torch.stack([torch.exp(-(t - 1 - i) * w + k[:, i]) for i in range(t)] + [torch.exp(u + k[:, t])], 1)
        assert torch.allclose(y[:, t], (weights * v[:, : t + 1]).sum(1) / weights.sum(1), atol=1e-12)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 50])
@pytest.mark.parametrize("ragged", [False, True])
def test_chunked_average_is_the_average_with_its_gradients(length, ragged):
    """Exponents of ±300 too, which overflow in all formats where no largest one is taken out. Padding, documents,
    and a state from before."""
    draw = torch.Generator().manual_seed(length)
    begins, real = (torch.rand(2, length, generator=draw) < share for share in (0.2, 0.7)) if ragged else (None, None)
    state = torch.randn(2, 3, 6, generator=draw).double()
    state[:, 1] = state[:, 1].abs() + 1
    arguments = [z.requires_grad_() for z in (*inputs(length, 100.0), state)]
    results = []
    for wkv in (wkv_sequential, wkv_chunked):
        y, last = wkv(*arguments, begins, real)
        y = y if real is None else y * real[..., None]
        results.append([y, last, *torch.autograd.grad((y * y).sum() + (last[:, 0] / last[:, 1]).sum(), arguments)])
    for one, other in zip(*results, strict=True):
        assert one.isfinite().all() and torch.allclose(one, other, atol=1e-10, rtol=1e-8)
