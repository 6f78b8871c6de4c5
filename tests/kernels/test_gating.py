"""The gate of SwiGLU and GeGLU against nanollm/layers/mlp.py, and the activation functions by themselves."""

import pytest
import torch
import triton
import triton.language as tl

import kernels
from kernels.activation import ACTIVATIONS, activated, slope
from kernels.gating import backward_kernel, forward_kernel, gated_backward_op, gated_op
from nanollm.layers import mlp
from tests.kernels.checks import DEVICE, DTYPES, INTERPRETED, agree, compiles, far, programs_from


def real_launches():
    """For tests/kernels/compiled.py: every activation, and float32."""
    for activation in ACTIVATIONS:
        gate, up = (torch.empty(64, 14336, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
        kernels.gated(gate, up, activation).sum().backward()
    gate, up = (torch.empty(64, 14336, requires_grad=True) for _ in range(2))
    kernels.gated(gate, up, "silu").sum().backward()


SHAPES = [(1,), (2, 3, 96), (5, 1000), (1023,), (1, 1024), (1025,), (2047,), (2, 1024), (2049,), (4099,)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gated(shape, activation, dtype):
    agree(kernels.gated, mlp.gated, torch.randn(shape).to(dtype) * 2, torch.randn(shape).to(dtype), activation)


@triton.jit
def both_kernel(x_ptr, value_ptr, slope_ptr, NAME: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    tl.store(value_ptr + at, activated(x, NAME))
    tl.store(slope_ptr + at, slope(x, NAME))


@pytest.mark.filterwarnings("ignore:overflow")               # exp(12000) is inf, and 1 / inf the right 0
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_value_and_slope_of_the_activations(activation):
    """Between −12 and 12, and far out, where one of the factors is 0 and the other large."""
    x = torch.cat([torch.linspace(-12, 12, 4093), torch.tensor([-1e4, 1e4, 0.0])]).to(DEVICE)
    value, slopes = torch.empty_like(x), torch.empty_like(x)
    both_kernel[(1,)](x, value, slopes, NAME=activation, BLOCK=4096)
    exact = x.double().requires_grad_()
    right = mlp.activate(activation, exact)
    torch.testing.assert_close(value.double(), right.detach(), rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(slopes.double(), torch.autograd.grad(right.sum(), exact)[0], rtol=2e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_numbers(activation):
    large = torch.tensor([-60000.0, -300.0, -90.0, 0.0, 90.0, 200.0])
    agree(kernels.gated, mlp.gated, large, torch.full((6,), 3.0), activation)


def test_what_went_in_is_left_as_it_was():
    gate, up = torch.randn(2, 8, 96, device=DEVICE).unbind()
    before = gate.clone(), up.clone()
    gate.requires_grad_(), up.requires_grad_()
    grads = torch.autograd.grad(kernels.gated(gate, up, "silu").square().sum(), (gate, up))
    assert torch.equal(gate, before[0]) and torch.equal(up, before[1]) and grads[0].data_ptr() != grads[1].data_ptr()


def test_one_of_the_two_is_frozen():
    gate, up = torch.randn(8, 96, device=DEVICE), torch.randn(8, 96, device=DEVICE, requires_grad=True)
    kernels.gated(gate, up, "gelu").sum().backward()            # its gradient comes in expanded, with strides of 0
    torch.testing.assert_close(up.grad, mlp.activate("gelu", gate))
    assert gate.grad is None


@pytest.mark.slow
def test_as_torch_sees_it():
    gate, up, dy = torch.randn(3, 4, 96)
    torch.library.opcheck(gated_op, (gate.clone().requires_grad_(), up.clone().requires_grad_(), "gelu_tanh"))
    torch.library.opcheck(gated_backward_op, (dy, gate, up, "silu"))
    compiles(lambda gate, up: kernels.gated(gate, up, "silu"), gate, up)


@pytest.mark.skipif(not INTERPRETED, reason="runs one program out of many, which only the interpreter can")
def test_beyond_two_to_the_31_elements():
    n = 2**31 + 3 * 1024
    gate, up, y, dgate, dup = (far((n,)) for _ in range(5))
    last = n // 1024 - 1
    gate[-1024:], up[-1024:] = torch.randn(2, 1024).half()
    with programs_from(last):
        forward_kernel[(1,)](gate, up, y, n, ACTIVATION="silu", BLOCK=1024)
        backward_kernel[(1,)](up, gate, up, dgate, dup, n, ACTIVATION="silu", BLOCK=1024)
    g, u = gate[-1024:].float().requires_grad_(), up[-1024:].float().requires_grad_()
    right = mlp.gated(g, u, "silu")
    for mine, theirs in zip((y, dgate, dup), (right, *torch.autograd.grad(right, (g, u), u)), strict=True):
        torch.testing.assert_close(mine[-1024:].float(), theirs, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("arguments, reason", [
    ((torch.zeros(2, 8), torch.zeros(2, 8), "tanh"), "activation is 'tanh', expected one of silu, gelu"),
    ((torch.zeros(2, 8), torch.zeros(8), "silu"), "gate and up must be alike, they are (2, 8)"),
    ((torch.zeros(2, 8), torch.zeros(2, 8).half(), "silu"), "gate and up must be alike"),
    ((torch.zeros(8, 2).T, torch.zeros(2, 8), "silu"), "gate and up must be contiguous"),
    ((torch.zeros(2, 8), torch.zeros(2, 16)[:, :8], "silu"), "gate and up must be contiguous"),
    ((torch.zeros(0, 8), torch.zeros(0, 8), "silu"), "there is nothing in gate"),
    ((torch.zeros(2, 8).double(), torch.zeros(2, 8).double(), "silu"), "float64, supported are"),
    ((torch.zeros(2, 8), torch.zeros(2, 8, device="meta"), "silu"), "up is on meta"),
])
def test_refusals(arguments, reason):
    with pytest.raises(ValueError, match="kernels.gated.*" + reason.replace("(", r"\(").replace(")", r"\)")):
        kernels.gated(*arguments)
