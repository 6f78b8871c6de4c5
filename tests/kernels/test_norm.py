"""RMSNorm and LayerNorm kernels against nanollm/layers/norm.py."""

import pytest
import torch

import kernels
from kernels.norm import backward_kernel, forward_kernel, norm_backward_op, norm_op
from nanollm.layers import norm
from tests.kernels.checks import DTYPES, INTERPRETED, agree, compiles, far, programs_from


def real_launches():
    """For tests/kernels/compiled.py: per-head norms, and the widths of decoders from 1 B to 400 B."""
    for width in (128, 2048, 4096, 8192, 16384):
        x = torch.empty(64, width, dtype=torch.bfloat16, requires_grad=True)
        gain = torch.empty(width, dtype=torch.bfloat16, requires_grad=True)
        total, y = kernels.add_rms_norm(x, x.detach(), gain, 1e-5)
        (total + y).sum().backward()
        if width in (4096, 8192):
            kernels.layer_norm(x, gain, gain, 1e-5).sum().backward()
    kernels.rms_norm(torch.empty(64, 4096), torch.empty(4096), 1e-6, 1.0, True)


SHAPES = [(1, 1, 64), (2, 3, 96), (1, 5, 1000), (2, 17, 128), (1, 33, 256), (1, 2, 4100)]


def weights(shape, dtype):
    x, y = torch.randn(shape), torch.randn(shape) * 3
    return x.to(dtype), y.to(dtype), (torch.rand(shape[-1]) + 0.5).to(dtype), torch.randn(shape[-1]).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 2, 9000)], ids=str)
def test_rms_norm(shape, dtype):
    x, _, gain, _ = weights(shape, dtype)
    agree(kernels.rms_norm, norm.rms_norm, x, gain, 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset, after", [(0.0, True), (1.0, True), (1.0, False)])
def test_gain_as_an_offset_and_both_cast_orders(offset, after, dtype):
    x, _, gain, _ = weights((2, 7, 96), dtype)
    agree(kernels.rms_norm, norm.rms_norm, x, gain, 1e-2, offset, after)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 2, 9000)], ids=str)
def test_add_rms_norm(shape, dtype):
    x, y, gain, _ = weights(shape, dtype)
    agree(kernels.add_rms_norm, norm.add_rms_norm, x, y, gain, 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layer_norm(shape, biased, dtype):
    x, _, gain, bias = weights(shape, dtype)
    agree(kernels.layer_norm, norm.layer_norm, x + 2, gain, bias if biased else None, 1e-5)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
@pytest.mark.parametrize("after", [True, False])
def test_the_cast_order_is_that_of_the_definition_to_the_bit(dtype, after):
    """Rounding before or after the gain differs in half of all values: the float64 comparison would not see it."""
    x, _, gain, _ = weights((4, 9, 192), dtype)
    ours, theirs = kernels.rms_norm(x, gain, 1e-5, 0.0, after), norm.rms_norm(x, gain, 1e-5, 0.0, after)
    assert (ours != theirs).float().mean() < 0.005          # the mean square itself is summed in another order


def test_rows_of_zeros_and_of_huge_numbers():
    x = torch.stack([torch.zeros(96), torch.full((96,), 1e18), torch.full((96,), -1e-18)])
    agree(kernels.rms_norm, norm.rms_norm, x, torch.ones(96), 1e-6)


def test_as_torch_sees_them():
    x, y, gain, bias = weights((2, 3, 96), torch.float32)
    torch.library.opcheck(norm_op, (x.requires_grad_(), y, gain.requires_grad_(), None, 1e-5, 0.0, False, True))
    torch.library.opcheck(norm_op, (x, None, gain, bias.requires_grad_(), 1e-5, 0.0, True, False))
    given = (x.detach(), y, x.detach(), gain.detach(), y[0, 0, :0], torch.rand(6), 0.0, False, False)
    torch.library.opcheck(norm_backward_op, given)
    compiles(lambda x, y, gain: kernels.add_rms_norm(x, y, kernels.rms_norm(gain, gain, 1e-5), 1e-5), x, y, gain)
    compiles(lambda x, gain, bias: kernels.layer_norm(x, gain, bias, 1e-5), x, gain, bias)


@pytest.mark.skipif(not INTERPRETED, reason="runs one program out of many, which only the interpreter can")
def test_beyond_two_to_the_31_elements():
    rows, width = 2**19 + 3, 4096
    x, y, dx = far((rows, width)), far((rows, width)), far((rows, width))
    gain, r = torch.rand(width).half(), torch.zeros(rows)
    x[-1] = torch.randn(width)
    options = dict(ADD=False, CENTRE=False, BIAS=False, ROWS=1, BLOCK=width)
    with programs_from(rows - 1):
        forward_kernel[(1,)](x, None, gain, None, None, y, None, r, rows, width, 1e-5, 0.0, ROUND=True, **options)
        assert torch.equal(y[-1], norm.rms_norm(x[-1], gain, 1e-5))
        sums = far((rows, width), torch.float32)
        backward_kernel[(1,)](y, None, x, gain, None, r, dx, sums, None, rows, width, 0.0, **options)
    wide = x[-1].float().requires_grad_()
    right, = torch.autograd.grad(norm.rms_norm(wide, gain.float(), 1e-5), wide, y[-1].float())
    torch.testing.assert_close(dx[-1].float(), right, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(sums[-1], y[-1].float() * x[-1].float() * r[-1])


@pytest.mark.parametrize("call, reason", [
    (lambda: kernels.rms_norm(torch.zeros(2, 20000), torch.ones(20000), 1e-5),
     "rows of 20000, supported are up to 16384"),
    (lambda: kernels.layer_norm(torch.zeros(2, 9000), torch.ones(9000), None, 1e-5),
     "rows of 9000, supported are up to 8192"),
    (lambda: kernels.rms_norm(torch.zeros(8, 4).T, torch.ones(8), 1e-5), "rows must follow one another"),
    (lambda: kernels.rms_norm(torch.zeros(2, 8).double(), torch.ones(8), 1e-5), "float64, supported are"),
    (lambda: kernels.rms_norm(torch.zeros(2, 8), torch.ones(8, device="meta"), 1e-5), "gain is on meta"),
    (lambda: kernels.rms_norm(torch.zeros(2, 8), torch.ones(9), 1e-5), "gain has shape (9,), expected (8,)"),
    (lambda: kernels.add_rms_norm(torch.zeros(2, 8), torch.zeros(1, 8), torch.ones(8), 1e-5), "must be alike"),
    (lambda: kernels.layer_norm(torch.zeros(2, 8), torch.ones(8), torch.ones(7), 1e-5),
     "bias has shape (7,), expected (8,)"),
])
def test_refusals(call, reason):
    with pytest.raises(ValueError, match="kernels.*" + reason.replace("(", r"\(").replace(")", r"\)")):
        call()
