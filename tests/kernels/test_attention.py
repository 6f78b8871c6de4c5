"""Attention kernels, forward and backward, against softmax(q kᵀ) v written out. One query: test_decode.py."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import kernels
from kernels import common
from kernels.attention import attention_op, forward_kernel
from kernels.attention_backward import attention_backward_op, delta_kernel, keys_kernel, queries_kernel, spans_kernel
from tests.kernels.checks import DEVICE, DTYPES, INTERPRETED, agree, compiles, far, in_turn, programs_from

SMALL = {"QUERIES": 32, "KEYS": 32, "num_warps": 4, "num_stages": 1}


def real_launches():
    """For tests/kernels/compiled.py: head widths of decoders, each with something that takes registers."""
    for dtype, d, softcap, slopes in (
            (torch.bfloat16, 64, None, torch.empty(32)), (torch.bfloat16, 128, None, None),
            (torch.bfloat16, 256, 50.0, None), (torch.float32, 256, None, None)):
        q, k, v = (torch.empty(1, 64, heads, d, dtype=dtype, requires_grad=True) for heads in (32, 8, 8))
        seen = mask_of(torch.zeros(1, 64), torch.arange(64)[None], slopes)
        kernels.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), seen, d**-0.5, softcap).sum().backward()


@dataclass
class AttentionMask:
    """What nanollm.layers.mask.AttentionMask is to a kernel."""
    first: Tensor | None
    last: Tensor | None
    slopes: Tensor | None = None


def mask_of(first, last, slopes=None):
    return AttentionMask(first.int().to(DEVICE), last.int().to(DEVICE), None if slopes is None else slopes.to(DEVICE))


def definition(q, k, v, seen, scale, softcap=None):
    """The equation, in the dtype of q but for the softmax; x.float() is x.double() where `agree` wants it so."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    first, last = seen.first[:, None, :, None], seen.last[:, None, :, None]
    keys = torch.arange(k.shape[2], device=k.device)
    scores = q @ k.transpose(-2, -1) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.float()
    if seen.slopes is not None:
        scores = scores - seen.slopes.to(scores.dtype)[:, None, None] * (last - keys)
    scores = scores.masked_fill((keys < first) | (keys > last), -1e30)
    return (scores.softmax(-1) * (first <= last)).to(q.dtype) @ v


def qkv(B, H, K, T, S, d, dtype):
    """q, k, v as the decoder has them: (B, T, H, d) transposed, and caches longer than what is used of them."""
    q, k, v = torch.randn(B, T, H, d), torch.randn(B, K, S + 3, d), torch.randn(B, S + 2, K, d)
    return q.to(dtype).transpose(1, 2), k.to(dtype), v.to(dtype).transpose(1, 2)


def check(B, H, K, T, S, d, dtype, seen, softcap=None, backward=True):
    """kernels.attend and its gradients on S of the keys."""
    agree(lambda q, k, v: kernels.attend(q, k[:, :, :S], v[:, :, 2:], seen, d**-0.5, softcap),
          lambda q, k, v: definition(q, k[:, :, :S], v[:, :, 2:], seen, d**-0.5, softcap),
          *qkv(B, H, K, T, S, d, dtype), backward=backward)


@pytest.fixture
def small(monkeypatch):
    """Tiles so small that a few dozen tokens have interior and edges."""
    for name in ("attention", "attention_keys", "attention_queries"):
        for suffix in ("", "_float32"):
            monkeypatch.setitem(common.TABLE, name + suffix, {"any": {"256": SMALL}})
    common._entry.cache_clear()
    yield
    common._entry.cache_clear()


def causal(T, S=None, window=None):
    """The T last of S places."""
    last = torch.arange(T)[None] + (S or T) - T
    return torch.zeros_like(last) if window is None else (last - window + 1).clamp(min=0), last


def documents(T):
    """Two rows of documents one after another, one of no length, and padding at the end of a row, and in its middle."""
    rows = []
    for lengths in ([5, 0, T - 15, 10], [20, T - 20]):
        first = torch.cat([torch.full((n,), sum(lengths[:i])) for i, n in enumerate(lengths)])
        rows.append((first, torch.arange(T)))
    first, last = (torch.stack(x) for x in zip(*rows, strict=True))
    for row, padding in ((0, slice(T - 7, T)), (1, slice(10, 20))):
        first[row, padding] = last[row, padding] + 1
    return first, last


def scrambled(T):
    """No order at all, as no decoder has it, a third of it empty."""
    ends = torch.randint(T, (2, 2, T), generator=torch.Generator().manual_seed(3))
    return ends[0], ends[1]


def far_apart(T):
    """Queries that see all keys on both sides of some that see none: where all is seen is no run."""
    last = torch.full((1, T), T - 1)
    last[:, T // 3 : T // 2] = -1
    return torch.zeros(1, T), last


MASKS = {
    "causal": causal(67), "window 1": causal(67, window=1), "window 20": causal(67, window=20),
    "window T": causal(67, window=67), "documents": documents(67),
    "ragged": (torch.zeros(2, 67), torch.arange(67) - torch.tensor([[0], [30]])),
    "scrambled": scrambled(67), "far apart": far_apart(67), "all": (torch.zeros(1, 67), torch.full((1, 67), 66)),
    "nothing": (torch.zeros(1, 67), torch.full((1, 67), -1)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [1, 31, 32, 33, 67])
def test_lengths(small, T, dtype):
    check(1, 2, 1, T, T, 32, dtype, mask_of(*causal(T)), backward=T > 1)


@pytest.mark.parametrize("dtype, softcap", [(torch.bfloat16, None), (torch.float32, 3.0)])
@pytest.mark.parametrize("name", MASKS)
def test_masks(small, name, dtype, softcap):
    slopes = torch.tensor([0.5, 0.03]) if softcap is None else None
    check(2, 2, 1, 67, 67, 16, dtype, mask_of(*MASKS[name], slopes), softcap, name != "window 1")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap, slopes", [(None, True), (2.0, False), (2.0, True)])
def test_soft_cap_and_alibi(small, softcap, slopes, dtype):
    check(1, 2, 1, 40, 40, 32, dtype, mask_of(*causal(40), torch.rand(2) if slopes else None), softcap)


@pytest.mark.parametrize("H, K, d, dtype", in_turn([
    (2, 2, 64), (2, 2, 80), (4, 2, 32), (8, 1, 128), (1, 1, 256), (1, 1, 8)]), ids=str)
def test_head_widths_and_groups(small, H, K, d, dtype):
    check(1, H, K, 33, 33, d, dtype, mask_of(*causal(33, window=20)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 25])
def test_a_chunk_after_what_is_cached(small, window, dtype):
    check(1, 2, 1, 35, 70, 32, dtype, mask_of(*causal(35, 70, window)))


@pytest.mark.parametrize("dtype", (torch.float16, torch.float32))
@pytest.mark.parametrize("d", [64, 128, 256])
def test_tiles_as_tuned(d, dtype):
    T = 131 if dtype == torch.float16 and d < 256 else 35
    check(1, 2, 1, T, T, d, dtype, mask_of(*causal(T, window=T - 20)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [1, 40])
def test_one_key_is_taken_as_it_is(small, T, dtype):
    """Then the scores do not matter: q and k have no gradient, which no relative error can show."""
    q, k, v = (torch.randn(1, 2, T, 32, dtype=dtype).requires_grad_() for _ in range(3))
    o = kernels.attend(q, k, v, mask_of(*causal(T, window=1)), 0.2)
    dq, dk, dv = torch.autograd.grad(o, (q, k, v), do := torch.randn_like(o))
    assert torch.equal(o, v)
    torch.testing.assert_close(dv, do)
    assert max(dq.abs().max(), dk.abs().max()) < 1e-5


def test_the_future_changes_nothing(small):
    q, k, v = qkv(1, 2, 1, 67, 67, 32, torch.float32)
    k, v, seen = k[:, :, :67], v[:, :, :67], mask_of(*causal(67))
    before = kernels.attend(q, k, v, seen, 0.2)
    k[:, :, 40:], v[:, :, 40:] = torch.nan, torch.nan
    after = kernels.attend(q[:, :, :40], k, v, mask_of(*causal(40)), 0.2)
    assert torch.equal(before[:, :, :40], after)
    k[:, :, 40:], v[:, :, 40:] = 1e4, -1e4
    assert torch.equal(before[:, :, :40], kernels.attend(q, k, v, seen, 0.2)[:, :, :40])


def test_the_same_to_the_bit(small):
    """A window that holds everything; a group of heads and copies of its keys; a mask for all rows and one each."""
    given = qkv(2, 2, 1, 50, 50, 32, torch.float32)
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in given)
    k, v = k[:, :, :50].detach().requires_grad_(), v[:, :, :50].detach().requires_grad_()

    def results(seen, copies=1):
        o = kernels.attend(q, k.expand(-1, copies, -1, -1), v.expand(-1, copies, -1, -1), seen, 0.2)
        return o, *torch.autograd.grad(o.sum(), (q, k, v))

    right = results(mask_of(*causal(50)))
    shared, wide = results(mask_of(*causal(50))), results(mask_of(*causal(50, window=50)))
    for other in (wide, shared, results(mask_of(*(x.expand(2, -1) for x in causal(50))))):
        assert all(torch.equal(a, b) for a, b in zip(right, other, strict=True))
    copied = results(mask_of(*causal(50)), 2)
    assert torch.equal(copied[0], right[0]) and torch.equal(copied[1], right[1])


def test_the_scale_of_scores(small):
    """Scores in the thousands, in both signs: the softmax is one-hot and stays finite."""
    check(1, 1, 1, 40, 40, 16, torch.float32, mask_of(*causal(40)))
    q, k, v = (1000 * torch.ones(1, 1, 40, 16) * sign for sign in (1, -1, 1))
    assert torch.equal(kernels.attend(q, k, v, mask_of(*causal(40)), 1.0), v)
    q, k, v = (torch.randn(1, 1, 40, 16) * size for size in (100, 100, 1))
    seen = mask_of(*causal(40))
    torch.testing.assert_close(kernels.attend(q, k, v, seen, 1.0), definition(q, k, v, seen, 1.0))


def test_the_output_lies_as_the_projection_wants_it():
    q, k, v = (x[:, :, :20] for x in qkv(2, 4, 2, 20, 20, 16, torch.float32))
    o = kernels.attend(q, k, v, mask_of(*causal(20)), 0.25)
    assert o.shape == (2, 4, 20, 16) and o.transpose(1, 2).flatten(-2).data_ptr() == o.data_ptr()


def test_only_gradients_that_are_wanted(small):
    given, seen = [x[:, :, :20] for x in qkv(1, 2, 1, 20, 20, 16, torch.float32)], mask_of(*causal(20))
    for wanted in ((0,), (2,), (0, 1)):
        q, k, v = (x.detach().requires_grad_(i in wanted) for i, x in enumerate(given))
        found = []
        for f in (kernels.attend, definition):
            loss = f(q, k, v, seen, 0.25).square().sum()
            found.append(torch.autograd.grad(loss, [(q, k, v)[i] for i in wanted]))
        mine, right = found
        torch.testing.assert_close(mine, right)


@pytest.mark.slow
def test_as_torch_sees_them(small):
    q, k, v = (x[:, :, :20].requires_grad_() for x in qkv(2, 2, 1, 20, 20, 16, torch.float32))
    seen = mask_of(*causal(20), torch.rand(2))
    torch.library.opcheck(attention_op, (q, k, v, seen.first, seen.last, None, 0.25, None))
    torch.library.opcheck(attention_op, (q, k, v, seen.first, seen.last, seen.slopes, 0.25, 2.0))
    o, lse = attention_op(q, k, v, seen.first, seen.last, None, 0.25, None)
    assert not lse.requires_grad
    for needed in ((True, True), (True, False), (False, True)):
        saved = (x.detach() for x in (o, q, k, v, o, lse))
        torch.library.opcheck(attention_backward_op, (*saved, seen.first, seen.last, None, 0.25, None, *needed))
    compiles(lambda q, k, v, first, last: kernels.attend(q, k, v, AttentionMask(first, last), 0.25),
             q, k, v, seen.first, seen.last)


@pytest.mark.skipif(not INTERPRETED, reason="runs one program out of many, which only the interpreter can")
def test_beyond_two_to_the_31_elements():
    """The last 20 of 2²⁷ + 20 tokens, which see one another: the last tile of queries, and the last of keys."""
    few, d, LOG2E = 20, 16, 1.4426950408889634
    options = dict(WIDTH=16, BLOCK=16, SOFTCAP=False, ALIBI=False, QUERIES=32, KEYS=32)
    T, scale = 2**27 + few, 0.3
    q, k, v, o, do, dq, dk, dv = (far((1, 1, T, d)) for _ in range(8))
    lse, delta = far((1, 1, T), torch.float32), far((1, 1, T), torch.float32)
    first, last = far((1, T), torch.int32), far((1, T), torch.int32)
    for x in (q, k, v, do):
        x[:, :, -few:] = torch.randn(1, 1, few, d)
    first[:, -few:], last[:, -few:] = T - few, torch.arange(T - few, T)
    spans = far((T // 32 + 1, 4), torch.int32)
    spans[-1] = torch.tensor([T - few, T, T, T])
    strides, numbers = q.stride()[:3] * 3, (scale * LOG2E, 0.0)
    forward_kernel[(1, 1, 1)](q, k, v, o, lse, first, last, None, *strides, 0, 1, T, *numbers, **options)
    with programs_from(T // 32):
        delta_kernel[(1, 1, 1)](o, do, delta, 1, T, WIDTH=16, BLOCK=16, ROWS=32)
    queries_kernel[(1, 1, 1)](q, k, v, do, lse, delta, first, last, None, dq, *strides, 0, 1, T, *numbers, scale,
                              **options)
    with programs_from(T // 32):
        keys_kernel[(1, 1, 1)](q, k, v, do, lse, delta, first, last, None, spans, dk, dv, *strides, 0, 1, T, T,
                               *numbers, scale, **options)
    near = [x[:, :, -few:].float().requires_grad_() for x in (q, k, v)]
    right = definition(*near, mask_of(*causal(few)), scale)
    gradients = torch.autograd.grad(right, near, do[:, :, -few:].float())
    for mine, wanted in zip((o, dq, dk, dv), (right, *gradients), strict=True):
        torch.testing.assert_close(mine[:, :, -few:].float(), wanted.detach(), rtol=4e-3, atol=4e-3)


@pytest.mark.parametrize("name", MASKS)
def test_spans(name):
    """from, to, a, b of each tile of keys, against their definition."""
    first, last = (x.int().contiguous() for x in MASKS[name])
    S, KEYS = 67, 16
    spans = torch.full((len(first), 5, 4), -7, dtype=torch.int32)
    spans_kernel[(5, len(first))](first, last, spans, 67, S, KEYS, AT_ONCE=32)
    for row in range(len(first)):
        for tile in range(5):
            low, high = tile * KEYS, min(tile * KEYS + KEYS, S) - 1
            some = ((first[row] <= high) & (last[row] >= low) & (first[row] <= last[row])).nonzero().flatten()
            every = ((first[row] <= low) & (last[row] >= high)).nonzero().flatten()
            start, end, a, b = spans[row, tile].tolist()
            assert (start, end) == ((int(some[0]), int(some[-1]) + 1) if len(some) else (67, 0))
            one_run = len(every) and len(every) == every[-1] - every[0] + 1
            assert (a, b) == (int(every[0]), int(every[-1]) + 1) if one_run else a == b


def refused(q=(1, 2, 4, 16), k=(1, 1, 4, 16), v=None, dtype=torch.float32, scale=1.0, softcap=None, seen=None):
    seen = seen or mask_of(torch.zeros(q[0], q[2]), torch.zeros(q[0], q[2]))
    q, k, v = (torch.zeros(shape, dtype=dtype) for shape in (q, k, v or k))
    return kernels.attend.refuses(q, k, v, seen, scale, softcap)


@pytest.mark.parametrize("arguments, reason", [
    (dict(), None),
    (dict(seen=AttentionMask(None, None)), "what a query sees is not one run of keys"),
    (dict(k=(1, 1, 4, 8)), "K a divisor of H"),
    (dict(q=(1, 3, 4, 16), k=(1, 2, 4, 16)), "K a divisor of H"),
    (dict(v=(1, 1, 5, 16)), "K a divisor of H"),
    (dict(q=(1, 2, 0, 16)), "there is nothing in q"),
    (dict(q=(1, 2, 4, 272), k=(1, 1, 4, 272)), "heads of 272, supported are up to 256"),
    (dict(dtype=torch.float64), "float64, supported are"),
    (dict(scale=-1.0), "must be positive"),
    (dict(softcap=0.0), "must be positive"),
    (dict(seen=AttentionMask(torch.zeros(1, 4).long(), torch.zeros(1, 4).int())), "mask.first is int64"),
    (dict(seen=mask_of(torch.zeros(1, 4), torch.zeros(1, 5))), "mask.last is int32 (1, 5), expected int32 (1, 4)"),
    (dict(seen=mask_of(torch.zeros(1, 4), torch.zeros(1, 4), torch.zeros(3))),
     "mask.slopes is float32 (3,), expected float32 (2,), one"),
])
def test_refusals(arguments, reason):
    said = refused(**arguments)
    assert said is None if reason is None else reason in said, said


def test_more_refusals():
    q, k, seen = torch.zeros(2, 2, 4, 16), torch.zeros(2, 1, 4, 16), mask_of(torch.zeros(1, 4), torch.zeros(2, 4))
    assert "mask.first has shape (1, 4), mask.last (2, 4)" in kernels.attend.refuses(q, k, k, seen, 1.0)
    assert "those of k are 2 apart" in kernels.attend.refuses(q, torch.zeros(2, 1, 4, 32)[..., ::2], k, seen, 1.0)
    assert "one dtype" in kernels.attend.refuses(q, k, k.half(), seen, 1.0)
    many = [x[:1].expand(70000, -1, -1, -1) for x in (q, k, k)]
    assert "65535 rows" in kernels.attend.refuses(*many, seen, 1.0)
    with pytest.raises(ValueError, match="kernels.attend: k is on meta"):
        kernels.attend(q, k.to("meta"), k, mask_of(torch.zeros(1, 4), torch.zeros(1, 4)), 1.0)
