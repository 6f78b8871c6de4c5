"""The kernels of state-space duality against nanollm/layers/ssd.py."""

import contextlib
import itertools

import pytest
import torch
import triton.language as tl
from torch.nn import functional as F

from kernels.common import tuned
from kernels.duality import gradient_kernel, output_kernel, ssd_backward_op, ssd_op, walk_kernel
from kernels.duality import ssd as kernel
from nanollm.layers.ssd import ssd, ssd_sequential
from tests.kernels.checks import (
    DEVICE,
    DTYPES,
    INTERPRETED,
    agree,
    compiles,
    far,
    in_float64,
    in_turn,
    programs_from,
    run,
)


def real_launches():
    """For tests/kernels/compiled.py: a layer of Mamba-2 (2.7 B: 80 heads of 64, a state of 128), in each dtype; in
    bfloat16 with documents too."""
    bfloat16, float16, float32 = torch.bfloat16, torch.float16, torch.float32
    for dtype, documents in ((bfloat16, False), (bfloat16, True), (float16, False), (float32, False)):
        T, H, P, N = 128, 80, 64, 128
        row = torch.empty(1, T, H * P + 2 * N, dtype=dtype, requires_grad=True)
        x, B, C = row.split([H * P, N, N], 2)
        begins = torch.empty(1, T, dtype=torch.bool) if documents else None
        x, B, C, h = x.unflatten(2, (H, P)), B[:, :, None], C[:, :, None], torch.empty(1, H, P, N)
        y, h = kernel(x, torch.empty(1, T, H), torch.empty(H), B, C, torch.empty(H), h, begins)
        (y.float().sum() + h.sum()).backward()


def inputs(T, dtype, H=2, G=1, P=16, N=16, batch=1):
    """x, Δ, A, B, C, D, h as a layer has them: x, B, C parts of one row a token, decays from almost none to all."""
    torch.manual_seed(1)
    row = torch.randn(batch, T, H * P + 2 * G * N).to(dtype)
    x, B, C = row.split([H * P, G * N, G * N], 2)
    delta, A = F.softplus(torch.randn(batch, T, H) - 1), -torch.logspace(-2, 1, H)
    x, B, C = x.unflatten(2, (H, P)), B.unflatten(2, (G, N)), C.unflatten(2, (G, N))
    return x, delta, A, B, C, torch.randn(H), torch.randn(batch, H, P, N)


def begin(T, *places, batch=1):
    begins = torch.zeros(batch, T, dtype=torch.bool)
    begins[:, list(places)] = True
    return begins


def agree_ssd(*given):
    """dA of a head is one sum over all tokens: its error is relative to the terms: gradients of an A for each token."""
    x, delta, A, *more = given
    with in_float64():
        _, gradients = run(ssd_sequential, (x, delta, A.expand(delta.shape).contiguous(), *more), torch.float64, True)
    agree(kernel, ssd, *given, terms={2: gradients[2].abs().sum((0, 1))})


# chunks are of 64 tokens in bfloat16 and of 32 in the others
LENGTHS = [(torch.bfloat16, T) for T in (1, 63, 64, 65, 131)]
LENGTHS += [(dtype, T) for dtype in (torch.float32, torch.float16) for T in (1, 31, 32, 33, 67)]


@pytest.mark.parametrize("dtype, T", LENGTHS, ids=str)
def test_lengths(dtype, T):
    agree_ssd(*inputs(T, dtype))


@pytest.mark.parametrize("H, G, P, N, batch, dtype", in_turn([
    (4, 2, 32, 16, 1), (3, 3, 16, 64, 1), (2, 1, 64, 32, 2), (2, 2, 24, 40, 1), (1, 1, 1, 1, 2), (1, 1, 80, 128, 1),
]), ids=str)
def test_heads_groups_and_widths(H, G, P, N, batch, dtype):
    agree_ssd(*inputs(40, dtype, H, G, P, N, batch))


@pytest.mark.parametrize("places, dtype", in_turn([[0], [1, 31, 63], [32, 64], [5, 6, 40, 66], range(70)]), ids=str)
def test_documents(places, dtype):
    agree_ssd(*inputs(70, dtype), begin(70, *places))


def test_documents_of_each_row():
    begins = torch.rand(2, 70) < 0.05
    agree_ssd(*inputs(70, torch.float32, batch=2), begins)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_step_at_all_and_steps_that_forget_all(dtype):
    x, delta, A, B, C, D, h = inputs(70, dtype)
    delta[:, 10:20], delta[:, 40:50] = 0, 1e-30
    delta[:, [3, 33, 34, 65]], x[:, [3, 33, 34, 65]] = 1e6, 0           # −10⁴ and less: what comes after stays exact
    agree(kernel, ssd, x, delta, A, B, C, D, h, backward=False)
    agree_ssd(x, torch.zeros_like(delta), A, B, C, D, h)


def test_a_step_that_forgets_all_leaves_its_neighbours_exact():
    """Running sums with −10⁶ among them would round the rest of the chunk away; so would its slope."""
    x, delta, A, B, C, D, h = inputs(31, torch.float32)
    delta[:, 9] = 1e6 / A.abs()
    x[:, 9], C[:, 9] = 0, 0
    def later(f):
        return lambda *given: [part[:, 10:] for part in f(*given)[:1]]

    agree(later(kernel), later(ssd), x, delta, A, B, C, D, h)


def test_long_memory():
    x, delta, A, B, C, D, h = inputs(40, torch.float32)
    agree_ssd(x, delta * 1e-3, A, B, C, D, h)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_split_gives_the_whole(dtype):
    x, delta, A, B, C, D, h = (t.to(DEVICE) for t in inputs(70, dtype))
    whole, last = kernel(x, delta, A, B, C, D, h)
    parts = []
    for a, b in ((0, 1), (1, 33), (33, 70)):
        y, h = kernel(x[:, a:b], delta[:, a:b].contiguous(), A, B[:, a:b], C[:, a:b], D, h)
        parts.append(y)
    bound = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    close = dict(rtol=0, atol=float(bound * whole.abs().max()))
    torch.testing.assert_close(torch.cat(parts, 1), whole, **close)
    torch.testing.assert_close(h, last, **close)


def test_the_future_changes_nothing_and_twice_is_the_same():
    x, delta, A, B, C, D, h = (t.to(DEVICE) for t in inputs(70, torch.bfloat16))
    before, again = kernel(x, delta, A, B, C, D, h)[0], kernel(x, delta, A, B, C, D, h)[0]
    changed = [t.clone() for t in (x, delta, B, C)]
    for t in changed:
        t[:, 50:] = 3
    after = kernel(changed[0], changed[1], A, changed[2], changed[3], D, h)[0]
    assert torch.equal(before, again) and torch.equal(before[:, :50], after[:, :50]) and not torch.equal(before, after)


@pytest.mark.slow
def test_as_torch_sees_them():
    given = [t.to(DEVICE) for t in inputs(35, torch.float32)]
    begins = begin(35, 3, 20).to(DEVICE)
    leaves = (*(t.detach().requires_grad_() for t in given), begins)
    torch.library.opcheck(ssd_op, leaves, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
    x, delta, A, B, C, D, h = given
    y, last, states = ssd_op(*given, None)
    torch.library.opcheck(ssd_backward_op, (y, last, x, delta, A, B, C, D, begins, states))
    compiles(lambda *given: kernel(*given, begins), *given)


@contextlib.contextmanager
def program(*first):
    with contextlib.ExitStack() as stack:
        for axis, number in enumerate(first):
            stack.enter_context(programs_from(number, axis))
        yield


@pytest.mark.skipif(not INTERPRETED, reason="runs one program out of many, which only the interpreter can")
def test_beyond_two_to_the_31_elements():
    """The last head of the last of 2²⁴ sequences of one token: every tensor has more than 2³¹ elements."""
    batch, H = 2**24 + 1, 128
    small = inputs(1, torch.float32, H=1, P=1, N=1)
    x, delta, _, B, C, _, h = (far((batch, H), dtype) for dtype in (torch.float16,) * 6 + (torch.float32,))
    for whole, tail in zip((x, delta, B, C, h), (small[0], small[1], small[3], small[4], small[6]), strict=True):
        whole[-1, -1] = tail.flatten()
    A, D, y = torch.zeros(H), torch.ones(H), far((batch, H))
    A[-1] = -1
    sizes, tile = (1, H, 1, 1, 1), dict(BEGINS=False, DOT=tl.float32, PRECISION="ieee", Q=16, BP=16, BN=16)
    states, after, last, dh, ddelta, dB, dC, dA, dD = (far((batch, H), torch.float32) for _ in range(9))
    with program(H - 1, 0, batch - 1):
        walk_kernel[(1, 1, 1)](x, delta, A, B, h, None, states, last, *sizes, H, H, H, H, BACK=False, **tile)
        output_kernel[(1, 1, 1)](x, delta, A, B, C, D, None, states, y, *sizes, *(H,) * 6, **tile)
        walk_kernel[(1, 1, 1)](y, delta, A, C, last, None, after, dh, *sizes, H, H, H, H, BACK=True, **tile)
        gradient_kernel[(1, 1, 1)](y, after, x, delta, A, B, C, D, None, states, h, ddelta, dA, dB, dC, dD,
                                   *sizes, *(H,) * 6, **tile)
    rounded = [t.half().float() for t in (*small[:2], A[-1:], *small[3:5], D[-1:])]        # as the large tensors are
    leaves = [t.requires_grad_() for t in (*rounded, small[6])]
    right = ssd_sequential(*leaves)
    cotangents = [y[-1, -1].float().view(1, 1, 1, 1), last[-1, -1].view(1, 1, 1, 1)]
    gradients = torch.autograd.grad([right[0], right[1]], leaves, cotangents)
    ours = [y, last, h, ddelta, dA, dB, dC, dD, dh]                        # dx was written over h
    for mine, exact in zip(ours, (*right, *gradients), strict=True):
        torch.testing.assert_close(mine[-1, -1].float(), exact.flatten()[0], rtol=2e-3, atol=1e-5)


@pytest.mark.skipif(not INTERPRETED, reason="runs one program out of many, which only the interpreter can")
def test_tokens_that_lie_far_apart():
    """A chunk of a long sequence; for the walk, which takes all chunks, tokens 2²⁶ numbers apart."""
    tile = dict(BEGINS=False, DOT=tl.float32, PRECISION="ieee", Q=16, BP=16, BN=16)
    T, sizes = 2**27 + 16, (2**27 + 16, 1, 16, 16, 1)
    last = T // 16 - 1
    x, B, C, y = (far((T, 16)) for _ in range(4))
    states, after, dB, dC = (far((T, 16), torch.float32) for _ in range(4))
    delta, dx, ddelta = far((T, 1)), far((T, 16)), far((T, 1))
    small = inputs(16, torch.float16, H=1)
    for whole, tail in zip((x, delta, B, C), (small[0], small[1].half(), small[3], small[4]), strict=True):
        whole[-16:] = tail.reshape(16, -1)
    A, D = torch.tensor([-0.5]), torch.ones(1)
    with program(0, last, 0):
        output_kernel[(1, 1, 1)](x, delta, A, B, C, D, None, states, y, *sizes, *(0, 16) * 3, **tile)
        gradient_kernel[(1, 1, 1)](y, after, x, delta, A, B, C, D, None, states, dx, ddelta, far((T,)), dB, dC,
                                   far((T,)), *sizes, *(0, 16) * 3, **tile)
    near_x, near_delta, near_B, near_C = (t[-16:].view(1, 16, 1, -1) for t in (x, delta, B, C))
    near = (near_x, near_delta[..., 0], A, near_B, near_C, D, torch.zeros(1, 1, 16, 16))
    leaves = [t.detach().float().requires_grad_() for t in near]
    right = ssd_sequential(*leaves)[0]
    gradients = torch.autograd.grad(right, leaves, y[-16:].float().view(right.shape))
    wanted = (right, gradients[0], gradients[1], gradients[3], gradients[4])
    for mine, exact in zip((y, dx, ddelta, dB, dC), wanted, strict=True):
        largest = float(exact.detach().abs().max())
        torch.testing.assert_close(mine[-16:].float(), exact.reshape(16, -1), rtol=4e-3, atol=4e-3 * largest)

    apart, T = 2**26, 48
    x, B = far((T, apart)), far((T, apart))
    small = inputs(T, torch.float16, H=1)
    x[:, :16], B[:, :16] = small[0].reshape(T, 16), small[3].reshape(T, 16)
    states, last = torch.empty(3, 16, 16), torch.empty(16, 16)
    walk_kernel[(1, 1, 1)](x, small[1], A, B, small[6], None, states, last, T, 1, 16, 16, 1, 0, apart, 0, apart,
                           BACK=False, **tile)
    torch.testing.assert_close(last, ssd_sequential(*small[:2], A, *small[3:])[1][0, 0], rtol=1e-4, atol=1e-4)


def zeros(**other):
    sizes = dict(x=(1, 4, 2, 16), delta=(1, 4, 2), A=(2,), B=(1, 4, 1, 16), C=(1, 4, 1, 16), D=(2,), h=(1, 2, 16, 16))
    return [other.get(name, torch.zeros(size)) for name, size in sizes.items()] + [other.get("begins")]


@pytest.mark.parametrize("given, reason", [
    (zeros(x=torch.zeros(1, 4, 32)), "x and B need four dimensions"),
    (zeros(x=torch.zeros(1, 0, 2, 16)), "x and B need four dimensions with something in each"),
    (zeros(delta=torch.zeros(1, 4, 1)), "delta has shape (1, 4, 1), expected (1, 4, 2)"),
    (zeros(h=torch.zeros(1, 2, 16, 8)), "h has shape (1, 2, 16, 8), expected (1, 2, 16, 16)"),
    (zeros(begins=torch.zeros(4, dtype=torch.bool)), "begins has shape (4,), expected (1, 4)"),
    (zeros(B=torch.zeros(1, 4, 3, 16), C=torch.zeros(1, 4, 3, 16)), "2 heads cannot share 3 groups"),
    (zeros(B=torch.zeros(1, 4, 1, 300), C=torch.zeros(1, 4, 1, 300), h=torch.zeros(1, 2, 16, 300)),
     "a state of 300, 1 sequences of 4 tokens; supported are up to 256"),
    (zeros(B=torch.zeros(1, 4, 1, 16).half()), "x, B and C must be alike"),
    (zeros(h=torch.zeros(1, 2, 16, 16).half()), "h float32"),
    (zeros(begins=torch.zeros(1, 4, dtype=torch.int8)), "begins bool"),
    (zeros(x=torch.zeros(1, 4, 16, 2).transpose(2, 3)), "those of x have strides"),
    (zeros(delta=torch.zeros(1, 2, 4).transpose(1, 2)), "delta must be contiguous"),
    (zeros(delta=torch.zeros(1, 4, 2).double()), "delta is float64, supported are"),
    (zeros(D=torch.zeros(2, device="meta")), "D is on meta"),
])
def test_refusals(given, reason):
    with pytest.raises(ValueError, match="kernels.ssd.*" + reason.replace("(", r"\(").replace(")", r"\)")):
        kernel(*given)


def test_the_chunks_are_what_these_tests_take_them_for():
    names = itertools.product(("ssd_walk", "ssd_walk_float32"), (16, 256))
    assert [tuned(name, N, torch.device("cpu"))["Q"] for name, N in names] == [64, 64, 32, 32]
