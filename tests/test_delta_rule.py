"""The gated delta rule: both forms against the paper's equation in NumPy, and against transformers' two functions."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers.models.qwen3_next.modeling_qwen3_next import (
    Qwen3NextRMSNormGated,
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)

from nanollm.config import GatedAttention as GatedAttentionConfig
from nanollm.config import GatedDeltaNet as GatedDeltaNetConfig
from nanollm.config import Layer, ModelConfig
from nanollm.errors import ConfigError
from nanollm.layers import delta as module
from nanollm.layers.delta import CHUNKED_FROM, delta_rule, delta_rule_chunked, delta_rule_sequential
from nanollm.layers.forward_context import ForwardContext
from nanollm.layers.gated_delta_net import GatedDeltaNet
from nanollm.model import Decoder
from tests.oracles import difference
from tests.test_consistency import attention

FORMS = [delta_rule_sequential, delta_rule_chunked, lambda *given: delta_rule_chunked(*given, chunk=8)]
NAMES = ["sequential", "one chunk or two", "chunks of 8"]
BOUND = 3e-6


def inputs(T: int = 70, heads: int = 4, groups: int = 2, batch: int = 2, P: int = 6, N: int = 8) -> list[torch.Tensor]:
    """q, k, v, log α, β, S. Keys of length 1; decays from nearly none to nearly all, β from 0 to 2."""
    draw = torch.Generator().manual_seed(T)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    q, k = (F.normalize(randn(batch, T, groups, N), dim=-1) for _ in "qk")
    log_alpha = -torch.logspace(-3, 1, heads) * F.softplus(randn(batch, T, heads))
    beta = 2 * randn(batch, T, heads).sigmoid()
    return [q, k, randn(batch, T, heads, P), log_alpha, beta, randn(batch, heads, P, N)]


def at(given: list[torch.Tensor], *places: slice) -> list[torch.Tensor]:
    """These tokens of q, k, v, log α and β."""
    return [x[:, place] for x in given[:5] for place in places]


def numpy_recurrence(q, k, v, log_alpha, beta, S, begins=None):
    """Eq. 10 of the paper as it stands, with the matrix I − β k kᵀ made, a head at a time, in float64."""
    q, k, v, log_alpha, beta, S = (x.double().numpy().copy() for x in (q, k, v, log_alpha, beta, S))
    o = np.zeros_like(v)
    for b, t, head in np.ndindex(*v.shape[:3]):
        group = head * k.shape[2] // v.shape[2]
        if begins is not None and begins[b, t]:
            S[b, head] = 0
        key, rate = k[b, t, group], beta[b, t, head]
        transition = np.exp(log_alpha[b, t, head]) * (np.eye(len(key)) - rate * np.outer(key, key))
        S[b, head] = S[b, head] @ transition + rate * np.outer(v[b, t, head], key)
        o[b, t, head] = S[b, head] @ q[b, t, group]
    return torch.from_numpy(o), torch.from_numpy(S)


@pytest.mark.parametrize("form", FORMS, ids=NAMES)
@pytest.mark.parametrize("T", [1, 7, 8, 9, 63, 64, 65, 131])
@pytest.mark.parametrize("heads, groups", [(4, 1), (4, 2), (3, 3)])
def test_the_recurrence_of_the_paper(heads, groups, T, form):
    given = inputs(T, heads, groups)
    begins = torch.rand(2, T, generator=torch.Generator().manual_seed(0)) < 0.1
    for starts in (None, begins):
        for ours, reference in zip(form(*given, starts), numpy_recurrence(*given, starts), strict=True):
            assert difference(ours.double(), reference) < BOUND


@pytest.fixture
def float64(monkeypatch):
    """What is reckoned in float32 is reckoned in float64."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@pytest.mark.parametrize("form", FORMS, ids=NAMES)
@pytest.mark.parametrize("T", [7, 70, 131])
def test_in_float64_all_forms_are_one(form, T, float64):
    given = [x.double() for x in inputs(T)]
    for ours, reference in zip(form(*given), numpy_recurrence(*given), strict=True):
        assert (ours - reference).abs().max() < 1e-13 * reference.abs().max()


@pytest.mark.parametrize("form", FORMS, ids=NAMES)
@pytest.mark.parametrize("theirs", [torch_chunk_gated_delta_rule, torch_recurrent_gated_delta_rule])
@pytest.mark.parametrize("T", [1, 33, 80])
def test_transformers(T, theirs, form):
    """Whose state is the transpose of ours, and which divides q by √N."""
    q, k, v, log_alpha, beta, S = inputs(T)
    o, last = theirs(q * math.sqrt(8), k, v, log_alpha, beta, initial_state=S.mT, output_final_state=True)
    ours, state = form(q, k, v, log_alpha, beta, S)
    assert difference(ours, o) < BOUND and difference(state, last.mT) < BOUND


@pytest.mark.parametrize("form", FORMS, ids=NAMES)
def test_any_split_gives_the_whole(form):
    given, begins = inputs(90), torch.rand(2, 90, generator=torch.Generator().manual_seed(1)) < 0.05
    whole, last = form(*given, begins)
    S, parts = given[5], []
    for a, b in ((0, 1), (1, 40), (40, 41), (41, 90)):
        o, S = form(*at(given, slice(a, b)), S, begins[:, a:b])
        parts.append(o)
    assert difference(torch.cat(parts, 1), whole) < BOUND and difference(S, last) < BOUND


@pytest.mark.parametrize("form", FORMS, ids=NAMES)
def test_documents_do_not_see_each_other(form):
    given, begins = inputs(70), torch.zeros(2, 70, dtype=torch.bool)
    begins[:, [0, 5, 30]] = True
    o, last = form(*given, begins)
    for a, b in ((0, 5), (5, 30), (30, 70)):
        alone, end = form(*at(given, slice(a, b)), torch.zeros_like(given[5]))
        assert difference(o[:, a:b], alone) < BOUND
    assert difference(last, end) < BOUND
    given[2][:, :30] += 1                                               # the past is not only small but gone
    assert torch.equal(form(*given, begins)[0][:, 30:], o[:, 30:])


@pytest.mark.parametrize("form", FORMS, ids=NAMES)
def test_what_is_written_whole_is_read_whole(form):
    """With α = β = 1 the state answers the last key with the last value, and the keys at right angles as before."""
    q, k, v, log_alpha, beta, S = inputs(40, groups=4)
    o, last = form(k, k, v, torch.zeros_like(log_alpha), torch.ones_like(beta), S)
    assert difference(o, v) < BOUND
    axes = torch.eye(8)[torch.arange(40) % 4].expand(2, 4, 40, 8).transpose(1, 2)       # the first four axes in turn
    o, last = form(axes, axes, v, torch.zeros_like(log_alpha), torch.ones_like(beta), S)
    assert difference(last[..., 4:], S[..., 4:]) < BOUND
    assert difference(last[..., :4], v[:, 36:].permute(0, 2, 3, 1)) < BOUND


@pytest.mark.parametrize("form", FORMS, ids=NAMES)
def test_no_step_at_all_leaves_the_state(form):
    q, k, v, log_alpha, beta, S = inputs(70)
    o, last = form(q, k, v, torch.zeros_like(log_alpha), torch.zeros_like(beta), S)
    read = torch.einsum("bhpn,bthn->bthp", S, q.repeat_interleave(2, 2))
    assert difference(last, S) < 1e-6 and difference(o, read) < BOUND


@pytest.mark.parametrize("form", FORMS, ids=NAMES)
def test_a_token_that_forgets_all_does_not_blur_those_behind_it(form):
    given = inputs(70)
    given[3][:, 3], given[3][0, 20], given[3][1, 40] = -1e4, -1e7, -3e38
    leaves = [x.clone().requires_grad_() for x in given]
    results = form(*leaves)
    for ours, reference in zip(results, numpy_recurrence(*given), strict=True):
        assert difference(ours.detach().double(), reference) < BOUND
    gradients = torch.autograd.grad(sum(x.square().sum() for x in results), leaves)
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_long_memory_of_equal_keys():
    """3000 tokens that nearly agree on one key, and hardly any decay: the worst conditioned system there can be."""
    given = inputs(3000, heads=2, groups=1, P=2, N=3)
    given[1] = F.normalize(torch.ones(3) + 0.01 * given[1], dim=-1)
    given[3] = torch.full_like(given[3], -1e-5)
    for ours, reference in zip(delta_rule(*given), numpy_recurrence(*given), strict=True):
        assert difference(ours.double(), reference) < 1e-5


def test_gradients_of_both_forms_agree(float64):
    given, begins = inputs(70), torch.rand(2, 70, generator=torch.Generator().manual_seed(2)) < 0.05
    gradients = []
    for form in (delta_rule_sequential, delta_rule_chunked):
        leaves = [x.double().requires_grad_() for x in given]
        o, S = form(*leaves, begins)
        gradients.append(torch.autograd.grad((o * o.detach().cos()).sum() + (S * S.detach().sin()).sum(), leaves))
    for sequential, chunked in zip(*gradients, strict=True):
        assert (sequential - chunked).abs().max() < 1e-11 * sequential.abs().max()


def test_gradients_are_those_of_differences(float64):
    given = [x.double().requires_grad_() for x in inputs(5, 2, 1, 1, 2, 3)]
    assert torch.autograd.gradcheck(lambda *leaves: delta_rule_chunked(*leaves, chunk=4), given)


@pytest.mark.parametrize(
    "T, form", [(CHUNKED_FROM - 1, "delta_rule_sequential"), (CHUNKED_FROM, "delta_rule_chunked")]
)
def test_the_form_follows_the_length(T, form, monkeypatch):
    monkeypatch.setattr(module, form, lambda *given: form)
    assert delta_rule(*inputs(T)) == form


@pytest.mark.parametrize("form", FORMS, ids=NAMES)
def test_narrow_inputs_are_reckoned_in_float32(form):
    q, k, v, log_alpha, beta, S = inputs(70)
    q, k, v, beta = q.bfloat16(), k.bfloat16(), v.bfloat16(), beta.bfloat16()
    o, last = form(q, k, v, log_alpha, beta, S)
    wide, same = form(q.float(), k.float(), v.float(), log_alpha, beta.float(), S)
    assert o.dtype == torch.bfloat16 and torch.equal(o, wide.bfloat16())
    assert last.dtype == torch.float32 and torch.equal(last, same)


# ---- the mixers

def test_the_norm_and_its_gate_round_as_transformers(monkeypatch):
    """Bit for bit in bfloat16: what follows the delta rule, up to the last projection."""
    mixer, seen = GatedDeltaNet(GatedDeltaNetConfig(4, 2, 16, 8, 4, eps=1e-3), 24).bfloat16(), {}
    theirs = Qwen3NextRMSNormGated(16, eps=1e-3).bfloat16()
    for p in mixer.parameters():
        torch.nn.init.normal_(p)
    theirs.weight.data.copy_(mixer.norm.gain)
    x, o = torch.randn(2, 5, 24).bfloat16(), torch.randn(2, 5, 4, 16).bfloat16()
    monkeypatch.setattr("nanollm.layers.gated_delta_net.delta_rule", lambda *given: (o, given[5]))
    mixer.out_proj.register_forward_hook(lambda _, given, out: seen.update(y=given[0]))
    mixer(x, ForwardContext(torch.arange(5).expand(2, 5), True, torch.bfloat16))
    assert torch.equal(seen["y"], theirs(o, mixer.z(x).unflatten(-1, (4, 16))).flatten(-2))


def test_first_values():
    mixer = GatedDeltaNetConfig(64, 32, 4, 8, 4)
    p = dict(Decoder(ModelConfig(30, 32, (Layer(mixer, None, pre_ffn=None),))).layers[0].mixer.named_parameters())
    decay, step = p["A_log"].exp(), F.softplus(p["dt_bias"])
    assert 1 <= decay.min() < 3 and 14 < decay.max() <= 16 and 0.00099 <= step.min() and step.max() <= 0.101
    assert (p["norm.gain"] == 1).all() and p["conv1d.weight"].abs().max() <= 0.5


@pytest.mark.parametrize("fields", [dict(alibi=None, sinks=True), dict(softcap=3.0)])
def test_attention_that_cannot_be_gated(fields):
    with pytest.raises(ConfigError, match="GatedAttention.attention = .*no alibi, sinks or softcap"):
        GatedAttentionConfig(attention(**fields))


def test_heads_that_do_not_share_keys_evenly():
    with pytest.raises(ConfigError, match=r"GatedDeltaNet.key_heads = 3: expected a divisor of heads \(4\)"):
        GatedDeltaNetConfig(4, 3, 8, 8, 4)
