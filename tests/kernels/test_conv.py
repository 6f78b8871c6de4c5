"""The short causal convolution against nanollm/layers/mamba.py."""

import pytest
import torch

import kernels
from kernels.conv import backward_kernel, conv_backward_op, conv_op, forward_kernel
from nanollm.layers import mamba
from tests.kernels.checks import DTYPES, INTERPRETED, agree, compiles, far, in_turn, programs_from


def real_launches():
    """For tests/kernels/compiled.py: x as Mamba hands it over, the first half of in_proj's result."""
    for dtype, I, biased in ((torch.bfloat16, 4096, True), (torch.float32, 1536, False)):
        both, before = torch.empty(2, 64, 2 * I, dtype=dtype, requires_grad=True), torch.empty(2, I, 3, dtype=dtype)
        x, weight = both[..., :I].transpose(1, 2), torch.empty(I, 1, 4, dtype=dtype, requires_grad=True)
        bias = torch.empty(I, dtype=dtype) if biased else None
        for positions in (None, torch.zeros(2, 64, dtype=torch.int64)):
            y = kernels.causal_conv(x, weight, bias, before, positions)
            y.backward(torch.empty_like(y))


def inputs(batch, I, T, width, dtype=torch.float32, positions=False, seed=0):
    """x a transposed half, before contiguous as in a new cache, positions of two documents, padding at both ends."""
    torch.manual_seed(seed)
    x = torch.randn(batch, T, 2 * I).to(dtype)[..., :I].transpose(1, 2)
    place = None
    if positions:
        place = torch.arange(T).expand(batch, T).clone() + 2               # goes on from before the call
        place[0, T // 3 :] -= T // 3 + 2                                    # a document begins
        place[-1, T - T // 4 :] = -1
        place[0, : T // 8] = -1
    weight, bias, before = torch.randn(I, 1, width), torch.randn(I), torch.randn(batch, I, width - 1)
    return x, weight.to(dtype), bias.to(dtype), before.to(dtype), place


@pytest.mark.parametrize("batch, I, T, width, dtype", in_turn([
    (1, 96, 1, 4), (2, 20, 2, 4), (1, 128, 15, 4), (2, 64, 16, 3), (1, 129, 17, 2), (1, 40, 35, 4), (1, 40, 18, 1),
    (1, 24, 33, 8)]), ids=str)
@pytest.mark.parametrize("positions", [False, True])
def test_conv(batch, I, T, width, positions, dtype):
    agree(kernels.causal_conv, mamba.causal_conv, *inputs(batch, I, T, width, dtype, positions))


def test_one_token_after_another_is_the_whole_to_the_bit():
    """Each call is handed the k − 1 inputs that precede it; documents and what comes later change nothing."""
    x, weight, bias, before, positions = inputs(2, 20, 19, 4, positions=True)
    y, everything = kernels.causal_conv(x, weight, bias, before, positions), torch.cat([before, x], -1)
    for cuts in ([*range(20)], [0, 2, 19], [0, 17, 18, 19]):
        parts = []
        for start, end in zip(cuts, cuts[1:], strict=False):
            preceding = everything[..., start : start + 3]
            parts.append(kernels.causal_conv(x[..., start:end], weight, bias, preceding, positions[:, start:end]))
        assert torch.equal(torch.cat(parts, -1), y)


def test_a_document_sees_nothing_of_what_came_before():
    x, weight, bias, before, _ = inputs(1, 20, 9, 4)
    positions = torch.tensor([[5, 6, -1, -1, 0, 1, 2, 3, 4]])
    packed = kernels.causal_conv(x, weight, bias, before, positions)
    assert torch.equal(packed[..., 4:], kernels.causal_conv(x[..., 4:], weight, bias, before * 0, None))
    assert torch.equal(packed[..., :2], kernels.causal_conv(x, weight, bias, before, None)[..., :2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_a_bias_and_whatever_lies_how(dtype):
    x, weight, _, before, positions = inputs(2, 24, 7, 4, dtype, True)
    agree(kernels.causal_conv, mamba.causal_conv, x, weight, None, before, None)
    weight, before = (tensor.transpose(0, 2).contiguous().transpose(0, 2) for tensor in (weight, before))
    agree(kernels.causal_conv, mamba.causal_conv, x.contiguous(), weight, None, before, positions)


def test_nothing_of_x_is_copied_and_the_way_back_is_free():
    x, *rest = inputs(1, 24, 7, 4)
    assert not x.is_contiguous() and not x.transpose(1, 2).is_contiguous()
    assert kernels.causal_conv(x, *rest).transpose(1, 2).is_contiguous()


@pytest.mark.slow
def test_as_torch_sees_it():
    x, weight, bias, before, positions = inputs(2, 20, 9, 4, positions=True)
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias, before)]
    torch.library.opcheck(conv_op, (*leaves, positions))
    torch.library.opcheck(conv_op, (leaves[0], leaves[1], None, leaves[3], None))
    torch.library.opcheck(conv_backward_op, (x.detach() * 2, *(tensor.detach() for tensor in leaves), positions))
    compiles(kernels.causal_conv, x, weight, bias, before, positions)


@pytest.mark.skipif(not INTERPRETED, reason="runs one program out of many, which only the interpreter can")
def test_beyond_two_to_the_31_elements():
    rows, I, last = 2**19 + 3, 4096, slice(4096 - 128, 4096)
    given = inputs(1, 128, 1, 2)
    x, weight, bias, before, _ = (tensor if tensor is None else tensor.requires_grad_() for tensor in given)
    wide = [far((rows, I), torch.float32) for _ in range(6)]
    for place, tensor in zip(wide[:2], (x, before), strict=True):
        place[-1, last] = tensor.detach().flatten()
    y, dx, dbefore, dweight = wide[2:]
    taps, shift, dbias = torch.zeros(2, I), torch.zeros(I), far((rows, I), torch.float32)
    taps[:, last], shift[last] = weight[:, 0].T.detach(), bias.detach()
    options, strides = dict(POSITIONS=False, BIAS=True, WIDTH=2, TOKENS=2, CHANNELS=128), (I, 1, I)
    with programs_from(rows * (I // 128) - 1):
        forward_kernel[(1,)](wide[0], taps, shift, wide[1], None, y, 1, I, *strides, **options)
        backward_kernel[(1,)](wide[0], wide[0], taps, shift, wide[1], None, dx, dweight, dbias, dbefore, 1, I,
                              *strides, *strides, **options)
    right = kernels.causal_conv(x, weight, bias, before, None)
    gradients = torch.autograd.grad(right, (x, before, bias), x.detach())
    for mine, wanted in zip((y, dx, dbefore, dbias), (right, *gradients), strict=True):
        assert torch.equal(mine[-1, last], wanted.flatten())


@pytest.mark.skipif(not INTERPRETED, reason="a large tensor that takes no memory until it is written")
@pytest.mark.parametrize("turned", [False, True])
def test_tokens_or_channels_far_apart(turned):
    """The stride alone takes a token, or a channel, beyond 2³¹."""
    near, weight, bias, before, _ = inputs(1, 6, 6, 4, torch.float16)
    wide = far((6, 2**29))[:, :6][None]
    x = wide if turned else wide.transpose(1, 2)
    x.copy_(near)
    assert torch.equal(conv_op(x, weight, bias, before, None), conv_op(near, weight, bias, before, None))
    far_apart, side_by_side = (conv_backward_op(z, z, weight, bias, before, None) for z in (x, near))
    for mine, right in zip(far_apart, side_by_side, strict=True):
        assert torch.equal(mine, right)


def changed(**others):
    names = ("x", "weight", "bias", "before", "positions")
    return list((dict(zip(names, inputs(2, 6, 5, 4), strict=True)) | others).values())


@pytest.mark.parametrize("others, reason", [
    (dict(x=torch.zeros(2, 6, 0)), "x and weight have shapes (2, 6, 0) and (6, 1, 4)"),
    (dict(weight=torch.zeros(6, 2, 4)), "weight has shape (6, 2, 4), expected (6, 1, 4)"),
    (dict(bias=torch.zeros(5)), "bias has shape (5,), expected (6,)"),
    (dict(before=torch.zeros(2, 6, 4)), "before has shape (2, 6, 4), expected (2, 6, 3)"),
    (dict(before=torch.zeros(2, 6, 3).half()), "before is float16, expected float32 as x"),
    (dict(positions=torch.zeros(2, 4, dtype=torch.int64)), "positions has shape (2, 4), expected (2, 5)"),
    (dict(positions=torch.zeros(2, 5, dtype=torch.int32)), "positions are int32, expected int64"),
    (dict(weight=torch.zeros(6, 1, 9), before=torch.zeros(2, 6, 8)), "9 taps, supported are 1 to 8"),
    (dict(weight=torch.zeros(6, 1, 4).double()), "weight is float64, supported are"),
    (dict(bias=torch.zeros(6, device="meta")), "bias is on meta"),
])
def test_refusals(others, reason):
    with pytest.raises(ValueError, match="kernels.*" + reason.replace("(", r"\(").replace(")", r"\)")):
        kernels.causal_conv(*changed(**others))
