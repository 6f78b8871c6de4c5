"""State-space duality: both forms against NumPy's transcription of the recurrence and against transformers' own
scan."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan, mamba2_selective_state_update

from nanollm.layers import ssd as module
from nanollm.layers.ssd import CHUNKED_FROM, segment_sums, ssd, ssd_chunked, ssd_sequential
from tests.oracles import difference

FORMS = [ssd_sequential, ssd_chunked, lambda *given: ssd_chunked(*given, chunk=8)]
NAMES = ["sequential", "one chunk or two", "chunks of 8"]


def inputs(T: int = 70, heads: int = 4, groups: int = 2, batch: int = 2, P: int = 6, N: int = 5) -> list[torch.Tensor]:
    """x, Δ, A, B, C, D, h. Decays from nearly none to nearly all."""
    delta = F.softplus(torch.randn(batch, T, heads) - 1)
    A = -torch.logspace(-2, 1.2, heads)
    return [
        torch.randn(batch, T, heads, P), delta, A, torch.randn(batch, T, groups, N), torch.randn(batch, T, groups, N),
        torch.randn(heads), torch.randn(batch, heads, P, N),
    ]


def numpy_recurrence(x, delta, A, B, C, D, h, begins=None):
    """The two equations of the docstring, one number at a time over heads, in float64."""
    x, delta, A, B, C, D, h = (t.double().numpy().copy() for t in (x, delta, A, B, C, D, h))
    y = np.zeros_like(x)
    for b, t, head in np.ndindex(*x.shape[:3]):
        group = head * B.shape[2] // x.shape[2]
        if begins is not None and begins[b, t]:
            h[b, head] = 0
        h[b, head] = np.exp(delta[b, t, head] * A[head]) * h[b, head] + delta[b, t, head] * np.outer(
            x[b, t, head], B[b, t, group]
        )
        y[b, t, head] = h[b, head] @ C[b, t, group] + D[head] * x[b, t, head]
    return torch.from_numpy(y), torch.from_numpy(h)


@pytest.mark.parametrize("form", FORMS, ids=NAMES)
@pytest.mark.parametrize("T", [1, 7, 8, 9, 63, 64, 65, 131])
@pytest.mark.parametrize("heads, groups", [(4, 1), (4, 2), (3, 3)])
def test_the_recurrence_of_the_paper(heads, groups, T, form):
    given = inputs(T, heads, groups)
    begins = torch.rand(2, T) < 0.1
    for starts in (None, begins):
        for ours, reference in zip(form(*given, starts), numpy_recurrence(*given, starts), strict=True):
            assert difference(ours.double(), reference) < 2e-6


@pytest.mark.parametrize("form", FORMS, ids=NAMES)
@pytest.mark.parametrize("T", [1, 33, 80])
def test_transformers(T, form):
    x, delta, A, B, C, D, h = inputs(T)
    theirs, last = mamba2_chunk_scan(x, delta, A, B, C, chunk_size=16, D=D, initial_states=h, return_final_states=True)
    y, ours = form(x, delta, A, B, C, D, h)
    assert difference(y, theirs) < 2e-6 and difference(ours, last) < 2e-6


def test_step_by_step_equals_transformers_and_the_whole():
    x, delta, A, B, C, D, h = inputs(40)
    whole, last = ssd(x, delta, A, B, C, D, h)
    state, mine, steps = h.clone(), h, []
    for t in range(40):
        at = slice(t, t + 1)
        y, mine = ssd(x[:, at], delta[:, at], A, B[:, at], C[:, at], D, mine)
        theirs = mamba2_selective_state_update(
            state, x[:, t], delta[:, t, :, None].expand(x[:, t].shape), A[:, None, None], B[:, t], C[:, t], D[:, None]
        )
        assert difference(y[:, 0], theirs) < 2e-6 and difference(mine, state) < 2e-6
        steps.append(y)
    assert difference(torch.cat(steps, 1), whole) < 2e-6 and difference(mine, last) < 2e-6


@pytest.mark.parametrize("form", FORMS, ids=NAMES)
def test_any_split_gives_the_whole(form):
    given, begins = inputs(90), torch.rand(2, 90) < 0.05
    x, delta, A, B, C, D, h = given
    whole, last = form(*given, begins)
    parts = []
    for a, b in ((0, 1), (1, 40), (40, 41), (41, 90)):
        y, h = form(x[:, a:b], delta[:, a:b], A, B[:, a:b], C[:, a:b], D, h, begins[:, a:b])
        parts.append(y)
    assert difference(torch.cat(parts, 1), whole) < 2e-6 and difference(h, last) < 2e-6


@pytest.mark.parametrize("form", FORMS, ids=NAMES)
def test_documents_do_not_see_each_other(form):
    x, delta, A, B, C, D, h = inputs(70)
    begins = torch.zeros(2, 70, dtype=torch.bool)
    begins[:, [0, 5, 30]] = True
    y, last = form(x, delta, A, B, C, D, h, begins)
    for a, b in ((0, 5), (5, 30), (30, 70)):
        alone, end = form(x[:, a:b], delta[:, a:b], A, B[:, a:b], C[:, a:b], D, torch.zeros_like(h))
        assert difference(y[:, a:b], alone) < 2e-6
    assert difference(last, end) < 2e-6
    x[:, :30] += 1                                                          # the past is not only small but gone
    assert torch.equal(form(x, delta, A, B, C, D, h, begins)[0][:, 30:], y[:, 30:])


@pytest.mark.parametrize("form", FORMS, ids=NAMES)
def test_no_step_at_all_and_a_step_that_forgets_all(form):
    x, delta, A, B, C, D, h = inputs(70)
    y, last = form(x, torch.zeros_like(delta), A, B, C, D, h)
    assert (
        difference(last, h) < 1e-6
        and difference(y, torch.einsum("bhpn,bthn->bthp", h, C.repeat_interleave(2, 2)) + D[:, None] * x) < 2e-6
    )
    y, last = form(x, torch.full_like(delta, 1e-30), A, B, C, D, h)
    assert difference(last, h) < 1e-6
    delta[:, 3], delta[0, 20], x[:, [3, 20]] = 1e4, 1e6, 0  # Δ A of −100 to −10⁷: what comes after must stay exact
    for ours, reference in zip(form(x, delta, A, B, C, D, h), numpy_recurrence(x, delta, A, B, C, D, h), strict=True):
        assert difference(ours.double(), reference) < 2e-6


def test_long_memory():
    """A decay of 1e-5 a token over 3000 tokens: what is left of h is exp(−0.03 …), and exact."""
    x, delta, A, B, C, D, h = inputs(3000, heads=2, groups=1, P=2, N=3)
    delta = torch.full_like(delta, 1e-3)
    for ours, reference in zip(ssd(x, delta, A, B, C, D, h), numpy_recurrence(x, delta, A, B, C, D, h), strict=True):
        assert difference(ours.double(), reference) < 5e-6


def test_segment_sums_of_its_docstring():
    a, starts = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([False, False, False, True])
    none = -torch.inf
    assert segment_sums(a, starts).tolist() == [
        [0, none, none, none], [2, 0, none, none], [6, 4, 0, none], [none, none, none, 0],
    ]
    a = torch.tensor([0.0, -1e8, -1e-3, -1e-3])
    assert segment_sums(a, torch.zeros(4, dtype=torch.bool))[3, 1].item() == pytest.approx(
        -2e-3
    )  # running sums would say 0


def test_gradients_of_both_forms_agree():
    given, begins = inputs(70), torch.rand(2, 70) < 0.05
    gradients = []
    for form in (ssd_sequential, ssd_chunked):
        leaves = [t.double().requires_grad_() for t in given]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "float", torch.Tensor.double)
            y, h = form(*leaves, begins)
            gradients.append(torch.autograd.grad((y * y.detach().cos()).sum() + (h * h.detach().sin()).sum(), leaves))
    for sequential, chunked in zip(*gradients, strict=True):
        assert difference(sequential, chunked) < 1e-11


@pytest.mark.parametrize("T, form", [(CHUNKED_FROM - 1, "ssd_sequential"), (CHUNKED_FROM, "ssd_chunked")])
def test_the_form_follows_the_length(T, form, monkeypatch):
    monkeypatch.setattr(module, form, lambda *given: form)
    assert ssd(*inputs(T)) == form


@pytest.mark.parametrize("form", FORMS, ids=NAMES)
def test_narrow_inputs_are_reckoned_in_float32(form):
    x, delta, A, B, C, D, h = inputs(70)
    x, B, C = x.bfloat16(), B.bfloat16(), C.bfloat16()
    y, last = form(x, delta, A, B, C, D, h)
    wide, same = form(x.float(), delta, A, B.float(), C.float(), D, h)
    assert (
        y.dtype == torch.bfloat16
        and torch.equal(y, wide.bfloat16())
        and last.dtype == torch.float32
        and torch.equal(last, same)
    )
