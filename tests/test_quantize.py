"""Quantised weights: how far a weight moves, how far the logits do, and what is left alone."""

import copy
import threading
import time

import pytest
import torch

from nanollm.config import MLP, Attention, ClippedGLU, LatentExpert, Layer, Mamba, ModelConfig, MoE, Rope
from nanollm.errors import InputError
from nanollm.inference import cpu_products
from nanollm.inference.generation import generate
from nanollm.inference.quantize import (
    QuantizedExperts,
    QuantizedLinear,
    dequantize,
    pack,
    quantize,
    quantize_weight,
    quantized_linear,
    unpack,
)
from nanollm.layers.linear import Linear
from nanollm.layers.moe import Experts
from nanollm.model import Decoder
from tests.oracles import difference, make_loud

FORMATS = [(8, 128), (4, 32), (4, 64), (4, 128)]
LAYERS = (
    Layer(Attention(4, 2, 16, Rope(), qkv_bias=True), MLP(64)),
    Layer(Attention(2, 2, 32, Rope()), MoE(4, 2, MLP(64), True, MLP(64), True)),
    Layer(Mamba(64, 4, 4, 3), None, pre_ffn=None),
)


def decoder(tied: bool = False) -> Decoder:
    model = (
        Decoder(ModelConfig(vocab=50, dim=64, layers=LAYERS, tied=tied, head_bias=True, positions=60))
        .eval()
        .requires_grad_(False)
    )
    make_loud(model)
    return model


def weights() -> torch.Tensor:
    """Rows that are what rows can be: normal, huge, tiny, of one sign, and with one large number among small ones."""
    w = torch.randn(9, 256)
    w[1] *= 1e30
    w[2] *= 1e-30
    w[3] = w[3].abs() + 3
    w[4] = -w[4].abs() - 3
    w[5, 7] = 100
    w[6, :128] = 0
    return w


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits, group", FORMATS)
def test_no_weight_moves_by_more_than_half_a_step(bits, group, dtype):
    w = weights()[[0, 3, 4, 5, 6] if dtype == torch.float16 else slice(None)].to(dtype)
    packed, scale, zero = quantize_weight(w, bits, group)
    error = (dequantize(packed, scale, zero).double() - w.double()).abs().unflatten(1, (scale.shape[1], -1)).amax(2)
    assert (error <= scale.double() * 0.5 * (1 + 1e-5)).all()
    assert (error > scale.double() * 0.3).any()                 # and the step is not smaller than it is said to be
    span = w.double().unflatten(1, (scale.shape[1], -1))
    steps = 2 * span.abs().amax(2) / 254 if bits == 8 else (span.amax(2).clamp(min=0) - span.amin(2).clamp(max=0)) / 15
    assert torch.allclose(scale.double(), steps.clamp(min=torch.finfo(torch.float32).tiny), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits, group", FORMATS)
def test_zeros_and_constants(bits, group):
    w = torch.zeros(5, 256)
    w[1], w[2], w[3, ::2] = 3.7, -3.7, -1.5
    w[4] = 3e38 * torch.tensor([1.0, -1.0]).repeat(128)                                # the range itself is no float32
    restored = dequantize(*quantize_weight(w, bits, group))
    assert torch.equal(restored[0], w[0]) and torch.equal(restored[3, 1::2], w[3, 1::2])
    assert torch.allclose(restored[:4], w[:4], rtol=1e-6)
    assert ((restored[4].double() - w[4].double()).abs() <= 2e37 * 1.001).all()         # half a step of 4 bits


def test_packing():
    codes = torch.randint(0, 16, (7, 96), dtype=torch.int32)
    codes[0], codes[1] = 15, 8
    packed = pack(codes)
    assert packed.dtype == torch.int32 and packed.shape == (7, 12) and torch.equal(unpack(packed), codes)
    assert (
        packed[0].eq(-1).all()
        and pack(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]], dtype=torch.int32)).item() == 0x87654321 - 2**32
    )
    every = torch.arange(16, dtype=torch.int32).repeat(2)[None]  # as weights 0 … 15: nothing is rounded
    packed, scale, zero = quantize_weight(every.float(), 4, 32)
    assert torch.equal(unpack(packed), every) and scale.item() == 1 and zero.item() == 0
    assert quantize_weight(torch.tensor([[-127.0, 64, 127, 0]]), 8)[0].tolist() == [[-127, 64, 127, 0]]


@pytest.mark.parametrize("bits, group", FORMATS)
def test_the_product_is_that_of_the_restored_weight(bits, group):
    x, w, bias = torch.randn(2, 3, 256), torch.randn(9, 256), torch.randn(9)
    form = quantize_weight(w, bits, group)
    assert (
        torch.equal(quantized_linear(x, *form, bias), x @ dequantize(*form).T + bias)
        or difference(quantized_linear(x, *form, bias), x @ dequantize(*form).T + bias) < 1e-6
    )
    assert quantized_linear(x.bfloat16(), *form, bias.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("bits, most", [(8, 0.02), (4, 0.25)])
def test_logits(bits, most):
    """Three loud layers in a row: a step is 1/254 or 1/15 of the range, and the logits must not move by much more."""
    model, x = decoder(), torch.randint(0, 50, (2, 20))
    before = model(x)
    after = quantize(copy.deepcopy(model), bits, 32)(x)
    change = float((after - before).norm() / before.norm())
    assert most / 20 < change < most, change


@pytest.mark.parametrize("tied", [False, True])
def test_what_is_replaced_and_what_is_left(tied):
    model = decoder(tied)
    before = dict(copy.deepcopy(model).named_modules())
    assert quantize(model, 4, 32) is model
    replaced = {name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    left = {name for name, module in model.named_modules() if isinstance(module, Linear)}
    assert left == {"head", "layers.1.ffn.router", "layers.1.ffn.shared_gate", "layers.2.mixer.dt_proj"}
    experts = {f"layers.1.ffn.experts.{leaf}" for leaf in ("gate", "up", "down")}
    linears = {name for name, module in before.items() if isinstance(module, Linear)}
    assert replaced | left == linears | experts and "layers.1.ffn.shared.down" in replaced
    assert (model.head.weight is model.embed.weight) == tied
    for name in left:
        assert torch.equal(model.get_submodule(name).weight, before[name].weight)
    assert torch.equal(model.head.bias, before["head"].bias)
    assert not {name for name, _ in model.named_parameters()} & {
        f"{name}.{leaf}" for name in replaced for leaf in ("weight", "bias")
    }
    assert torch.equal(model.layers[0].mixer.q.bias, before["layers.0.mixer.q"].bias)
    assert not any(module.training for module in model.modules())


def test_skip_takes_parts_of_names():
    model = quantize(
        decoder(), skip=("layers.0", "mixer", "experts")
    )  # head and router do more than multiply, and stay
    assert {name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)} == {
        "layers.1.ffn.shared_gate", "layers.1.ffn.shared.gate", "layers.1.ffn.shared.up", "layers.1.ffn.shared.down"}


# ---- experts

MIXTURES = {
    "Mixtral": MoE(4, 2, MLP(64), True),
    "Qwen-MoE": MoE(6, 3, MLP(64), False, MLP(96), True),
    "gpt-oss": MoE(4, 2, ClippedGLU(64), True, router_bias=True),
    "Nemotron 3": MoE(4, 2, LatentExpert(32, MLP(64, "relu2", gated=False)), True, MLP(64, "relu2", gated=False)),
}


def mixture(kind: str) -> Decoder:
    layer = Layer(Attention(4, 2, 16, Rope()), MIXTURES[kind])
    model = Decoder(ModelConfig(vocab=50, dim=64, layers=(layer, layer))).eval().requires_grad_(False)
    make_loud(model)
    return model


def restored(model: Decoder, plain: Decoder) -> Decoder:
    """The plain model, with the weights that the quantised one stands for."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            weight = dequantize(module.restore(), module.scale, module.zero)
            plain.get_parameter(name if weight.ndim == 3 else f"{name}.weight").data.copy_(weight)
    return plain


@pytest.mark.parametrize("kind", MIXTURES)
@pytest.mark.parametrize("bits, group", [(8, None), (4, 32)])
def test_experts_are_those_of_the_restored_weights(bits, group, kind):
    """torch's kernels where no gradient is asked for, and the definition."""
    plain, x = mixture(kind), torch.randint(0, 50, (2, 20))
    model = quantize(copy.deepcopy(plain), bits, group)
    assert not any(isinstance(module, Experts) for module in model.modules())
    before, expected = plain(x), restored(model, plain)(x)
    assert float((before - expected).norm() / before.norm()) > 1e-3          # the bits are felt
    with torch.inference_mode():
        packed = model(x)
    assert difference(packed, expected) < 1e-4 and difference(model(x), expected) < 1e-5
    other = quantize(mixture(kind), bits, group)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


def test_each_expert_is_quantised_by_itself():
    experts = mixture("gpt-oss").layers[0].ffn.experts
    model = quantize(mixture("gpt-oss"), 4, 32)
    found = model.layers[0].ffn.experts
    assert isinstance(found, QuantizedExperts) and found.down.packed.shape == (4, 64, 8)
    for leaf in ("gate", "up", "down"):
        module, weights = getattr(found, leaf), getattr(experts, leaf)
        assert torch.equal(module.bias, getattr(experts, f"{leaf}_bias"))
        own = [quantize_weight(weight, 4, 32) for weight in weights]
        for part, each in zip((module.packed, module.scale, module.zero), zip(*own, strict=True), strict=True):
            assert torch.equal(part, torch.stack(each))
    assert repr(found.up) == "QuantizedLinear(experts=4, in_features=64, out_features=64, bits=4, group=32, bias=True)"


def test_an_expert_that_cannot_be_quantised_is_named():
    model = mixture("Mixtral")
    model.layers[1].ffn.experts.up.data[2, 3, 4] = torch.inf
    with pytest.raises(InputError, match=r"layers\.1\.ffn\.experts\.up: 1 of 16384 weights are not finite"):
        quantize(model, 8)
    model = Decoder(ModelConfig(50, 64, (Layer(Attention(4, 2, 16, Rope()), MoE(2, 1, MLP(48), True)),)))
    with pytest.raises(InputError, match=r"layers\.0\.ffn\.experts\.down: 48 inputs, expected a multiple of the group"):
        quantize(model, 4)


def test_rows_are_quantised_a_slab_at_a_time(monkeypatch):
    weight = torch.randn(10, 64)
    expected = quantize_weight(weight, 4, 32)
    monkeypatch.setattr("nanollm.inference.quantize.SLAB", 200)
    assert all(torch.equal(a, b) for a, b in zip(quantize_weight(weight, 4, 32), expected, strict=True))


@pytest.mark.parametrize("bits", [8, 4])
def test_generation_and_state_dict(bits):
    model, prompt = quantize(decoder(tied=True), bits, 64), [3, 1, 4, 1, 5]
    tokens = list(generate(model, prompt, 12, temperature=0))
    assert len(tokens) == 12
    other = decoder(tied=True)
    for parameter in other.parameters():
        parameter.data.mul_(0.5)
    quantize(other, bits, 64).load_state_dict(model.state_dict())
    x = torch.tensor([prompt])
    assert torch.equal(other(x), model(x)) and list(generate(other, prompt, 12, temperature=0)) == tokens


def test_scales_stay_float32():
    form = quantize_weight(torch.randn(6, 128), 4, 32)
    module = QuantizedLinear(*form, torch.randn(6)).bfloat16()
    assert (
        torch.equal(module.scale, form[1])
        and module.bias.dtype == torch.bfloat16
        and torch.equal(module.packed, form[0])
    )
    assert module(torch.randn(2, 128).bfloat16()).dtype == torch.bfloat16


def test_repr():
    w = torch.randn(6, 128)
    assert (
        repr(QuantizedLinear(*quantize_weight(w, 4, 64)))
        == "QuantizedLinear(in_features=128, out_features=6, bits=4, group=64, bias=False)"
    )
    assert (
        repr(QuantizedLinear(*quantize_weight(w, 8), torch.randn(6)))
        == "QuantizedLinear(in_features=128, out_features=6, bits=8, bias=True)"
    )


@pytest.mark.parametrize("bits, group, message", [
    (3, 32, "layers.0.mixer.q: 3 bits, expected 8 or 4"),
    (4, 48, "layers.0.mixer.q: groups of 48, expected 32, 64, 128"),
    (4, 128, "layers.0.mixer.q: 64 inputs, expected a multiple of the group of 128"),
])
def test_refusals(bits, group, message):
    with pytest.raises(InputError, match=message):
        quantize(decoder(), bits, group)


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_weight_that_is_not_finite_is_named_and_nothing_is_changed(bits, value):
    model = decoder()
    model.layers[2].mixer.out_proj.weight.data[1, 2] = value
    with pytest.raises(InputError, match=r"layers\.2\.mixer\.out_proj: 1 of 4096 weights are not finite"):
        quantize(model, bits, 32)
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())


def test_the_group_is_the_largest_that_divides_all():
    """All inputs here are multiples of 64, and not all of 128."""
    assert {
        8 * m.packed.shape[-1] // m.scale.shape[-1]
        for m in quantize(decoder(), 4).modules()
        if isinstance(m, QuantizedLinear)
    } == {64}


# ---- torch's packed products on a CPU

SHAPES = [(64, 256), (48, 128), (16, 384)]


@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-5), (torch.bfloat16, 0.03), (torch.float16, 4e-3)])
@pytest.mark.parametrize("bits, group", FORMATS)
def test_packed_products_are_the_definition(bits, group, dtype, most):
    """For one row, a few, and many; with a bias, in a batch of sequences."""
    assert cpu_products.has(8) and cpu_products.has(4)
    for N, K in SHAPES:
        packed, scale, zero = quantize_weight(torch.randn(N, K), bits, group)
        module, bias = QuantizedLinear(packed.clone(), scale, zero, torch.randn(N).to(dtype)), torch.randn(N).to(dtype)
        module.bias = bias
        for shape in ((1, 1, K), (3, K), (2, 70, K)):
            x = torch.randn(shape).to(dtype)
            exact = x.double() @ dequantize(packed, scale, zero).double().T + bias.double()
            with torch.inference_mode():
                found = module(x)
            assert found.dtype == dtype and found.shape == (*shape[:-1], N)
            assert (found.double() - exact).abs().max() < most * exact.std()
        assert module.packed.dtype == (torch.int8 if bits == 8 else torch.uint8)


@pytest.mark.parametrize("bits, group", [(8, 128), (4, 32)])
def test_many_rows_are_the_definition_and_leave_the_order_as_it_is(bits, group):
    weight = quantize_weight(torch.randn(64, 256), bits, group)
    module, x = QuantizedLinear(*(None if part is None else part.clone() for part in weight)), torch.randn(70, 256)
    with torch.inference_mode():
        found = module(x)
    assert torch.equal(found, x @ dequantize(*weight).T)
    assert module.ordered is None and torch.equal(module.packed, weight[0])


def test_the_order_of_torchs_kernel_is_undone():
    """state_dict, copies and casts have our codes; what was computed before is computed again."""
    weight = quantize_weight(torch.randn(32, 128), 4, 32)
    module, x = QuantizedLinear(*(part.clone() for part in weight)), torch.randn(2, 128)
    with torch.inference_mode():
        before = module(x)
    assert module.packed.dtype == torch.uint8
    assert torch.equal(module.state_dict()["packed"], weight[0])
    with torch.inference_mode():
        assert torch.equal(module(x), before)
        narrow = module.bfloat16()(x.bfloat16())
    assert torch.equal(module.restore(), weight[0]) and module.scale.dtype == torch.float32
    assert (narrow.float() - before).abs().max() < 0.05 * before.std()


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_are_loaded_into_a_module_that_has_run(bits):
    first, second = (QuantizedLinear(*quantize_weight(torch.randn(32, 128), bits, 32)) for _ in range(2))
    x = torch.randn(2, 128)
    with torch.inference_mode():
        first(x)
        first.load_state_dict(second.state_dict())
        assert torch.equal(first(x), second(x))


def test_threads_share_a_module_from_its_first_call_on(monkeypatch):
    """The codes are in torch's order, their scales are not ready, and the others call; one of them in another dtype."""
    scales, started = cpu_products.scales4, threading.Event()

    def slow(*given):
        started.set()
        time.sleep(0.1)
        return scales(*given)

    weight = quantize_weight(torch.randn(32, 128), 4, 32)
    x = torch.randn(2, 128)
    with torch.inference_mode():
        expected = QuantizedLinear(*(part.clone() for part in weight))(x)
    module, found = QuantizedLinear(*weight), {}
    monkeypatch.setattr(cpu_products, "scales4", slow)

    def call(name, dtype):
        with torch.inference_mode():
            found[name] = module(x.to(dtype)).float()

    threads = [threading.Thread(target=call, args=(name, dtype))
               for name, dtype in (("first", torch.float32), ("second", torch.float32), ("third", torch.bfloat16))]
    threads[0].start()
    assert started.wait(10)
    for thread in threads[1:]:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(found["first"], expected) and torch.equal(found["second"], expected)
    assert (found["third"] - expected).abs().max() < 0.05 * expected.std()
    assert torch.equal(module.restore(), weight[0])


@pytest.mark.parametrize("bits, N, K, group", [(8, 16, 24, 24), (4, 24, 64, 32), (4, 16, 64, 16)])
def test_shapes_that_torch_has_no_kernel_for(bits, N, K, group):
    """8 bits with K = 24 read past the end of a row (torch 2.13, bfloat16)."""
    assert not cpu_products.fits(bits, N, K, group)


@pytest.mark.parametrize("broken", ["missing", "wrong"])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_kernel_that_is_not_what_it_was_is_not_used(bits, broken, monkeypatch):
    def instead(*args):
        if broken == "missing":
            raise AttributeError("no such operation")
        return torch.zeros(len(args[0]), len(args[1]))

    name = f"rows{bits}"
    monkeypatch.setattr(cpu_products, name, instead)
    cpu_products.has.cache_clear()
    try:
        assert not cpu_products.has(bits)
        module, x = QuantizedLinear(*quantize_weight(torch.randn(32, 128), bits, 32)), torch.randn(2, 128)
        with torch.inference_mode():
            found = module(x)
        expected = x @ dequantize(module.packed, module.scale, module.zero).T
        assert torch.allclose(found, expected, atol=1e-5)
    finally:
        cpu_products.has.cache_clear()


@pytest.mark.parametrize("bits", [8, 4])
def test_a_compiled_model_measures_without_torchs_kernels(bits):
    """Held-out loss of a model that trains with --compile: torch's compiler does not follow the trial of a kernel."""
    weight = quantize_weight(torch.randn(32, 64), bits, 32)
    module = QuantizedLinear(*(None if part is None else part.clone() for part in weight))
    x = torch.randn(3, 64)
    with torch.no_grad():
        found = torch.compile(module, backend="eager", fullgraph=True)(x)
    assert torch.equal(found, x @ dequantize(*weight).T)
