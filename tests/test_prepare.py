"""A model made ready for a CPU gives the logits that it gave: kinds of attention and MLPs, dtypes, quantised ones."""

import copy
import threading

import pytest
import torch

import checkpoints
from nanollm.config import MLP, Attention, LatentAttention, Layer, Mamba, ModelConfig, MoE, Norm, Rope
from nanollm.errors import CheckpointError
from nanollm.inference import prepare as inference
from nanollm.inference.generation import generate
from nanollm.inference.prepare import PackedLinear, Part, WideLinear, prepare
from nanollm.inference.quantize import LEFT_ALONE, QuantizedLinear, quantize
from nanollm.layers.linear import Linear
from nanollm.model import Decoder
from tests.oracles import difference, make_loud

LAYERS = (
    Layer(Attention(4, 2, 32, Rope(), qkv_bias=True, out_bias=True, qk_norm=Norm()), MLP(192, bias=True)),
    Layer(Attention(2, 2, 64, Rope(layout="interleaved"), softcap=20.0), MLP(128, gated=False)),
    Layer(Attention(4, 1, 32, Rope(), window=5), MoE(4, 2, MLP(64), True, MLP(64), True)),
    Layer(Mamba(256, 4, 4, 8), None, pre_ffn=None),
    Layer(LatentAttention(2, 16, 16, 32, 32, None, Rope()), MLP(64)),
)
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}


def decoder(dtype: torch.dtype, **more) -> Decoder:
    model = Decoder(ModelConfig(vocab=80, dim=128, layers=LAYERS, **more)).eval().requires_grad_(False)
    make_loud(model)
    return model.to(dtype)


def prompt() -> torch.Tensor:
    return torch.randint(0, 80, (2, 20), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
@pytest.mark.parametrize("more", [{}, {"tied": True}, {"head_bias": True, "head_softcap": 30.0}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_are_those_of_the_model(dtype, more):
    model = decoder(dtype, **more)
    exact = copy.deepcopy(model).double()(prompt())
    before = difference(model(prompt()).double(), exact)
    ready = prepare(model)
    assert difference(ready(prompt()).double(), exact) < max(1.5 * before, 1e-6) < DTYPES[dtype] * 4
    packed = inference.has_packing(dtype)                   # which is the processor's: 16 bits want AVX-512
    assert packed or dtype != torch.bfloat16 or not torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    assert isinstance(ready.layers[0].mixer.q, Part) and isinstance(ready.layers[0].mixer.k, Part)
    assert isinstance(ready.layers[0].mixer.q.whole.product, PackedLinear) == packed
    assert isinstance(ready.layers[1].ffn.down, PackedLinear) == packed
    assert (ready.head.packed is not None) == packed


@torch.inference_mode()
@pytest.mark.parametrize("head_bits", [None, 8])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantised_models_too(dtype, bits, head_bits):
    model = quantize(decoder(dtype), bits)
    before = model(prompt())
    ready = prepare(model, head_bits)
    assert isinstance(ready.layers[0].mixer.q.whole.product, QuantizedLinear)
    assert (isinstance(ready.head.packed, QuantizedLinear)) == (head_bits == 8)
    assert difference(ready(prompt()), before) < (0.05 if head_bits or dtype == torch.bfloat16 else 1e-5)


def test_what_was_left_out_when_quantising_is_not_joined():
    model = prepare(quantize(decoder(torch.float32), 8, skip=(*LEFT_ALONE, "layers.0.mixer.k")))
    assert isinstance(model.layers[0].mixer.q, QuantizedLinear) and type(model.layers[0].mixer.k) is Linear
    list(generate(model, [1, 2, 3], 3))


def test_generation_is_the_same(monkeypatch):
    model = decoder(torch.float32)
    before = list(generate(model, [3, 1, 4], 20))
    assert list(generate(prepare(model), [3, 1, 4], 20)) == before


def test_threads_share_a_prepared_model():
    """Each thread takes its own part of what is side by side."""
    model = prepare(decoder(torch.float32))
    prompts = [[5, 17, 3, 44], [9, 8, 7]]
    expected = [list(generate(model, prompt, 20)) for prompt in prompts]
    found: list[list[int]] = [[], []]

    def answer(row: int) -> None:
        for _ in range(5):
            found[row] = list(generate(model, prompts[row], 20))

    threads = [threading.Thread(target=answer, args=(row,)) for row in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected
    assert all(module.whole.last is None for module in model.modules() if isinstance(module, Part))


RUN_ONLY = {
    "prepared": prepare, "8 bits": quantize, "4 bits": lambda model: quantize(model, 4),
    "4 bits, prepared": lambda model: prepare(quantize(model, 4), head_bits=8),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("made", RUN_ONLY)
def test_what_is_packed_is_not_saved(made, tied, tmp_path):
    """The weights are no parameters any more, so what could be written would lack them."""
    layer = Layer(Attention(4, 2, 32, Rope()), MLP(192))
    model = Decoder(ModelConfig(vocab=80, dim=128, layers=(layer,) * 2, context=64, tied=tied)).eval()
    names = [name for name, _ in model.named_parameters()]
    checkpoints.save(model, tmp_path / "before")
    left = {name: one for name, one in RUN_ONLY[made](model.bfloat16()).named_parameters() if one.numel()}
    lost = [name for name in names if name not in left]
    named = rf"{len(names)} parameters .* {len(lost)} are missing .* first is {lost[0]}\. .* save before prepare"
    with pytest.raises(CheckpointError, match=named):
        checkpoints.save(model, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["before"]


def test_an_empty_head_is_not_saved(monkeypatch, tmp_path):
    """Where nothing but the head was packed: its name is still there."""
    monkeypatch.setattr(inference, "has_packing", lambda dtype: True)       # also on a processor that has none
    monkeypatch.setattr(inference, "pack", lambda weight: weight)
    model = Decoder(ModelConfig(80, 128, LAYERS[3:4])).eval().bfloat16()
    with pytest.raises(CheckpointError, match=r" 1 are missing or have another shape, the first is head\.weight"):
        checkpoints.save(prepare(model), tmp_path / "out")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("broken", ["missing", "wrong"])
def test_without_torchs_packing_weights_are_side_by_side_all_the_same(broken, monkeypatch):
    def instead(*args):
        if broken == "missing":
            raise AttributeError("no such operation")
        return torch.zeros(len(args[0]), 32, dtype=args[0].dtype)

    monkeypatch.setattr(inference, "product", instead)
    inference.has_packing.cache_clear()
    try:
        model = decoder(torch.bfloat16)
        before = model(prompt())
        ready = prepare(model)
        assert isinstance(ready.layers[0].mixer.q, Part) and ready.head.packed is None
        assert not any(isinstance(module, PackedLinear) for module in ready.modules())
        assert difference(ready(prompt()).float(), before.float()) < 0.05
    finally:
        inference.has_packing.cache_clear()


@torch.inference_mode()
@pytest.mark.parametrize("bias", [True, False])
def test_many_rows_go_through_float32_where_16_bits_are_slow(monkeypatch, bias):
    monkeypatch.setattr(inference, "has_packing", lambda dtype: False)
    layer = Layer(Attention(4, 2, 32, Rope(), out_bias=bias), MLP(64))
    model = Decoder(ModelConfig(vocab=80, dim=128, layers=(layer,)))
    make_loud(model)
    model = model.eval().bfloat16()
    x = torch.randint(0, 80, (1, 100), generator=torch.Generator().manual_seed(0))
    exact = copy.deepcopy(model).double()(x)
    before = difference(model(x).double(), exact)
    ready = prepare(model)
    assert isinstance(ready.layers[0].mixer.o, WideLinear) and isinstance(ready.layers[0].ffn.down, WideLinear)
    assert difference(ready(x).double(), exact) < 1.5 * before
    few, o = torch.randn(3, 128).bfloat16(), ready.layers[0].mixer.o
    assert torch.equal(o(few), torch.nn.functional.linear(few, *o.parameters()))
