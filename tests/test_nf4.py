"""NF4 and the products with frozen weights: bit for bit bitsandbytes, and torch's own gradients."""

import copy
import warnings

import pytest
import torch
from torch.nn import functional as F

import checkpoints
from nanollm.errors import CheckpointError
from nanollm.inference.quantize import KINDS, QuantizedExperts, apply, plan_for
from nanollm.layers import nf4
from nanollm.layers.frozen import FrozenLinear
from nanollm.layers.nf4 import NF4Linear
from nanollm.model import Decoder
from nanollm.presets import preset

DTYPES = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(scope="module")
def theirs():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        functional = pytest.importorskip("bitsandbytes.functional")
    return functional


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def equal(theirs, weight: torch.Tensor) -> list[bool]:
    """Packed bytes, second-level codes, scales, mean, dequantised values."""
    packed, state = theirs.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    ours = nf4.quantize(weight)
    parts = zip((packed.flatten(), state.absmax, state.state2.absmax, state.offset), ours, strict=True)
    back = theirs.dequantize_4bit(packed, state).reshape(weight.shape)
    return [*(torch.equal(a, b) for a, b in parts),
            torch.equal(back, nf4.dequantize(weight.dtype, tuple(weight.shape), *ours))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(128, 64), (36, 100), (1, 6), (3, 64 * 300), (5, 130)], ids=str)
def test_every_bit_is_that_of_bitsandbytes(theirs, dtype, shape):
    assert all(equal(theirs, (0.02 * random(*shape)).to(dtype)))


def test_so_are_ties_zeros_and_the_smallest_numbers(theirs):
    level = torch.tensor(nf4.LEVELS)
    middle = (level[:-1] + level[1:]) / 2
    around = [middle, torch.nextafter(middle, torch.tensor(2.0)), torch.nextafter(middle, torch.tensor(-2.0))]
    zeros = random(64, 64)
    zeros[3:20] = 0
    for weight in (torch.cat([*around, torch.ones(19)])[None], zeros, torch.zeros(8, 64), torch.ones(8, 64),
                   1e-40 * random(8, 64), random(64, 64) * 10.0 ** torch.arange(-20, 12).repeat(2)[:, None]):
        assert all(equal(theirs, weight))


def test_the_dynamic_map_is_theirs(theirs):
    assert torch.equal(nf4.MAP, theirs.create_dynamic_map())


def test_two_bytes_for_an_odd_number_of_weights():
    weight = random(3, 1)
    found = nf4.quantize(weight)
    assert found.packed.shape == (2,) and nf4.dequantize(torch.float32, (3, 1), *found).shape == (3, 1)


# ---- modules

def module() -> NF4Linear:
    return NF4Linear(36, 100, nf4.quantize(random(36, 100)), random(36, seed=1))


def test_a_module_moves_without_rounding_and_is_saved():
    one = module()
    before = one.dense()
    assert torch.equal(copy.deepcopy(one).to(torch.bfloat16).dense(), before) and one.s.dtype == torch.float32
    other = NF4Linear(36, 100, nf4.room((36, 100), "cpu"), torch.empty(36))
    other.load_state_dict(one.state_dict())
    x = random(5, 100)
    assert torch.equal(other(x), one(x)) and torch.equal(one(x), F.linear(x, before, one.bias))
    assert set(one.state_dict()) == {"packed", "c", "s", "m", "bias"}


def toy(name: str = "llama") -> Decoder:
    return Decoder(preset(name, 300, 64))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_dequantised_weight(kind):
    model = toy()
    apply(model, plan_for(model, kind))
    one = model.layers[0].ffn.gate
    x, gradient = random(2, 9, one.inputs).requires_grad_(), random(2, 9, one.outputs, seed=1)
    mine = torch.autograd.grad(one(x), x, gradient)[0]
    y = F.linear(x, one.dense(), one.bias)
    assert torch.equal(one(x), y) and torch.equal(mine, torch.autograd.grad(y, x, gradient)[0])


def kept(run) -> int:
    """Bytes that a forward pass keeps for the backward pass, each storage once."""
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(found.values())


@pytest.mark.parametrize("kind", [*KINDS, "bfloat16"])
def test_no_weight_in_full_precision_waits_for_the_backward_pass(kind):
    if kind == "bfloat16":                                      # stored in 16 bits, multiplied in 32
        one = FrozenLinear(256, 512, bias=False)
        one.weight = torch.nn.Parameter(random(512, 256).bfloat16(), requires_grad=False)
        stored = one.weight.nbytes
    else:
        model = toy()
        apply(model, plan_for(model, kind))
        one = model.layers[0].ffn.gate
        stored = sum(part.nbytes for part in one.buffers())
    wide = one.weight if kind == "bfloat16" else one.dense()
    x = random(3, wide.shape[1]).requires_grad_()
    assert kept(lambda: one(x)) <= stored < wide.float().nbytes
    assert kept(lambda: F.linear(x, wide.float() * 1)) >= wide.float().nbytes
    gradient = torch.autograd.grad(one(x).sum(), x)[0]
    assert torch.equal(gradient, torch.autograd.grad(F.linear(x, wide.float()).sum(), x)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_experts_and_a_folder_that_is_read_so(tmp_path, kind):
    """Quantised tensor by tensor as they come in: what a model in memory becomes."""
    model = toy("mixtral").eval()
    checkpoints.save(model, tmp_path / "model")
    loaded = checkpoints.load(tmp_path / "model", quantize=kind)
    apply(model, plan_for(model, kind))
    assert isinstance(loaded.layers[0].ffn.experts, QuantizedExperts)
    names, theirs = dict(model.named_buffers()), dict(loaded.named_buffers())
    assert names and names.keys() == theirs.keys()
    assert all(torch.equal(names[name], theirs[name]) for name in names)
    tokens = torch.randint(0, 300, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(model(tokens), loaded(tokens))
        whole = model.layers[0].ffn.experts.gate.dense()
        assert whole.shape == (4, 160, 128) and torch.isfinite(whole).all()


def test_a_model_in_nf4_is_not_saved(tmp_path):
    model = toy()
    apply(model, plan_for(model, "nf4"))
    with pytest.raises(CheckpointError, match="packed weights cannot be saved"):
        checkpoints.save(model, tmp_path / "model")
