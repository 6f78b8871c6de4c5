"""The rotation kernel against nanollm/layers/rope.py, and against what a rotation is."""

import pytest
import torch

import kernels
from kernels.rope import rotate_kernel, rotate_op
from nanollm.config import Rope
from nanollm.layers import rope
from tests.kernels.checks import DEVICE, DTYPES, INTERPRETED, agree, compiles, far, programs_from

LAYOUTS = ("half", "interleaved")


def real_launches():
    """For tests/kernels/compiled.py: heads of 64 to 256 channels, all or a part of them rotated, queries or one key."""
    bfloat16, float32 = torch.bfloat16, torch.float32
    for heads, width, rotated, layout, dtype in (
            (32, 128, 128, "half", bfloat16), (32, 128, 128, "interleaved", bfloat16), (8, 64, 64, "half", bfloat16),
            (32, 80, 32, "half", bfloat16), (1, 256, 256, "half", bfloat16), (32, 128, 64, "interleaved", float32)):
        x = torch.empty(2, 64, heads, width, dtype=dtype).transpose(1, 2).requires_grad_()
        table = torch.empty(1, 1, 64, rotated, dtype=dtype)
        kernels.rotate(x, table, table, layout).sum().backward()


def tables(dtype: torch.dtype, B: int, T: int, r: int, layout: str, first: int = 3,
           head_dim: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin as the model has them; every row of the batch begins elsewhere."""
    positions = torch.arange(T) + first + 17 * torch.arange(B)[:, None]
    d = head_dim or r
    made = rope.rotation_tables(Rope(layout=layout, theta=100.0, fraction=r / d), d, positions, positions)
    return tuple(table.to(DEVICE, dtype) for table in made)


def same(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, layout: str) -> None:
    agree(lambda x: kernels.rotate(x, cos, sin, layout), lambda x: rope.rotate(x, cos, sin, layout), x)


SHAPES = [  # B, H, T, d, r
    (1, 1, 1, 64, 64), (2, 3, 5, 32, 32), (1, 4, 33, 128, 128), (1, 2, 9, 80, 80), (2, 5, 7, 80, 20),
    (1, 3, 4, 80, 24), (2, 2, 3, 96, 48), (1, 40, 2, 64, 16), (1, 2, 3, 256, 256), (1, 1, 2, 64, 2),
    (1, 1, 70, 64, 62), (1, 8, 17, 64, 64),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("B, H, T, d, r", SHAPES, ids=str)
def test_rotate(B, H, T, d, r, layout, dtype):
    x = torch.randn(B, T, H, d).to(dtype).transpose(1, 2)
    same(x, *tables(dtype, B, T, r, layout, head_dim=d), layout)


@pytest.mark.parametrize("T", [31, 32, 33, 67])             # 32 tokens of one head of 64 channels are a program
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_block_of_tokens_more_and_less(layout, T):
    same(torch.randn(1, 1, T, 64), *tables(torch.float32, 1, T, 64, layout), layout)


def test_one_table_for_the_batch_and_one_a_row():
    x = torch.randn(3, 2, 5, 64)
    cos, sin = tables(torch.float32, 3, 5, 64, "half")
    assert not torch.equal(cos[0], cos[1])
    same(x, cos, sin, "half")
    same(x, cos[1:2], sin[1:2], "half")
    wide = [torch.cat([t, t], -1)[..., :64] for t in (cos, sin)]        # a view: rows do not follow one another
    same(x, *wide, "half")


@pytest.mark.parametrize("make", [
    lambda: torch.randn(2, 5, 3, 64).transpose(1, 2), lambda: torch.randn(2, 3, 5, 64),
    lambda: torch.randn(5, 2, 3, 64).permute(1, 2, 0, 3), lambda: torch.randn(2, 5, 9, 64)[:, :, 3:6].transpose(1, 2),
    lambda: torch.randn(1, 3, 5, 64).expand(2, 3, 5, 64), lambda: torch.randn(2, 3, 9, 80)[:, :, ::2, 8:72],
])
def test_it_takes_x_where_it_lies(make):
    x = make().to(DEVICE)
    cos, sin = tables(torch.float32, 2, 5, 64, "half")
    same(x, cos, sin, "half")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_result_and_gradient_lie_as_x_does(layout):
    cos, sin = tables(torch.float32, 2, 5, 64, layout)
    for x in (torch.randn(2, 5, 3, 64, device=DEVICE).transpose(1, 2), torch.randn(2, 3, 5, 64, device=DEVICE)):
        y = kernels.rotate(x.requires_grad_(), cos, sin, layout)
        for dy in (torch.randn(2, 5, 3, 64, device=DEVICE).transpose(1, 2), torch.randn(2, 3, 5, 64, device=DEVICE)):
            dx, = torch.autograd.grad(y, x, dy, retain_graph=True)
            assert y.stride() == dx.stride() == x.stride()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("r", [80, 24])
def test_nothing_is_written_beside_a_head(layout, r):
    x, whole = torch.randn(2, 3, 5, 80, device=DEVICE), torch.full((2, 3, 5, 96), 7.0, device=DEVICE)
    y, (cos, sin) = whole[..., 8:88], tables(torch.float32, 2, 5, r, layout, head_dim=80)
    rotate_kernel[(4,)](x, cos, sin, y, 3, 5, *x.stride()[:3], *y.stride()[:3], cos.stride(0), r, D=80, R=r,
                        INTERLEAVED=layout == "interleaved", TRANSPOSED=False, TOKENS=4, HEADS=4,
                        HALF=64 if r == 80 else 16, REST=64)
    assert torch.equal(y, kernels.rotate(x, cos, sin, layout))
    assert (whole[..., :8] == 7).all() and (whole[..., 88:] == 7).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tables_of_any_numbers(layout):
    """The gradient is that of x·cos + swap(x)·sin, also where it is no rotation (YaRN's factor, or anything else)."""
    cos, sin = torch.randn(2, 2, 1, 5, 48)
    same(torch.randn(2, 3, 5, 64), cos.to(DEVICE), sin.to(DEVICE), layout)


@pytest.mark.parametrize("r", [64, 24])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_a_rotation_is(layout, r):
    x, y = torch.randn(2, 1, 1, 9, 64, device=DEVICE)
    cos, sin = tables(torch.float32, 1, 9, r, layout, head_dim=64)
    turned = kernels.rotate(x, cos, sin, layout)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=0)             # the norm is kept
    torch.testing.assert_close(kernels.rotate(turned, cos, -sin, layout), x, rtol=1e-5, atol=1e-6)  # R(−t) R(t) = 1
    assert torch.equal(turned[..., r:], x[..., r:]) and (turned[..., :r] - x[..., :r]).abs().max() > 0.5
    x, y = (one[:, :, :1].expand_as(x).contiguous() for one in (x, y))     # one query and one key, at every position
    later = tables(torch.float32, 1, 9, r, layout, first=40, head_dim=64)

    def scores(table):
        return (kernels.rotate(x, *table, layout) @ kernels.rotate(y, *table, layout).transpose(-2, -1))[0, 0]

    early, late = scores((cos, sin)), scores(later)
    torch.testing.assert_close(early, late, rtol=1e-4, atol=1e-4)          # only the difference of positions counts
    torch.testing.assert_close(early[1:, 1:], early[:-1, :-1], rtol=1e-4, atol=1e-4)
    assert (early[0] - early[0, 0]).abs().max() > 0.5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradient_is_the_rotation_back(layout):
    dy = torch.randn(2, 3, 5, 64, device=DEVICE)
    cos, sin = tables(torch.float32, 2, 5, 64, layout)
    back = rotate_op(dy, cos, sin, layout == "interleaved", True, False)
    assert torch.equal(back, kernels.rotate(dy, cos, -sin, layout))


def test_an_infinity_that_is_not_rotated_stays_alone():
    x = torch.randn(1, 1, 2, 64, device=DEVICE)
    x[..., 33] = torch.inf
    for layout in LAYOUTS:
        y = kernels.rotate(x, *tables(torch.float32, 1, 2, 32, layout, head_dim=64), layout)
        assert torch.isfinite(y).sum() == y.numel() - 2 and torch.equal(y[..., 32:], x[..., 32:])


def test_a_gradient_of_any_layout_and_the_second_derivative():
    x = torch.randn(1, 2, 3, 64, device=DEVICE, requires_grad=True)
    cos, sin = tables(torch.float32, 1, 3, 64, "half")
    sums = (f(x, cos, sin, "half").sum() for f in (kernels.rotate, rope.rotate))            # dy is expanded: strides 0
    found, right = (torch.autograd.grad(total, x)[0] for total in sums)
    torch.testing.assert_close(found, right)
    first, = torch.autograd.grad(kernels.rotate(x, cos, sin, "half").square().sum(), x, create_graph=True)
    second, = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, torch.full_like(x, 2.0))             # ‖R x‖² = ‖x‖²


@pytest.mark.slow
def test_as_torch_sees_it():
    x = torch.randn(2, 5, 3, 64, device=DEVICE).transpose(1, 2)
    for layout in LAYOUTS:
        cos, sin = tables(torch.float32, 2, 5, 32, layout, head_dim=64)
        torch.library.opcheck(rotate_op, (x.detach().requires_grad_(), cos, sin, layout == "interleaved", False, True))
        compiles(lambda x, cos=cos, sin=sin, layout=layout: kernels.rotate(x, cos, sin, layout), x)


@pytest.mark.skipif(not INTERPRETED, reason="runs one program out of many, which only the interpreter can")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("axis", ["token", "head", "batch", "table"])
def test_beyond_two_to_the_31_elements(axis, layout):
    """x has one index that is large: the last program is run, on a row at an offset of more than 2³¹."""
    d, last = 64, 2**26 + 4
    shapes = {"token": (1, 1, last, d), "head": (1, last, 1, d), "batch": (last, 1, 1, d), "table": (1, 1, last, d)}
    shape = shapes[axis]
    x, y, table = far(shape), far(shape), far((last, d))
    strides = [0, 0, 0] if axis == "table" else x.stride()[:3]
    x.as_strided((last, d), (0 if axis == "table" else d, 1))[-1], table[-1] = torch.randn(2, d).half()
    table_strides = (d, d) if axis == "table" else (0, 0)
    cos = table if axis == "table" else table[-1]
    tokens, heads = 4 if axis in ("token", "table") else 1, 4 if axis == "head" else 1
    with programs_from(last // (tokens * heads) - 1):
        rotate_kernel[(1,)](x, cos, cos, y, shape[1], shape[2], *strides, *y.stride()[:3], *table_strides, D=d, R=d,
                            INTERLEAVED=layout == "interleaved", TRANSPOSED=False, TOKENS=tokens, HEADS=heads,
                            HALF=d // 2, REST=1)
    one = x.flatten()[:d] if axis == "table" else x.flatten()[-d:]
    right = rope.rotate(one.view(1, 1, 1, d).float(), *(table[-1].view(1, 1, 1, d).float(),) * 2, layout)
    torch.testing.assert_close(y.flatten()[-d:].float(), right.flatten(), rtol=2e-3, atol=2e-3)


ZERO, TABLE = torch.zeros(2, 3, 5, 64), torch.zeros(1, 1, 5, 64)


@pytest.mark.parametrize("arguments, reason", [
    ((ZERO, TABLE, TABLE, "pairs"), "layout is 'pairs'"),
    ((ZERO[0], TABLE, TABLE, "half"), "expected (B, H, T, d)"),
    ((ZERO[:, :0], TABLE, TABLE, "half"), "expected (B, H, T, d)"),
    ((ZERO, TABLE[:, :, :4], TABLE[:, :, :4], "half"), "cos and sin have shapes"),
    ((ZERO, TABLE, TABLE[..., :32], "half"), "cos and sin have shapes"),
    ((ZERO, torch.zeros(3, 1, 5, 64), torch.zeros(3, 1, 5, 64), "half"), "expected both (2 or 1, 1, 5, r)"),
    ((ZERO, TABLE[..., :7], TABLE[..., :7], "half"), "7 of 64 channels"),
    ((ZERO[..., :32], TABLE, TABLE, "half"), "64 of 32 channels"),
    ((torch.zeros(1, 1, 5, 512), TABLE, TABLE, "half"),
     "64 of 512 channels are rotated, supported is an even number of up to 256"),
    ((ZERO.half(), TABLE, TABLE, "half"), "must be of one dtype"),
    ((ZERO.double(), TABLE.double(), TABLE.double(), "half"), "float64, supported are"),
    ((torch.zeros(2, 3, 64, 5).transpose(2, 3), TABLE, TABLE, "half"), "channels must follow one another"),
    ((ZERO, TABLE, torch.zeros(1, 1, 5, 128)[..., :64], "half"), "sin must lie as cos does"),
    ((ZERO, TABLE.clone().requires_grad_(), TABLE, "half"), "require a gradient"),
    ((ZERO, TABLE.to("meta"), TABLE, "half"), "cos is on meta"),
])
def test_refusals(arguments, reason):
    with pytest.raises(ValueError, match="kernels.rotate.*" + reason.replace("(", r"\(").replace(")", r"\)")):
        kernels.rotate(*arguments)
