"""The walk of the gated delta rule against nanollm/layers/delta.py."""

import pytest
import torch
from torch.nn import functional as F

from kernels.delta import delta_walk as kernel
from kernels.delta import delta_walk_backward_op, delta_walk_op, walk_kernel
from nanollm import ops
from nanollm.layers.delta import delta_rule_chunked, delta_walk
from tests.kernels.checks import DEVICE, INTERPRETED, agree, compiles, far, programs_from


def real_launches():
    """For tests/kernels/compiled.py: layers of Qwen3-Next (32 heads of 128 x 128) and OLMo-hybrid (30 of 192 x 96)."""
    for H, P, N in ((32, 128, 128), (30, 192, 96)):
        given = [torch.empty(shape, requires_grad=True) for shape in shapes(2, H, 64, P, N)]
        U, before, last = kernel(*given)
        (U.sum() + before.sum() + last.sum()).backward()


def shapes(chunks, H, Q, P, N, batch=1):
    return (batch, chunks, H, Q, P + N), (batch, chunks, H, Q, N), (batch, chunks, H), (batch, H, P, N)


def inputs(*sizes, **more):
    """WY, K, γ, S: γ from 0 to 1, and a state that neither dies nor grows."""
    draw = torch.Generator().manual_seed(1)
    WY, K, gamma, S = (torch.randn(shape, generator=draw) for shape in shapes(*sizes, **more))
    return 0.3 * WY, 0.3 * K, gamma.sigmoid(), S


@pytest.mark.parametrize("sizes", [
    (1, 1, 16, 16, 16), (3, 2, 16, 32, 16), (2, 3, 32, 24, 40), (3, 1, 64, 16, 64), (2, 1, 16, 1, 1),
    (2, 2, 16, 80, 128), (2, 1, 16, 8, 200),
], ids=str)
def test_chunks_heads_and_widths(sizes):
    agree(kernel, delta_walk, *inputs(*sizes, batch=2))


def test_chunks_that_forget_all_and_chunks_that_keep_all():
    WY, K, gamma, S = inputs(4, 2, 16, 16, 16)
    gamma[:, 1], gamma[:, 2] = 0, 1
    agree(kernel, delta_walk, WY, K, gamma, S)


def test_the_rule_around_it():
    """Documents, padding at the end, heads that share a key, gradients: through the kernel as without it."""
    draw = torch.Generator().manual_seed(2)
    q, k = (F.normalize(torch.randn(2, 37, 2, 8, generator=draw), dim=-1) for _ in "qk")
    v, log_alpha = torch.randn(2, 37, 4, 16, generator=draw), -torch.rand(2, 37, 4, generator=draw)
    given = [q, k, v, log_alpha, torch.rand(2, 37, 4, generator=draw), torch.randn(2, 4, 16, 8, generator=draw)]
    leaves, begins = [x.to(DEVICE).requires_grad_() for x in given], torch.rand(2, 37, generator=draw).to(DEVICE) < 0.1
    found = []
    for mode in ("torch", "triton"):
        with ops.using(mode):
            o, S = delta_rule_chunked(*leaves, begins, chunk=16)
        found.append([o, S, *torch.autograd.grad(o.square().sum() + S.square().sum(), leaves)])
    for plain, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-5 * float(plain.detach().abs().max()))


def test_twice_is_the_same():
    given = [x.to(DEVICE) for x in inputs(3, 2, 16, 32, 32)]
    assert all(torch.equal(a, b) for a, b in zip(kernel(*given), kernel(*given), strict=True))


@pytest.mark.slow
def test_as_torch_sees_them():
    given = [x.to(DEVICE) for x in inputs(2, 2, 16, 16, 16)]
    leaves = [x.clone().requires_grad_() for x in given]
    kinds = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(delta_walk_op, leaves, test_utils=kinds)
    U, before, last = delta_walk_op(*given)
    torch.library.opcheck(delta_walk_backward_op, (U, before, last, *given[:3], U, before))
    compiles(kernel, *given)


@pytest.mark.skipif(not INTERPRETED, reason="runs one program out of many, which only the interpreter can")
@pytest.mark.parametrize("back", [False, True])
def test_beyond_two_to_the_31_elements(back):
    """The last head of the last sequence of so many that every tensor has more than 2³¹ elements."""
    batch, H, Q = 2**20 + 1, 128, 16
    WY, K, gamma, S = inputs(1, 1, Q, 1, 1)
    add, read, write, u = (far((batch, H, Q), torch.float32) for _ in range(4))
    decay, more, states, last = (far((batch * Q, H), torch.float32) for _ in range(4))
    place = (batch - 1) * H + H - 1
    add[-1, -1], read[-1, -1], write[-1, -1] = WY[..., 0].flatten(), WY[..., 1].flatten(), K.flatten()
    for whole, value in ((decay, gamma), (states, S)):
        whole.view(-1)[place] = value.flatten()[0]
    more.view(-1)[place] = 0
    with programs_from(H - 1, 1), programs_from(batch - 1, 2):
        walk_kernel[(1, 1, 1)](add, read, write, decay, more, u, states, last, 1, H, 1, 1, 1, 1, 1,
                               BACK=back, Q=Q, BP=16, BN=16)
    right = delta_walk(torch.stack([WY[..., 0], -WY[..., 1] if back else WY[..., 1]], -1), -K if back else K, gamma, S)
    torch.testing.assert_close(u[-1, -1], right[0].flatten())
    torch.testing.assert_close(last.view(-1)[place], right[2].flatten()[0])


def zeros(**other):
    names = ("WY", "K", "gamma", "S")
    return [other.get(name, torch.zeros(shape)) for name, shape in zip(names, shapes(2, 2, 16, 16, 8), strict=True)]


@pytest.mark.parametrize("given, reason", [
    (zeros(S=torch.zeros(2, 16, 8)), "S needs four dimensions and K five"),
    (zeros(WY=torch.zeros(1, 2, 2, 16, 16)), "WY has shape (1, 2, 2, 16, 16), expected (1, 2, 2, 16, 24)"),
    (zeros(gamma=torch.zeros(1, 2)), "gamma has shape (1, 2), expected (1, 2, 2)"),
    ([torch.zeros(shape) for shape in shapes(1, 1, 24, 8, 8)], "chunks of 24"),
    ([torch.zeros(shape) for shape in shapes(1, 1, 16, 8, 300)], "keys of 300"),
    (zeros(K=torch.zeros(1, 2, 2, 16, 8).bfloat16()), "K must be float32, it is bfloat16"),
    (zeros(gamma=torch.zeros(1, 2, 2, device="meta")), "gamma is on meta"),
])
def test_refusals(given, reason):
    with pytest.raises(ValueError, match="kernels.delta_walk.*" + reason.replace("(", r"\(").replace(")", r"\)")):
        kernel(*given)
