"""The selective scan against nanollm/layers/scan.py."""

import pytest
import torch

import kernels
from kernels.scan import forward_kernel, scan_backward_op, scan_op
from kernels.scan_backward import backward_kernel
from nanollm.layers import scan
from tests.kernels.checks import DTYPES, INTERPRETED, agree, compiles, far, in_turn, programs_from

WHOLE_BLOCK = 64                            # channels of a program at N ≤ 16


def real_launches():
    """For tests/kernels/compiled.py: Mamba-1 as it is (N = 16), trained and generating, with and without documents; and
    a wide state."""
    mask = torch.ones(2, 64, dtype=torch.bool)
    for dtype, I, N, cases in ((torch.bfloat16, 4096, 16, ((), (mask, mask))),
                               (torch.float32, 1536, 16, ((mask, mask),)), (torch.bfloat16, 1024, 64, ((),))):
        def leaf(*shape, dtype=dtype):
            return torch.empty(*shape, dtype=dtype, requires_grad=True)

        halves, parts = leaf(2, 64, 2 * I), leaf(2, 64, 96 + 2 * N)
        x, z, B, C = halves[..., :I], halves[..., I:], parts[..., 96 : 96 + N], parts[..., 96 + N :]
        A, h = leaf(I, N, dtype=torch.float32), torch.empty(2, I, N)
        arguments = (x, leaf(2, 64, I), leaf(I), A, B, C, leaf(I), z, h)
        for masks in cases:
            kernels.mamba_scan(*arguments, *masks)[0].sum().backward()
            with torch.no_grad():
                kernels.mamba_scan(*arguments, *masks)
    sum(r.sum() for r in kernels.mamba_scan(*arguments)).backward()          # the gradient of the last state too


def inputs(batch, T, I, N, dtype=torch.float32, seed=0):
    """x, δ, bias, A, B, C, D, z, h as Mamba has them: halves of one tensor, parts of another, Δ from 0.001 on."""
    torch.manual_seed(seed)
    x, z = torch.randn(batch, T, 2 * I).to(dtype).chunk(2, -1)
    _, B, C = torch.randn(batch, T, 3 + 2 * N).to(dtype).split([3, N, N], -1)
    A = -torch.arange(1.0, N + 1).expand(I, N) * (torch.rand(I, N) + 0.5)
    delta, bias, D = torch.randn(batch, T, I).to(dtype), (torch.randn(I) - 3).to(dtype), torch.randn(I).to(dtype)
    return [x, delta, bias, A, B, C, D, z, torch.randn(batch, I, N)]


def documents(batch, T):
    """begins and real: a document in the middle of each row and one at its start, padding at the end, and at the start
    where there is room."""
    begins, real = torch.zeros(batch, T, dtype=torch.bool), torch.ones(batch, T, dtype=torch.bool)
    begins[:, T // 2], begins[0, 0] = True, True
    real[-1, T - T // 4 :] = False
    real[0, : T // 8] = False
    return begins, real


@pytest.mark.parametrize("batch, T, I, N, dtype", in_turn([
    (1, 1, 20, 16), (2, 15, 8, 4), (1, 16, WHOLE_BLOCK, 16), (1, 17, WHOLE_BLOCK + 1, 16), (2, 3, 33, 4),
    (1, 35, 12, 16),
]), ids=str)
def test_scan(batch, T, I, N, dtype):
    agree(kernels.mamba_scan, scan.mamba_scan, *inputs(batch, T, I, N, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch, T, I, N", [(2, 19, 5, 4), (2, 1, 5, 16)], ids=str)
def test_documents_and_padding(batch, T, I, N, dtype):
    agree(kernels.mamba_scan, scan.mamba_scan, *inputs(batch, T, I, N, dtype), *documents(batch, T))


def test_one_token_after_another_is_the_scan_to_the_bit():
    """And so are two calls of any lengths that hand the state on; nothing is read ahead."""
    x, delta, bias, A, B, C, D, z, h = arguments = inputs(1, 19, 8, 4)
    begins, real = documents(1, 19)
    y, last = kernels.mamba_scan(*arguments, begins, real)
    for cuts in ([*range(20)], [0, 16, 19], [0, 7, 19]):
        parts, state = [], h
        for start, end in zip(cuts, cuts[1:], strict=False):
            some = [tensor[:, start:end] for tensor in (x, delta, B, C, z, begins, real)]
            part, state = kernels.mamba_scan(*some[:2], bias, A, *some[2:4], D, some[4], state, *some[5:])
            parts.append(part)
        assert torch.equal(torch.cat(parts, 1), y) and torch.equal(state, last)


def test_padding_leaves_the_state_and_beginning_forgets_it():
    x, delta, bias, A, B, C, D, z, h = inputs(2, 5, 8, 4)
    never, always = torch.zeros(2, 5, dtype=torch.bool), torch.ones(2, 5, dtype=torch.bool)
    assert torch.equal(kernels.mamba_scan(x, delta, bias, A, B, C, D, z, h, None, never)[1], h)
    other = kernels.mamba_scan(x, delta, bias, A, B, C, D, z, h * 3 + 1, always, None)
    fresh = kernels.mamba_scan(x, delta, bias, A, B, C, D, z, h, always, None)
    assert all(torch.equal(a, b) for a, b in zip(fresh, other, strict=True))


@pytest.mark.parametrize("s", [-30.0, -9.0, 19.9, 20.1, 60.0])
@pytest.mark.parametrize("rate", [-1e-3, -100.0])
def test_steps_of_every_size(s, rate):
    """Δ from e^−30 to 60, and decays from 1 to exp(−6000): no digits are lost in the first, the last is finite."""
    x, delta, bias, A, B, C, D, z, h = inputs(1, 3, 4, 4)
    delta, A = torch.full_like(delta, s), torch.full_like(A, rate)
    agree(kernels.mamba_scan, scan.mamba_scan, x, delta, bias * 0, A, B, C, D * 0, z, h * 0)


def test_states_are_kept_for_a_backward_only():
    arguments = inputs(1, 33, 4, 4)
    assert scan_op(*arguments, None, None, False)[2].shape == (0,)
    assert scan_op(*arguments, None, None, True)[2].shape == (1, 3, 4, 4)
    assert torch.equal(scan_op(*arguments, None, None, True)[2][:, 0], arguments[-1])


def test_gradients_of_one_result_alone():
    """The other's is absent, not zero: the gradients of both are the sum."""
    arguments = [tensor.requires_grad_() for tensor in inputs(1, 9, 4, 4)]

    def gradients(*used):
        results = [kernels.mamba_scan(*arguments)[which] for which in used]
        total = sum((r * torch.arange(r.numel()).view_as(r).cos()).sum() for r in results)
        return torch.autograd.grad(total, arguments, materialize_grads=True)

    for of_y, of_h, of_both in zip(gradients(0), gradients(1), gradients(0, 1), strict=True):
        torch.testing.assert_close(of_y + of_h, of_both)


def test_rows_need_not_lie_side_by_side():
    x, delta, bias, A, B, C, D, z, h = inputs(2, 6, 8, 4)
    turned = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (x, delta, B, C, z, h)]
    wanted = kernels.mamba_scan(x, delta, bias, A, B, C, D, z, h)
    found = kernels.mamba_scan(*turned[:2], bias, A.T.contiguous().T, *turned[2:4], D, *turned[4:])
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.slow
def test_as_torch_sees_it():
    arguments = [tensor.requires_grad_() for tensor in inputs(2, 17, 5, 4)]
    torch.library.opcheck(scan_op, (*arguments, None, None, True))
    torch.library.opcheck(scan_op, (*(tensor.detach() for tensor in arguments), *documents(2, 17), False))
    x, delta, bias, A, B, C, D, z, h = (tensor.detach() for tensor in arguments)
    states = h[:, None].expand(-1, 2, -1, -1).contiguous()
    torch.library.opcheck(scan_backward_op, (x, None, x, delta, bias, A, B, C, D, z, *documents(2, 17), states))
    compiles(kernels.mamba_scan, *arguments, *documents(2, 17))


@pytest.mark.skipif(not INTERPRETED, reason="runs one program out of many, which only the interpreter can")
def test_beyond_two_to_the_31_elements():
    rows, I, last = 2**19 + 3, 4096, slice(4096 - WHOLE_BLOCK, 4096)
    small = [tensor.requires_grad_() for tensor in inputs(1, 1, WHOLE_BLOCK, 1)]
    wide, flat = [far((rows, I), torch.float32) for _ in range(8)], [torch.zeros(rows) for _ in range(4)]
    vectors = [torch.zeros(I) for _ in range(3)]
    x, delta, z, h, y, dx, ddelta, dz = wide
    for place, tensor in zip((x, delta, z, h), (small[0], small[1], small[7], small[8]), strict=True):
        place[-1, last] = tensor.detach().flatten()
    for place, tensor in zip((*vectors, *flat[:2]), (small[2], small[3], small[6], small[4], small[5]), strict=True):
        place[-tensor.numel() :] = tensor.detach().flatten()
    (bias, A, D), (B, C, dB, dC) = vectors, flat
    options = dict(BEGINS=False, REAL=False, CHUNK=1, CHANNELS=WHOLE_BLOCK, STATES=1, STAGES=1)
    strides = (I, I, I, I, 1, 1, 1, 1, I, I)
    ends, states, dbias, dA = (far((rows, I), torch.float32) for _ in range(4))
    with programs_from(rows * (I // WHOLE_BLOCK) - 1):
        forward_kernel[(1,)](x, delta, bias, A, B, C, D, z, h, None, None, y, ends, states, 1, I, 1, *strides,
                             SAVE=True, **options)
        dy, (scratch, dD, dh) = h, (far((rows, I), torch.float32) for _ in range(3))
        backward_kernel[(1,)](dy, None, x, delta, bias, A, B, C, D, z, None, None, states, scratch,
                              dx, ddelta, dbias, dA, dB, dC, dD, dz, dh, 1, I, 1, *strides, LAST=False, **options)
    results = kernels.mamba_scan(*small)
    gradients = torch.autograd.grad(results[0], small, small[8].detach().view_as(results[0]))
    ours = (y, ends, states, dx, ddelta, dbias, dA, dD, dz, dh)
    wanted = (*results, small[8], *(gradients[k] for k in (0, 1, 2, 3, 6, 7, 8)))
    for mine, right in zip(ours, wanted, strict=True):
        assert torch.equal(mine[-1, last], right.flatten())


@pytest.mark.skipif(not INTERPRETED, reason="a large tensor that takes no memory until it is written")
def test_tokens_far_apart():
    """The stride alone takes a token beyond 2³¹."""
    width, places = 2**29, [slice(0, 8), slice(8, 16), slice(16, 20), slice(20, 24), slice(24, 32)]
    near = inputs(1, 6, 8, 4, torch.float16)
    wide = far((6, width))[None]
    rows = [wide[..., place] for place in places]
    for row, tensor in zip(rows, (near[0], near[1], near[4], near[5], near[7]), strict=True):
        row.copy_(tensor)
    apart = [*rows[:2], near[2], near[3], *rows[2:4], near[6], rows[4], near[8]]
    for mine, right in zip(scan_op(*apart, None, None, True), scan_op(*near, None, None, True), strict=True):
        assert torch.equal(mine, right)
    kept = scan_op(*near, None, None, True)[2]
    first = near[0].contiguous()
    found, wanted = (scan_backward_op(first, None, *tensors[:8], None, None, kept) for tensors in (apart, near))
    for mine, right in zip(found, wanted, strict=True):
        assert torch.equal(mine, right)


def changed(**others):
    names = ("x", "delta", "bias", "A", "B", "C", "D", "z", "h", "begins", "real")
    return list((dict(zip(names, (*inputs(2, 3, 4, 4), None, None), strict=True)) | others).values())


@pytest.mark.parametrize("others, reason", [
    (dict(x=torch.zeros(2, 0, 4)), "x and A have shapes (2, 0, 4) and (4, 4)"),
    (dict(delta=torch.zeros(2, 3, 5)), "delta has shape (2, 3, 5), expected (2, 3, 4)"),
    (dict(h=torch.zeros(1, 4, 4)), "h has shape (1, 4, 4), expected (2, 4, 4)"),
    (dict(real=torch.ones(3, dtype=torch.bool)), "real has shape (3,), expected (2, 3)"),
    (dict(begins=torch.zeros(2, 3, dtype=torch.int64)), "begins is int64, expected bool"),
    (dict(z=torch.zeros(2, 3, 4).half()), "z is float16, expected float32 as x"),
    (dict(A=torch.zeros(4, 4).double()), "A is float64, expected float32"),
    (dict(h=torch.zeros(2, 4, 4).half()), "h is float16, expected float32"),
    (dict(C=torch.zeros(2, 3, 4).double()), "C is float64, supported are"),
    (dict(D=torch.zeros(4, device="meta")), "D is on meta"),
    (dict(A=torch.zeros(4, 65), B=torch.zeros(2, 3, 65), C=torch.zeros(2, 3, 65), h=torch.zeros(2, 4, 65)),
     "65 states a channel, supported are 1 to 64"),
])
def test_refusals(others, reason):
    with pytest.raises(ValueError, match="kernels.*" + reason.replace("(", r"\(").replace(")", r"\)")):
        kernels.mamba_scan(*changed(**others))
