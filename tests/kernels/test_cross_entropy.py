"""The head and its loss against nanollm/training/losses.py."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels import cross_entropy
from kernels.cross_entropy import linear_cross_entropy_backward_op, linear_cross_entropy_op, row_kernel
from nanollm.training import losses
from tests.kernels.checks import DEVICE, DTYPES, INTERPRETED, agree, compiles, far, poisoned, programs_from


def real_launches():
    """For tests/kernels/compiled.py: vocabularies from 32 K to 262 K, one with unaligned rows, a cap, no gradient."""
    for V, softcap, dtype in ((32000, None, torch.bfloat16), (128256, None, torch.bfloat16),
                              (256000, 30.0, torch.bfloat16), (50257, None, torch.bfloat16),
                              (32000, None, torch.float32)):
        x, w = torch.empty(2, 16, dtype=dtype, requires_grad=True), torch.empty(V, 16, dtype=dtype)
        y = torch.zeros(2, dtype=torch.long)
        kernels.linear_cross_entropy(x, w, y, 1e-4, softcap)
        if dtype == torch.bfloat16 and V != 50257:
            kernels.linear_cross_entropy(x.detach(), w, y, 0.0, softcap)


def case(n: int, D: int, V: int, dtype: torch.dtype = torch.float32, scale: float = 2.0) -> tuple[torch.Tensor, ...]:
    """Logits of about ± scale; the first targets are the last and the first row of W, and every fifth there is none."""
    x, w, y = torch.randn(n, D), torch.randn(V, D) * scale / D**0.5, torch.randint(0, V, (n,))
    y[:2] = torch.tensor([V - 1, 0])[:n]
    y[4::5] = -100
    return x.to(DEVICE, dtype), w.to(DEVICE, dtype), y.to(DEVICE)


def chunks(monkeypatch, rows: int, block: int) -> None:
    monkeypatch.setattr(cross_entropy, "tuned", lambda *_: {"ROWS": rows, "BLOCK": block, "num_warps": 4})


# n, D, V; 4096 is a block
SIZES = [(1, 16, 1), (3, 16, 50), (7, 33, 1000), (2, 64, 4095), (2, 64, 4096), (2, 64, 4097), (6, 24, 8195)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, D, V", SIZES, ids=str)
def test_loss_and_gradients(n, D, V, dtype):
    agree(kernels.linear_cross_entropy, losses.linear_cross_entropy, *case(n, D, V, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("z, softcap", [(0.1, None), (0.0, 5.0), (0.1, 30.0)])
@pytest.mark.parametrize("n, D, V", [(7, 33, 1000), (3, 16, 4099)], ids=str)
def test_z_loss_and_soft_cap(n, D, V, z, softcap, dtype):
    agree(kernels.linear_cross_entropy, losses.linear_cross_entropy, *case(n, D, V, dtype, 4.0), z, softcap)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, block", [(1, 64), (3, 64), (4, 256), (7, 128), (11, 64), (12, 64)])
def test_chunks_change_nothing(rows, block, dtype, monkeypatch):
    x, w, y = case(11, 24, 300, dtype)
    chunks(monkeypatch, rows, block)
    agree(kernels.linear_cross_entropy, losses.linear_cross_entropy, x, w, y, 0.05)


@pytest.mark.slow
def test_a_sum_over_many_chunks_is_kept_in_float32(monkeypatch):
    """Each of 600 rows adds a little to one row of dW, less than half a unit in its last place in bfloat16."""
    chunks(monkeypatch, 1, 64)
    x = torch.ones(600, 16).bfloat16().to(DEVICE)
    w = torch.zeros(2, 16, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    kernels.linear_cross_entropy(x, w, torch.zeros(600, dtype=torch.long, device=DEVICE))[0].backward()
    assert (w.grad[0] == -300).all() and (w.grad[1] == 300).all()


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_no_row_has_a_target(softcap):
    x, w, y = case(4, 16, 100)
    y.fill_(-100)
    x.requires_grad_(), w.requires_grad_()
    sums = kernels.linear_cross_entropy(x, w, y, 0.1, softcap)
    assert torch.equal(torch.stack(sums), torch.zeros(3, device=DEVICE))
    assert not any(g.count_nonzero() for g in torch.autograd.grad(sums[0], (x, w)))


@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_row_without_a_target_may_be_anything():
    x, w, y = case(5, 16, 100)
    x[4] = 1e38                                                                 # its logits are ±∞
    given = x.requires_grad_(), w.requires_grad_()
    found = kernels.linear_cross_entropy(x, w, y, 0.1)
    dx, = torch.autograd.grad(found[0], x)
    right = losses.linear_cross_entropy(given[0][:4], w, y[:4], 0.1)
    torch.testing.assert_close(found, right)
    assert (dx[4] == 0).all()


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("first", [1, 64])
def test_logits_of_ten_thousand(dtype, first, monkeypatch):
    """Wherever the largest stands, in the first block or in the last; and where none is near 0."""
    chunks(monkeypatch, 8, 64)
    w = torch.zeros(200, 16)
    w[first], w[199], w[0] = 1e4 / 16, 1e4 / 16 + 0.0625, -1e4 / 16
    x, y = torch.ones(4, 16), torch.tensor([199, first, 0, 5])
    agree(kernels.linear_cross_entropy, losses.linear_cross_entropy, x.to(dtype), w.to(dtype), y)
    agree(kernels.linear_cross_entropy, losses.linear_cross_entropy, x.to(dtype), w.to(dtype), y, 1e-6, 30.0)
    agree(kernels.linear_cross_entropy, losses.linear_cross_entropy, x.to(dtype), (w - 2e4 / 16).to(dtype), y)


def test_logits_that_are_minus_infinity(monkeypatch):
    """A whole block of them comes first: log Z is that of the others."""
    chunks(monkeypatch, 8, 64)
    logits = torch.randn(2, 150, device=DEVICE)
    logits[:, :70] = -torch.inf
    nats, squares = torch.empty(2, device=DEVICE), torch.empty(2, device=DEVICE)
    y = torch.tensor([100, 149], device=DEVICE)
    right = logits.double().log_softmax(-1)
    probability = right.exp()
    row_kernel[(2,)](logits, y, nats, squares, 150, 0.0, 1.0, CAP=False, GRADIENT=True, BLOCK=64)
    torch.testing.assert_close(nats.double(), -right[[0, 1], y])
    probability[[0, 1], y] -= 1
    torch.testing.assert_close(logits.double(), probability)


def test_without_gradients_the_sums_are_the_same():
    x, w, y = case(6, 24, 300, torch.bfloat16)
    with poisoned():
        given = kernels.linear_cross_entropy(x.clone().requires_grad_(), w, y, 0.1, 20.0)
        plain = kernels.linear_cross_entropy(x, w, y, 0.1, 20.0)
        with torch.no_grad():
            off = kernels.linear_cross_entropy(x.clone().requires_grad_(), w, y, 0.1, 20.0)
    assert given[0].requires_grad
    assert not any(sums.requires_grad for sums in (given[1], given[2], plain[0], off[0]))
    for a, b, c in zip(given, plain, off, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("which", [0, 1])
def test_one_of_the_two_is_frozen(which):
    x, w, y = case(6, 24, 300)
    found = []
    for f in (kernels.linear_cross_entropy, losses.linear_cross_entropy):
        given = [x.clone(), w.clone()]
        given[which].requires_grad_()
        f(*given, y)[0].backward()
        assert given[1 - which].grad is None
        found.append(given[which].grad)
    torch.testing.assert_close(*found)


def test_the_gradient_that_comes_in_is_multiplied_in_float32():
    """A mean over a million tokens: in float16 a millionth is rounded by 5 percent, and its product with 300 is not."""
    x = torch.full((60, 16), 10.0).half().to(DEVICE)
    w = torch.zeros(2, 16, dtype=torch.float16, device=DEVICE, requires_grad=True)
    y = torch.zeros(60, dtype=torch.long, device=DEVICE)
    total = kernels.linear_cross_entropy(x, w, y)[0]
    for _ in range(2):                                              # the second time as the first: nothing in place
        grad, = torch.autograd.grad(total / 1e6, w, retain_graph=True)
        assert torch.equal(grad[0], torch.full_like(grad[0], -300 / 1e6)) and torch.equal(grad[1], -grad[0])
    x = torch.zeros(60, 16, device=DEVICE).half().requires_grad_()
    w = torch.tensor([[512.0], [-512.0]], device=DEVICE).half().expand(2, 16)
    grad, = torch.autograd.grad(kernels.linear_cross_entropy(x, w, y)[0] / 1e6, x)
    assert torch.equal(grad, torch.full_like(grad, -512 / 1e6))


def test_dw_may_be_larger_than_float16_before_it_is_divided():
    """128 rows of 1600 · ½ are 102400; the largest float16 is 65504."""
    x = torch.full((128, 16), 1600.0).half().to(DEVICE)
    w = torch.zeros(2, 16, dtype=torch.float16, device=DEVICE, requires_grad=True)
    y = torch.zeros(128, dtype=torch.long, device=DEVICE)
    (kernels.linear_cross_entropy(x, w, y)[0] / 128).backward()
    torch.testing.assert_close(w.grad, torch.tensor([[-800.0], [800.0]], device=DEVICE).half().expand(2, 16))


@pytest.mark.parametrize("target", [-1, -101, 100, 10**12])
def test_a_target_that_does_not_exist_is_nan(target):
    x, w, y = case(3, 16, 100)
    y[1] = target
    sums = kernels.linear_cross_entropy(x, w, y)
    assert math.isnan(sums[0]) and math.isnan(sums[1])


def test_hidden_and_targets_with_strides():
    x, w, y = case(6, 48, 100)
    agree(kernels.linear_cross_entropy, losses.linear_cross_entropy, x[:, ::2], w[:, :24], y.repeat_interleave(2)[::2])


class Largest(TorchDispatchMode):
    """Remembers the largest storage that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for one in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(one, torch.Tensor):
                self.most = max(self.most, one.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("needs", [True, False])
def test_never_more_than_a_chunk_of_logits(needs, monkeypatch):
    chunks(monkeypatch, 8, 512)
    n, D, V = 100, 16, 1000
    x, w, y = torch.randn(n, D), torch.randn(V, D), torch.randint(0, V, (n,))
    with Largest() as ours:
        linear_cross_entropy_op._init_fn(x.to(DEVICE), w.to(DEVICE), y.to(DEVICE), 0.0, None, needs, needs)
    with Largest() as theirs:
        losses.linear_cross_entropy(x.requires_grad_(needs), w.requires_grad_(needs), y)
    assert theirs.most == n * V * 4
    assert ours.most == max(8 * V, V * D, n * D) * 4


def test_there_is_no_second_derivative():
    x, w, y = case(3, 16, 100)
    dx, = torch.autograd.grad(kernels.linear_cross_entropy(x.requires_grad_(), w, y)[0] * x.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        dx.sum().backward()


@pytest.mark.slow
def test_as_torch_sees_it():
    x, w, y = case(6, 24, 300)
    for needs in ((True, True), (True, False), (False, False)):
        given = x.clone().requires_grad_(needs[0]), w.clone().requires_grad_(needs[1])
        torch.library.opcheck(linear_cross_entropy_op, (*given, y, 0.1, 20.0, *needs))
    torch.library.opcheck(linear_cross_entropy_backward_op, (torch.tensor(0.5), x, w))
    compiles(lambda x, w: kernels.linear_cross_entropy(x, w, y, 0.1)[0], x, w)
    compiles(lambda x, w: kernels.linear_cross_entropy(x, w, y, 0.1)[0], x.bfloat16(), w.bfloat16())


@pytest.mark.skipif(not INTERPRETED, reason="runs one program out of many, which only the interpreter can")
def test_beyond_two_to_the_31_elements():
    rows, V = 2**19 + 3, 4096
    logits, y, nats, squares = far((rows, V)), torch.zeros(rows, dtype=torch.long), torch.zeros(rows), torch.zeros(rows)
    logits[-1], y[-1] = torch.randn(V), 7
    before = logits[-1].float().requires_grad_()
    with programs_from(rows - 1):
        row_kernel[(1,)](logits, y, nats, squares, V, 0.0, 1.0, CAP=False, GRADIENT=True, BLOCK=1024)
    right = torch.nn.functional.cross_entropy(before, y[-1])
    torch.testing.assert_close(nats[-1], right)
    torch.testing.assert_close(logits[-1].float(), torch.autograd.grad(right, before)[0], rtol=1e-3, atol=1e-5)


X, W, Y = torch.zeros(3, 8), torch.zeros(50, 8), torch.zeros(3, dtype=torch.long)


@pytest.mark.parametrize("arguments, reason", [
    ((X[0], W, Y), "hidden and weight have shapes (8,) and (50, 8)"),
    ((X, W[:, :7], Y), "hidden and weight have shapes"),
    ((X[:0], W, Y[:0]), "at least one of each"),
    ((X, W[:0], Y), "at least one of each"),
    ((torch.zeros(3, 1), torch.zeros(2**20 + 1, 1), Y), "weight has 1048577 rows, supported are up to 1048576"),
    ((X, W.half(), Y), "hidden and weight must be of one dtype"),
    ((X.double(), W.double(), Y), "float64, supported are"),
    ((X, W, Y[:2]), "targets are (2,) torch.int64, expected (3,)"),
    ((X, W, Y.int()), "targets are (3,) torch.int32"),
    ((X, W, Y, 0.0, -1.0), "softcap is -1.0, expected a positive number"),
    ((X, W.to("meta"), Y), "weight is on meta"),
    ((X, W, Y.to("meta")), "targets is on meta"),
])
def test_refusals(arguments, reason):
    pattern = "kernels.linear_cross_entropy.*" + reason.replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=pattern):
        kernels.linear_cross_entropy(*arguments)
