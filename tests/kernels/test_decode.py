"""Decode attention, split along the keys, against softmax(q kᵀ) v written out."""

import os
import subprocess
import sys

import pytest
import torch

import kernels
from kernels import common, decode
from kernels.attention import attention_op
from kernels.decode import decode_kernel, decode_op, merge_kernel
from tests.kernels.checks import DTYPES, INTERPRETED, agree, far, programs_from
from tests.kernels.test_attention import AttentionMask, causal, definition, mask_of


def real_launches():
    """For tests/kernels/compiled.py: one token, B = 1 and a long cache, and so many rows that nothing is split."""
    for dtype, d, softcap, slopes in (
            (torch.bfloat16, 64, None, torch.empty(32)), (torch.bfloat16, 128, None, None),
            (torch.bfloat16, 256, 50.0, None), (torch.float32, 256, None, None)):
        q, k = torch.empty(1, 32, 1, d, dtype=dtype), torch.empty(1, 8, 4096, d, dtype=dtype)
        kernels.attend(q, k, k, mask_of(torch.zeros(1, 1), torch.zeros(1, 1), slopes), d**-0.5, softcap)
    q, k = torch.empty(128, 32, 1, 128, dtype=torch.bfloat16), torch.empty(128, 8, 16, 128, dtype=torch.bfloat16)
    kernels.attend(q, k, k, mask_of(torch.zeros(128, 1), torch.zeros(128, 1)), 0.1)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Blocks of 32 keys, and up to four slices."""
    for name in ("decode", "decode_float32"):
        monkeypatch.setitem(common.TABLE, name, {"any": {"256": {"KEYS": 32, "num_warps": 4, "num_stages": 1}}})
    monkeypatch.setattr(decode, "splits", lambda programs, S, KEYS, device: min(4, -(-S // KEYS)))
    common._entry.cache_clear()
    yield
    common._entry.cache_clear()


def check(B, H, K, T, S, d, dtype, seen, softcap=None):
    """On S of the keys of a longer cache, one token of q transposed as it comes from the projection."""
    q, k, v = torch.randn(B, T, H, d), torch.randn(B, K, S + 5, d), torch.randn(B, K, S + 1, d)
    q, k, v = q.to(dtype).transpose(1, 2), k.to(dtype), v.to(dtype)
    agree(lambda q, k, v: kernels.attend(q, k[:, :, :S], v[:, :, :S], seen, d**-0.5, softcap),
          lambda q, k, v: definition(q, k[:, :, :S], v[:, :, :S], seen, d**-0.5, softcap), q, k, v, backward=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("S", [1, 31, 32, 33, 67, 150])
def test_lengths(S, dtype):
    check(2, 4, 2, 1, S, 32, dtype, mask_of(*causal(1, S)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("H, K, d", [(1, 1, 64), (4, 1, 80), (8, 1, 128), (2, 2, 256), (20, 1, 16)])
def test_head_widths_and_groups(H, K, d, dtype):
    """20 heads to a key head are two tiles of rows."""
    check(1, H, K, 1, 40, d, dtype, mask_of(*causal(1, 40)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap, slopes", [(None, True), (2.0, False), (2.0, True)])
def test_soft_cap_and_alibi(softcap, slopes, dtype):
    check(2, 4, 2, 1, 67, 32, dtype, mask_of(*causal(1, 67), torch.rand(4) if slopes else None), softcap)


@pytest.mark.parametrize("first, last", [
    ([0, 0, 0], [99, 0, 32]), ([80, 99, 5], [99, 99, 40]), ([0, 0, 50], [-1, 40, 49]),
], ids=["ragged", "window", "nothing"])
def test_rows_of_their_own(first, last):
    """Rows of which some have slices without a key, or no key at all."""
    check(3, 4, 2, 1, 100, 32, torch.float32, mask_of(torch.tensor(first)[:, None], torch.tensor(last)[:, None]))


@pytest.mark.parametrize("T, window", [(3, None), (3, 2), (8, None)])
def test_a_few_queries(T, window):
    """T · G ≤ 16 are rows of one tile too."""
    check(2, 4, 2, T, 70, 32, torch.float32, mask_of(*causal(T, 70, window), torch.rand(4)))


def launched(monkeypatch):
    """The names of the operations that run from here on."""
    names = []
    for module, name in ((kernels.attention, "attention_op"), (kernels.attention, "decode_op")):
        before = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, before=before, name=name: names.append(name) or before(*a))
    return names


def test_which_operation_runs(monkeypatch):
    names, seen = launched(monkeypatch), mask_of(*causal(1, 20))
    q, k = torch.randn(1, 40, 1, 16), torch.randn(1, 1, 20, 16)
    kernels.attend(q, k, k, seen, 0.25)
    kernels.attend(q[:, :2].expand(-1, -1, 9, -1), k, k, mask_of(*causal(9, 20)), 0.25)
    kernels.attend(q.requires_grad_(), k, k, seen, 0.25)
    with torch.no_grad():
        kernels.attend(q, k, k, seen, 0.25)
    assert names == ["decode_op", "attention_op", "attention_op", "decode_op"]


def test_decode_is_flash_and_any_number_of_slices_is_one(monkeypatch):
    """40 slices of 700 keys are 22 that hold some, more than the merge takes in at a time, and 18 that are empty."""
    q, k, v = torch.randn(2, 2, 1, 32), torch.randn(2, 1, 700, 32), torch.randn(2, 1, 700, 32)
    seen = mask_of(torch.tensor([[0], [7]]), torch.tensor([[699], [100]]))
    k[:, :, -1] = 2 * q[:, ::2, 0]                              # the largest score comes last: earlier sums must shrink
    flash, _ = attention_op(q, k, v, seen.first, seen.last, None, 0.2, None)
    for count in (1, 2, 3, 10, 40):
        monkeypatch.setattr(decode, "splits", lambda *_, count=count: count)
        found = decode_op(q, k, v, seen.first, seen.last, None, 0.2, None)
        torch.testing.assert_close(found, flash, rtol=1e-5, atol=1e-6)


def test_what_lies_outside_is_never_read():
    q, k, v = torch.randn(1, 2, 1, 32), torch.randn(1, 1, 130, 32), torch.randn(1, 1, 130, 32)
    seen = mask_of(torch.tensor([[40]]), torch.tensor([[90]]))
    before = kernels.attend(q, k, v, seen, 0.2)
    for x in (k, v):
        x[:, :, :40], x[:, :, 91:] = torch.nan, torch.nan
    assert torch.equal(before, kernels.attend(q, k, v, seen, 0.2))


def test_scores_of_any_size():
    q, k, v = torch.full((1, 1, 1, 16), 1000.0), torch.randn(1, 1, 100, 16) * 1000, torch.randn(1, 1, 100, 16)
    seen = mask_of(*causal(1, 100))
    torch.testing.assert_close(kernels.attend(q, k, v, seen, 1.0), definition(q, k, v, seen, 1.0))


@pytest.mark.skipif(not INTERPRETED, reason="the number of slices of a device without a table of its own")
def test_how_many_slices(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(decode, "multiprocessors", lambda device: 132)
    asked = ((8, 10**6), (8, 100), (528, 10**6), (529, 10**6), (10**4, 10**6))
    assert [decode.splits(programs, S, 64, None) for programs, S in asked] == [66, 2, 1, 1, 1]


@pytest.mark.slow
def test_as_torch_sees_it():
    q, k, v = torch.randn(2, 4, 1, 16), torch.randn(2, 2, 40, 16), torch.randn(2, 2, 40, 16)
    seen = mask_of(*causal(1, 40), torch.rand(4))
    torch.library.opcheck(decode_op, (q, k, v, seen.first, seen.last, None, 0.25, None))
    torch.library.opcheck(decode_op, (q, k, v, seen.first, seen.last, seen.slopes, 0.25, 2.0))

    def attended(q, k, v, first, last):
        return kernels.attend(q, k, v, AttentionMask(first, last), 0.25)

    compiled = torch.compile(attended, fullgraph=True, backend="aot_eager")
    assert not kernels.attend(q, k, v, seen, 0.25).requires_grad
    given = (q, k, v, seen.first, seen.last)
    assert torch.equal(compiled(*given), attended(*given))


@pytest.mark.skipif(not INTERPRETED, reason="runs one program out of many, which only the interpreter can")
def test_beyond_two_to_the_31_elements():
    """The last keys of a cache of 2²⁷ + 40, and the last part of so many."""
    S, d, few, options = 2**27 + 40, 16, 40, dict(WIDTH=16, BLOCK=16)
    k, v, q = far((1, 1, S, d)), far((1, 1, S, d)), torch.randn(1, 1, 1, d).half()
    k[:, :, -few:], v[:, :, -few:] = torch.randn(2, few, d).half().unbind()
    o = torch.full((1, 1, 1, d), torch.nan)
    seen = mask_of(torch.tensor([[S - few]]), torch.tensor([[S - 1]]))
    decode_kernel[(1, 1, 1)](
        q, k, v, o, None, seen.first, seen.last, None, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        0, 1, 1, 1, 0.3 * 1.4426950408889634, 0.0, SOFTCAP=False, ALIBI=False, ROWS=16, KEYS=32, **options)
    right = definition(q.float(), k[:, :, -few:].float(), v[:, :, -few:].float(), mask_of(*causal(1, few)), 0.3)
    torch.testing.assert_close(o, right, rtol=2e-3, atol=2e-3)
    rows = 2**27 + 1
    parts, lse, out = far((1, rows, d), torch.float32), far((1, rows), torch.float32), far((rows, d))
    parts[0, -1], lse[0, -1] = torch.arange(16.0), 3.0
    with programs_from(rows - 1):
        merge_kernel[(1,)](parts, lse, out, 1, MERGED=16, **options)
    assert torch.equal(out[-1], torch.arange(16.0).half())


@pytest.mark.slow
def test_a_growing_cache_compiles_once():
    """For a batch and its model there is one kernel, and one merge, whatever the length."""
    script = """
import torch, kernels
from kernels.decode import decode_kernel, merge_kernel
from tests.kernels.compiling import compile_only
from tests.kernels.test_attention import mask_of
with compile_only("sm_90"):
    q, cache = (torch.empty(2, heads, n, 128, dtype=torch.bfloat16) for heads, n in ((32, 1), (8, 5001)))
    seen = mask_of(torch.zeros(2, 1), torch.zeros(2, 1))
    for S in (1, 16, 17, 32, 129, 4096, 5000):
        kernels.attend(q, cache[:, :, :S], cache[:, :, :S], seen, 0.1)
print(*(len(kernel.device_caches[90][0]) for kernel in (decode_kernel, merge_kernel)))
"""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["2", "1"], done.stdout + done.stderr[-2000:]
