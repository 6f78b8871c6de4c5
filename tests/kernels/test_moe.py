"""Mixture-of-experts kernels against nanollm/layers/moe.py."""

import re

import pytest
import torch
from torch.nn import functional

import kernels
from kernels.grouped import back_kernel, combine_kernel, gates_backward_kernel, outer_kernel, up_kernel
from kernels.moe import by_expert, expert_mlp_backward_op, expert_mlp_op, tile_table
from nanollm.config import MLP, MoE
from nanollm.layers import moe
from nanollm.ops import using
from tests.kernels.checks import DEVICE, DTYPES, INTERPRETED, agree, compiles, far, in_turn, programs_from


def real_launches():
    """For tests/kernels/compiled.py: the experts of Qwen3-30B-A3B, in training and one token at a time; float32."""
    E, F, D, k = 128, 768, 2048, 8
    for dtype in (torch.bfloat16, torch.float32):
        shapes = ((E, F, D), (E, F, D), (E, D, F))
        gate, up, down = (torch.empty(shape, dtype=dtype, requires_grad=True) for shape in shapes)
        x, weights = torch.empty(2048, D, dtype=dtype, requires_grad=True), torch.empty(2048, k)
        chosen = torch.zeros(2048, k, dtype=torch.int64)
        y = kernels.expert_mlp(x, gate, up, down, weights, chosen, "silu")
        torch.autograd.grad(y, (x, gate, up, down), torch.empty_like(y))
        if dtype == torch.bfloat16:
            with torch.no_grad():
                kernels.expert_mlp(x[:1], gate, up, down, weights[:1], chosen[:1], "silu")


def inputs(N, k, E, D, F, dtype=torch.float32, chosen=None):
    """Numbers of the size that a decoder has, k different experts a token, weights that sum to one."""
    draw = torch.Generator().manual_seed(N + 100 * k + F)
    x, gate, up, down = (torch.randn(shape, generator=draw) for shape in ((N, D), (E, F, D), (E, F, D), (E, D, F)))
    weights = torch.randn(N, k, generator=draw).softmax(-1)
    if chosen is None:
        chosen = torch.rand(N, E, generator=draw).topk(k, -1).indices
    gate, up, down = gate * D**-0.5, up * D**-0.5, down * F**-0.5
    return x.to(dtype), gate.to(dtype), up.to(dtype), down.to(dtype), weights, chosen


# N, k, E, D, F: rows an expert from none to more than a tile has, in tiles of 16 and of 128; widths of one block, of
# two, and not of eight
SHAPES = [(1, 1, 1, 64, 64), (1, 2, 4, 96, 64), (15, 1, 1, 64, 96), (16, 1, 1, 64, 96), (17, 1, 1, 100, 64),
          (35, 2, 8, 96, 100), (9, 3, 4, 128, 192), (127, 1, 1, 64, 64), (128, 1, 1, 64, 64), (129, 1, 1, 136, 140),
          (150, 2, 2, 96, 64), (30, 4, 4, 64, 72)]


@pytest.mark.parametrize("N, k, E, D, F, dtype", in_turn(SHAPES), ids=str)
def test_expert_mlp(N, k, E, D, F, dtype):
    agree(kernels.expert_mlp, moe.expert_mlp, *inputs(N, k, E, D, F, dtype), "silu")


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("activation", ("gelu", "gelu_tanh", "relu2"))
def test_activations(activation, dtype):
    agree(kernels.expert_mlp, moe.expert_mlp, *inputs(20, 2, 4, 64, 72, dtype), activation)


@pytest.mark.parametrize("N, expert", [(16, 0), (33, 2), (59, 3)])
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
def test_all_tokens_on_one_expert(N, expert, dtype):
    """Several tiles of 16 rows, and gradients of exactly zero for the others: `agree` starts from NaN."""
    agree(kernels.expert_mlp, moe.expert_mlp, *inputs(N, 1, 4, 64, 64, dtype, torch.full((N, 1), expert)), "silu")


def test_a_token_may_choose_an_expert_twice():
    agree(kernels.expert_mlp, moe.expert_mlp, *inputs(6, 3, 4, 64, 64, chosen=torch.tensor([[3, 1, 3]] * 6)), "silu")


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_expert_is_a_dense_mlp(dtype):
    x, gate, up, down, _, _ = inputs(40, 1, 1, 96, 64, dtype)

    def dense(x, gate, up, down):
        return functional.linear(functional.silu(functional.linear(x, gate[0])) * functional.linear(x, up[0]), down[0])

    weights, chosen = torch.ones(40, 1, device=DEVICE), torch.zeros(40, 1, dtype=torch.int64, device=DEVICE)
    agree(lambda *t: kernels.expert_mlp(*t, weights, chosen, "silu"), dense, x, gate, up, down)


def test_a_layer_is_the_same_with_kernels_as_without():
    layer = moe.MoE(MoE(6, 2, MLP(24, activation="gelu_tanh"), renormalize=True), 32).to(DEVICE)
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.2)
    x, results = torch.randn(3, 7, 32, device=DEVICE), []
    for mode in ("torch", "triton"):
        with using(mode):
            y = layer(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), list(layer.parameters()))))
    for right, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-5)


def counted(counts):
    """A choice (R, 1) that gives expert e so many rows, in random order."""
    experts = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return experts[torch.randperm(len(experts))][:, None].to(DEVICE)


EXTREME = [[1], [128], [129], [0, 1], [1, 0], [0, 0, 300, 0], [16] * 9, [17] * 9, [15] * 9, [1] * 140,
           [0] * 30 + [1], [1] + [0] * 30, [2000, 1, 0, 1], [128, 128, 0, 127]]


@pytest.mark.parametrize("ROWS", (16, 128))
def test_every_row_is_in_one_tile_of_its_expert(ROWS):
    torch.manual_seed(ROWS)
    drawn = [torch.randint(0, 3 * ROWS, (int(torch.randint(1, 25, ())),)).tolist() for _ in range(6)]
    drawn += [(torch.rand(30) ** 8 * 500).int().tolist() for _ in range(3)]
    for counts in EXTREME + [c for c in drawn if sum(c)]:
        chosen, R, E = counted(counts), sum(counts), len(counts)
        order, bounds = by_expert(chosen, E)
        assert bounds.tolist() == [sum(counts[:e]) for e in range(E + 1)]
        assert torch.equal(order.sort().values, torch.arange(R, device=DEVICE)), "order is a permutation"
        experts = chosen[order, 0]
        assert (experts.diff() >= 0).all(), "by expert"
        assert (order.diff()[experts.diff() == 0] > 0).all(), "in one expert as the tokens came"
        table = tile_table(bounds, R, ROWS)
        expert, first = table[:, table[0] >= 0].tolist()
        assert table.shape[1] <= -(-R // ROWS) + E, "no more tiles than there can be"
        assert (table[0, len(expert):] == -1).all(), "what nobody needs comes last"
        rows = [range(r, min(r + ROWS, bounds[e + 1])) for e, r in zip(expert, first, strict=True)]
        assert sum((list(r) for r in rows), []) == list(range(R)), "every row once"
        inside = (bounds[e] <= r[0] and r[-1] < bounds[e + 1] for e, r in zip(expert, rows, strict=True))
        assert all(inside), "no tile has two experts"


def test_gradients_nobody_wants_are_not_computed_and_change_nothing():
    tensors = inputs(8, 2, 2, 64, 64)
    x, gate, up, down, weights, chosen = (t.to(DEVICE) for t in tensors)
    every = [t.clone().requires_grad_() for t in (x, gate, up, down, weights)]
    y = kernels.expert_mlp(*every, chosen, "silu")
    y.sum().backward()                                                      # a gradient that is one number, expanded
    assert torch.equal(y, kernels.expert_mlp(x, gate, up, down, weights, chosen, "silu"))   # where g, u are not kept
    with torch.no_grad():
        assert torch.equal(y, kernels.expert_mlp(*every, chosen, "silu"))
    for alone in range(5):
        some = [t.clone().requires_grad_(i == alone) for i, t in enumerate((x, gate, up, down, weights))]
        kernels.expert_mlp(*some, chosen, "silu").sum().backward()
        assert [t.grad is None for t in some] == [i != alone for i in range(5)]
        assert torch.equal(some[alone].grad, every[alone].grad)


@pytest.mark.slow
def test_as_torch_sees_them():
    x, gate, up, down, weights, chosen = (t.to(DEVICE) for t in inputs(5, 2, 2, 32, 48))
    for save in (True, False):
        some = [t.clone().requires_grad_(save) for t in (x, gate, up, down, weights)]
        torch.library.opcheck(expert_mlp_op, (*some, chosen, "silu", save))
    _, g, u, order, bounds = expert_mlp_op(x, gate, up, down, weights, chosen, "silu", True)
    wanted = [True, False, True, True]
    torch.library.opcheck(expert_mlp_backward_op, (x, x, gate, up, down, weights, g, u, order, bounds, "silu", wanted))
    compiles(lambda *t: kernels.expert_mlp(*t[:5], chosen, "silu"), x, gate, up, down, weights)


@pytest.mark.skipif(not INTERPRETED, reason="runs one program out of many, which only the interpreter can")
def test_beyond_two_to_the_31_elements():
    """The last rows of the last expert lie beyond 2³¹ in each of the tensors. One tile, and a list of tiles for it."""
    N, E, R, D, F = 2**19 + 3, 2**15 + 1, 2**27 + 8, 4096, 16
    last = E - 1
    order, bounds = torch.empty(R, dtype=torch.int64), torch.empty(E + 1, dtype=torch.int32)
    order[-2:], bounds[-2], bounds[-1] = torch.tensor([N - 1, N - 2]), R - 2, R
    table, token = torch.tensor([[last], [R - 2]], dtype=torch.int32), [N - 1, N - 2]
    tile = dict(ROWS=16, COLUMNS=16, DEPTH=64, GROUP=8)

    x, gate, up, down = far((N, D)), far((E, F, D)), far((E, F, D)), far((E, D, F))
    h, g, u, dg, du = (far((R, F)) for _ in range(5))
    x[-2:], gate[-1], up[-1] = torch.randn(2, D), torch.randn(F, D) / 64, torch.randn(F, D) / 64
    down[-1] = torch.randn(D, F) / 4
    up_kernel[(1,)](x, gate, up, order, bounds, table, h, g, u, 1, D, F, K=1, ACT="silu", SAVE=True, **tile)
    a, b, own = gate[-1].float(), up[-1].float(), x[token].float()
    near = dict(rtol=4e-3, atol=4e-3)
    torch.testing.assert_close(g[-2:].float(), own @ a.T, **near)
    torch.testing.assert_close(u[-2:].float(), own @ b.T, **near)
    gated = (functional.silu(g[-2:].float()) * u[-2:].float()).half()                  # of g and u as they were rounded
    assert (h[-2:] != gated).float().mean() < 0.1

    out, c = far((N, D)), down[-1].float()
    deep = tile | dict(COLUMNS=D, DEPTH=16)
    back_kernel[(1,)](h, down, None, None, out, order, bounds, table, 1, D, F, PAIR=False, **deep)
    torch.testing.assert_close(out[token].float(), h[-2:].float() @ c.T, **near)
    dg[-2:], du[-2:] = torch.randn(2, F), torch.randn(2, F)
    back_kernel[(1,)](dg, gate, du, up, out, order, bounds, table, 1, D, F, PAIR=True, **deep)
    torch.testing.assert_close(out[token].float(), dg[-2:].float() @ a + du[-2:].float() @ b, **near)

    weights, dw = torch.empty(N, 1), torch.empty(N, 1)
    weights[-2:] = 1.0
    gates_backward_kernel[(1,)](x, down, weights, g, u, order, bounds, table, dg, du, h, dw, 1, D, F, K=1, ACT="silu",
                                **tile)
    s, act = own @ c, functional.silu(g[-2:].float())
    torch.testing.assert_close(du[-2:].float(), s * act, rtol=4e-3, atol=4e-2)
    torch.testing.assert_close(h[-2:].float(), act * u[-2:].float(), **near)
    torch.testing.assert_close(dw[token, 0], (s * act * u[-2:].float()).sum(1), rtol=1e-3, atol=1e-2)

    blocks = dict(F_BLOCK=16, D_BLOCK=D, DEPTH=16, GROUP=8)
    with programs_from(last, axis=1):
        for TRANSPOSE, into in ((False, gate), (True, down)):
            outer_kernel[(1, 1)](h, x, into, order, bounds, D, F, K=1, TRANSPOSE=TRANSPOSE, **blocks)
            found = (into[-1].T if TRANSPOSE else into[-1]).float()
            torch.testing.assert_close(found, h[-2:].float().T @ own, rtol=4e-3, atol=2e-2)
    with programs_from(N - 1):
        combine_kernel[(1, 1)](x, weights, out, D, K=1, WEIGHTED=True, COLUMNS=D)
    assert torch.equal(out[-1], x[-1])


X, GATE, DOWN = torch.zeros(5, 32), torch.zeros(3, 24, 32), torch.zeros(3, 32, 24)
WEIGHTS, CHOSEN = torch.zeros(5, 2), torch.zeros(5, 2, dtype=torch.int64)


@pytest.mark.parametrize("change, reason", [
    (dict(x=X[0]), "must have 2, 3 and 2 dimensions, they have 1, 3 and 2"),
    (dict(up=GATE[:2]), "up has shape (2, 24, 32), expected (3, 24, 32)"),
    (dict(down=GATE), "down has shape (3, 24, 32), expected (3, 32, 24)"),
    (dict(weights=WEIGHTS[:, :1]), "weights has shape (5, 1), expected (5, 2)"),
    (dict(chosen=CHOSEN[:4]), "chosen has shape (4, 2), expected (5, 2)"),
    (dict(gate=torch.zeros(3, 48, 32)[:, :24]), "gate must be contiguous"),
    (dict(x=torch.zeros(32, 5).T), "x must be contiguous"),
    (dict(gate=GATE.half()), "gate is float16, x is float32"),
    (dict(weights=WEIGHTS.half()), "weights and chosen must be float32 and int64, they are float16 and int64"),
    (dict(chosen=CHOSEN.int()), "weights and chosen must be float32 and int64, they are float32 and int32"),
    (dict(x=X[:0], weights=WEIGHTS[:0], chosen=CHOSEN[:0]), "0 tokens by 2 of 3 experts"),
    (dict(activation="tanh"), "activation is 'tanh', supported are silu"),
    (dict(x=X.double(), gate=GATE.double(), up=GATE.double(), down=DOWN.double()), "float64, supported are"),
    (dict(down=DOWN.to("meta")), "down is on meta"),
])
def test_refusals(change, reason):
    with pytest.raises(ValueError, match="kernels.expert_mlp: .*" + re.escape(reason)):
        kernels.expert_mlp(**dict(
            x=X, gate=GATE, up=GATE, down=DOWN, weights=WEIGHTS, chosen=CHOSEN, activation="silu") | change)
