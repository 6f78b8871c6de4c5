"""The loss of a step does not depend on how the step is cut, and its parts are what their papers say."""

import math

import pytest
import torch
from torch.nn import functional as F
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from nanollm.config import MLP, Attention, ClippedGLU, ExpertGroups, Layer, ModelConfig, MoE, Norm, Rope
from nanollm.layers.moe import routing
from nanollm.model import Decoder, Head
from nanollm.training import cross_entropy
from nanollm.training.losses import Balance, spike, token_loss


def head(**fields) -> Head:
    made = Head(ModelConfig(50, 8, (Layer(Attention(2, 1, 8), None, pre_ffn=None),), **fields))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made


@pytest.mark.parametrize("piece", [2**26, 150])                 # all at once, and in pieces of 3 rows
def test_the_sums_are_those_of_torch_and_leave_out_what_is_no_target(piece, monkeypatch):
    monkeypatch.setattr(cross_entropy, "PIECE", piece)
    read, hidden, targets = head(), torch.randn(2, 7, 8, requires_grad=True), torch.randint(0, 50, (2, 7))
    targets[0, 2:5] = -100
    loss, nats, squares = token_loss(read, hidden, targets, z=0.1)
    logits = F.linear(hidden.detach(), read.weight).flatten(0, 1).double()
    assert nats.item() == pytest.approx(F.cross_entropy(logits, targets.flatten(), reduction="sum").item(), rel=1e-6)
    real = targets.flatten() >= 0
    assert squares.item() == pytest.approx(logits.logsumexp(-1).square()[real].sum().item(), rel=1e-6)
    assert (
        loss.item() == pytest.approx(nats.item() + 0.1 * squares.item(), rel=1e-6)
        and not nats.requires_grad
        and not squares.requires_grad
    )


@pytest.mark.parametrize("z", [0.0, 0.1])
def test_the_gradient_is_that_of_the_equation(z):
    read, hidden, targets = head(), torch.randn(2, 7, 8, requires_grad=True), torch.randint(0, 50, (2, 7))
    targets[1, :3] = -100
    found = torch.autograd.grad(token_loss(read, hidden, targets, z)[0], hidden)[0]
    logits = F.linear(hidden.double(), read.weight.double())
    log_z, real = logits.logsumexp(-1), targets >= 0
    nats = log_z - logits.gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
    expected = torch.autograd.grad(((nats + z * log_z.square()) * real).sum(), hidden)[0]
    assert torch.allclose(found, expected, atol=1e-5) and expected.abs().max() > 0.1


@pytest.mark.parametrize("fields", [
    dict(head_bias=True), dict(head_scale=0.3), dict(head_softcap=2.0), dict(unit_head=True),
    dict(head_bias=True, head_scale=0.3, head_softcap=2.0, unit_head=True)], ids=str)
def test_whatever_the_head_does_the_loss_is_that_of_its_logits(fields):
    read, hidden, targets = head(**fields), torch.randn(2, 7, 8, requires_grad=True), torch.randint(0, 50, (2, 7))
    wanted = [hidden, *read.parameters()]
    loss, nats, _ = token_loss(read, hidden, targets)
    expected = F.cross_entropy(read(hidden).flatten(0, 1), targets.flatten(), reduction="sum")
    assert nats.item() == pytest.approx(expected.item(), rel=1e-5)
    assert nats.item() != pytest.approx(
        F.cross_entropy(F.linear(hidden, read.weight).flatten(0, 1), targets.flatten(), reduction="sum").item(),
        rel=1e-3,
    )
    for one, other in zip(torch.autograd.grad(loss, wanted), torch.autograd.grad(expected, wanted), strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def test_pieces_change_neither_loss_nor_gradient(monkeypatch):
    read, hidden, targets = head(), torch.randn(2, 7, 8, requires_grad=True), torch.randint(0, 50, (2, 7))
    targets[0, 3:5] = -100
    found = []
    for piece in (2**26, 150):
        monkeypatch.setattr(cross_entropy, "PIECE", piece)
        loss, nats, squares = token_loss(read, hidden, targets, z=0.1)
        found.append((nats, squares, *torch.autograd.grad(loss, [hidden, read.weight])))
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(*found, strict=True))


def test_bfloat16_logits_are_summed_in_float32():
    read, hidden, targets = head().bfloat16(), torch.randn(1, 64, 8).bfloat16(), torch.randint(0, 50, (1, 64))
    _, nats, _ = token_loss(read, hidden, targets)
    expected = F.cross_entropy(F.linear(hidden, read.weight).double().flatten(0, 1), targets.flatten(), reduction="sum")
    assert nats.dtype == torch.float32 and nats.item() == pytest.approx(expected.item(), rel=1e-6)


# ---- balance

def mixtral(experts: int = 6, top_k: int = 2) -> Decoder:
    layer = Layer(
        Attention(2, 1, 8, Rope()), MoE(experts, top_k, MLP(16), renormalize=True), pre_mixer=Norm(), pre_ffn=Norm()
    )
    model = Decoder(ModelConfig(40, 16, (layer, layer), Norm()))
    for block in model.layers:
        torch.nn.init.normal_(block.ffn.router.weight)          # loud: the experts are far from evenly used
    return model


def plain_total(*values: float) -> list[float]:
    return list(values)


def step(model: Decoder, balance: Balance, parts: list[torch.Tensor], real: list[torch.Tensor | None]) -> torch.Tensor:
    """Gradient of the balance loss of a step that is cut into parts."""
    model.zero_grad()
    for tokens, mask in zip(parts, real, strict=True):
        with routing(model) as routed:
            model.hidden(tokens)
        balance.loss(routed, mask).backward()
    return torch.cat([block.ffn.router.weight.grad.flatten() for block in model.layers])


def test_what_is_logged_is_equation_4_of_fedus_over_the_whole_step():
    model, tokens = mixtral(), torch.randint(0, 40, (4, 10))
    balance = Balance(model)
    step(model, balance, [tokens[:1], tokens[1:]], [None, None])
    with routing(model) as routed:
        model.hidden(tokens)
    each = [load_balancing_loss_func((one.logits,), 6, 2).item() for one in routed]         # transformers' own
    assert balance.close(plain_total) == pytest.approx(sum(each) / 2, rel=1e-6)
    assert max(each) > 2.1                                                      # 2 = top_k would be even


def test_any_cut_of_a_step_has_the_same_gradients_in_the_next_step_too():
    model, tokens = mixtral(), torch.randint(0, 40, (4, 10))
    found = []
    for cuts in ([4], [1, 3], [1, 1, 1, 1]):
        balance = Balance(model)
        gradients = []
        for _ in range(2):
            parts = tokens.split(cuts)
            gradients.append(step(model, balance, parts, [None] * len(parts)))
            balance.close(plain_total)
        found.append(gradients)
    assert found[0][1].abs().max() > 0.1
    for other in found[1:]:
        assert torch.allclose(other[0], found[0][0], atol=1e-5) and torch.allclose(other[1], found[0][1], atol=1e-5)


def test_the_gradient_is_that_of_the_equation_with_the_price_of_the_step_before():
    model, first, second = mixtral(), torch.randint(0, 40, (2, 10)), torch.randint(0, 40, (3, 10))
    balance = Balance(model)
    step(model, balance, [first], [None])
    balance.close(plain_total)
    with routing(model) as routed:
        model.hidden(first)
    price = [F.one_hot(one.logits.topk(2).indices, 6).sum(1).double().mean(0) for one in routed]
    found = step(model, balance, [second], [None])
    model.zero_grad()
    with routing(model) as routed:
        model.hidden(second)
    loss = sum(6 * (f * one.logits.double().softmax(-1).sum(0)).sum() for f, one in zip(price, routed, strict=True)) / 2
    loss.backward()
    assert torch.allclose(
        found, torch.cat([block.ffn.router.weight.grad.flatten() for block in model.layers]), atol=1e-4
    )


ROUTERS = {
    "a corrected choice among sigmoids of groups": MoE(
        8, 3, MLP(16), True, score="sigmoid", correction=True, groups=ExpertGroups(4, 2, 2), scale=2.5
    ),
    "softmax in groups": MoE(8, 3, MLP(16), False, groups=ExpertGroups(4, 2, 1), router_float32=True),
    "sparse": MoE(8, 2, MLP(16), False, sparse=0.1),
    "clipped experts": MoE(8, 3, ClippedGLU(16), True, router_bias=True),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_balance_counts_what_the_router_chose(name):
    """f is of the router's own choice, whatever decides it; P of the scores, as shares of their sum where they
    are sigmoids (V3's eq. 17-20)."""
    moe = ROUTERS[name]
    layer = Layer(Attention(2, 1, 8, Rope()), moe, pre_mixer=Norm(), pre_ffn=Norm())
    model, tokens = Decoder(ModelConfig(40, 16, (layer, layer), Norm())), torch.randint(0, 40, (4, 10))
    for block in model.layers:
        torch.nn.init.normal_(block.ffn.router.weight)
        if moe.correction:
            torch.nn.init.normal_(block.ffn.router.correction)
    balance = Balance(model)
    found = step(model, balance, [tokens], [None])
    assert found.abs().max() > 0 and all(
        block.ffn.router.correction is None or block.ffn.router.correction.grad is None for block in model.layers
    )
    seen = []
    hooks = [
        block.ffn.experts.register_forward_hook(lambda _, args, __: seen.append(args[2])) for block in model.layers
    ]  # what the experts were given
    with routing(model) as routed:
        model.hidden(tokens)
    [hook.remove() for hook in hooks]
    expected = []
    for (logits, _, _), chosen in zip(routed, seen, strict=True):
        score = logits.double().sigmoid() if moe.score == "sigmoid" else logits.double().softmax(-1)
        share = (score / score.sum(-1, keepdim=True)).mean(0)
        counts = torch.bincount(chosen.flatten(), minlength=8) / len(chosen)
        expected.append(8 * (counts * share).sum().item())
    assert balance.close(plain_total) == pytest.approx(sum(expected) / 2, rel=1e-5)


def test_padding_is_not_counted():
    model, tokens = mixtral(), torch.randint(0, 40, (2, 10))
    real = torch.ones(2, 10, dtype=torch.bool)
    real[:, 6:] = False
    padded, short = Balance(model), Balance(model)
    a = step(model, padded, [tokens], [real.flatten()])
    b = step(model, short, [tokens[:, :6]], [None])
    assert torch.allclose(a, b, atol=1e-5) and padded.tokens == short.tokens == 12
    assert padded.close(plain_total) == pytest.approx(short.close(plain_total), rel=1e-6)


def test_training_with_it_evens_the_load():
    model, tokens = mixtral(), torch.randint(0, 40, (8, 16))
    balance, optimizer = Balance(model), torch.optim.SGD([block.ffn.router.weight for block in model.layers], lr=0.3)
    seen = []
    for _ in range(60):
        step(model, balance, [tokens], [None])
        for block in model.layers:
            block.ffn.router.weight.grad /= tokens.numel()
        optimizer.step()
        seen.append(balance.close(plain_total))
    assert seen[0] > 2.1 and seen[-1] < 1 + (seen[0] - 1) * 0.9 and seen[-1] < seen[0]


def test_a_model_without_experts_has_no_balance():
    layer = Layer(Attention(2, 1, 8, Rope()), MLP(16), pre_mixer=Norm(), pre_ffn=Norm())
    assert Balance(Decoder(ModelConfig(40, 16, (layer,), Norm()))).close(plain_total) == 0.0


# ---- spikes

def test_a_spike_is_measured_against_the_recent_steps():
    recent = [(2.0 + 0.1 * (-1) ** i, 1.0 + 0.2 * (-1) ** i) for i in range(128)]  # deviations 0.1 and 0.2
    assert (
        not spike(recent, 2.59, 2.1, sigma=6)
        and spike(recent, 2.61, 1.0, sigma=6)
        and spike(recent, 2.0, 2.21, sigma=6)
    )
    assert not spike(recent, 100.0, 100.0, sigma=0)             # 0: never
    assert not spike(recent[:31], 100.0, 100.0, sigma=6) and spike(recent[:32], 100.0, 100.0, sigma=6)
    assert not spike(recent, -100.0, 0.0, sigma=6) and math.isfinite(recent[0][0])
