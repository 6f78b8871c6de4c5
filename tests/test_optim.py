"""Muon is torch's, every parameter has one owner, and the rate is the curve it is called by."""

import dataclasses
import math

import pytest
import torch

from nanollm.config import Attention, ClippedGLU, Layer, ModelConfig, MoE, Norm
from nanollm.model import Decoder
from nanollm.presets import PRESETS, preset
from nanollm.training import optim

TOYS = [name for name in PRESETS if name.endswith("-toy")]
AROUND = dict(positions=32, embed_norm=Norm("layer", bias=True), head_bias=True)  # what may stand around the layers


@pytest.mark.parametrize("shape", [(24, 24), (40, 12), (12, 40)])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_muon_is_that_of_torch(shape, decay):
    """Both with products in bfloat16, which is all that torch has."""
    start, gradients = torch.randn(shape), torch.randn(5, *shape)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    a = optim.Muon([ours], decay, torch.bfloat16)
    optim.init_state([a])
    b = torch.optim.Muon([theirs], lr=0.02, weight_decay=decay, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    for gradient in gradients:
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        optim.step([a], 0.02)
        b.step()
    moved = (theirs - start).abs().max()
    assert (ours - theirs).abs().max() < 0.02 * moved           # bfloat16 has 8 bits, and five rounds of products
    assert torch.equal(a.state[ours]["momentum"], b.state[theirs]["momentum_buffer"])


def test_msign_is_the_orthogonal_factor_of_an_svd_up_to_the_polynomials_slack():
    matrix = torch.randn(20, 50, dtype=torch.float64)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    found = optim.msign(matrix, torch.float64)
    assert torch.allclose(optim.msign(matrix.mT, torch.float64), found.mT)
    inside = torch.linalg.svdvals(found)  # the polynomial sends singular values into about [0.7, 1.2]
    assert 0.6 < inside.min() and inside.max() < 1.25
    turned = u.mT @ found @ v.mT
    assert (turned - torch.diag(turned.diag())).abs().max() < 1e-6              # the same singular vectors


def test_in_bfloat16_a_cpu_rounds_once():
    matrix = torch.randn(20, 50)
    assert torch.equal(optim.msign(matrix, torch.bfloat16), optim.msign(matrix, torch.float32).bfloat16())


def test_a_stack_of_experts_is_each_of_its_matrices():
    stack = torch.randn(3, 10, 16)
    found = optim.msign(stack, torch.float32)
    assert all(torch.allclose(found[i], optim.msign(stack[i], torch.float32), atol=1e-5) for i in range(3))


@pytest.mark.parametrize("batch, products", [(1, 8), (2 * 24 * 40, 5), (2**24, 3)])
def test_matrices_of_one_shape_share_a_product_and_step_as_each_would_alone(monkeypatch, batch, products):
    """Wide ones and tall ones together; a product holds `batch` numbers at most, but for a single matrix."""
    shapes = [(24, 40), (16, 16), (24, 40), (40, 24), (3, 10, 16), (40, 24), (24, 40), (3, 16, 10)]
    start = [(torch.randn(shape), torch.randn(shape)) for shape in shapes]
    calls, msign = [], optim.msign
    monkeypatch.setattr(optim, "msign", lambda matrix, dtype: calls.append(matrix.shape) or msign(matrix, dtype))
    monkeypatch.setattr(optim, "BATCH", batch)

    def step(parameters: list[torch.nn.Parameter]) -> None:
        muon = optim.Muon(parameters, 0.1, torch.float32)
        optim.init_state([muon])
        optim.step([muon], 0.02)

    found = []
    for together in (True, False):
        parameters = [torch.nn.Parameter(weight.clone()) for weight, _ in start]
        for parameter, (_, gradient) in zip(parameters, start, strict=True):
            parameter.grad = gradient.clone()
        for part in [parameters] if together else [[p] for p in parameters]:
            step(part)
        if together:
            assert len(calls) == products and sum(shape[0] for shape in calls) == len(shapes)
        found.append(parameters)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("around", [{}, AROUND], ids=["", "around"])
@pytest.mark.parametrize("name", TOYS)
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_every_parameter_has_one_owner_and_only_matrices_decay(name, optimizer, around):
    model = Decoder(dataclasses.replace(preset(name), **around))
    groups = [(o, group) for o in optim.build(model, optimizer, 0.1, torch.float32) for group in o.param_groups]
    owned = [p for _, group in groups for p in group["params"]]
    assert len({*map(id, owned)}) == len(owned) and {*map(id, owned)} == {*map(id, model.parameters())}
    names = {id(p): n for n, p in model.named_parameters()}
    for owner, group in groups:
        for p in group["params"]:
            matrix = names[id(p)].split(".")[-2 if names[id(p)].endswith("weight") else -1]
            inside = (
                matrix
                in ("q", "k", "v", "o", "gate", "up", "down", "router", "in_proj", "x_proj", "dt_proj", "out_proj")
                and p.ndim > 1
            )
            assert isinstance(owner, optim.Muon) == (inside and optimizer == "muon"), names[id(p)]
            assert (group["weight_decay"] > 0) == (inside or matrix in ("embed", "positions", "head")), names[id(p)]
            assert group["lr_scale"] == (8.0 if optimizer == "muon" and not inside else 1.0)


def test_stacked_biases_and_corrections_are_no_matrices():
    moe = MoE(4, 2, ClippedGLU(24), True, router_bias=True, correction=True)
    model = Decoder(ModelConfig(20, 16, (Layer(Attention(2, 1, 8), moe),)))
    muon, adamw = optim.build(model, "muon", 0.1, torch.float32)
    names = {id(p): name.removeprefix("layers.0.ffn.") for name, p in model.named_parameters() if ".ffn." in name}
    def owned(groups):
        return {names[id(p)] for group in groups for p in group["params"] if id(p) in names}
    assert owned(muon.param_groups) == {"router.weight", "experts.gate", "experts.up", "experts.down"}
    assert owned(group for group in adamw.param_groups if group["weight_decay"] == 0) == {
        "router.bias", "router.correction", "experts.gate_bias", "experts.up_bias", "experts.down_bias"}


def test_state_made_beforehand_is_what_the_first_step_would_make():
    """So a run that has prepared it takes the very steps of one that has not."""
    found = []
    for prepared in (True, False):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(6, 5))
        o = optim.adamw([{"params": [p], "weight_decay": 0.1, "lr_scale": 1.0}])
        if prepared:
            optim.init_state([o])
        for _ in range(3):
            p.grad = torch.randn(6, 5)
            optim.step([o], 0.1)
        found.append((p.detach(), o.state[p]))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1].keys() == found[1][1].keys()
    assert all(torch.equal(found[0][1][key], found[1][1][key]) for key in found[0][1])


def test_all_that_a_step_changes_has_a_name():
    model = Decoder(preset("mixtral", 300, 32))
    optimizers = optim.build(model, "muon", 0.0, torch.float32)
    named, before = optim.tensors(model, optimizers), {}
    before = {name: tensor.clone() for name, tensor in named.items()}
    model(torch.randint(0, 300, (2, 16))).sum().backward()
    optim.step(optimizers, 0.1)
    after = optim.tensors(model, optimizers)
    assert before.keys() == after.keys()
    assert {name for name in after if torch.equal(before[name], after[name])} <= {
        f"model.layers.{i}.ffn.experts.{part}" for i in range(4) for part in ("gate", "up", "down")
    }
    assert len(after) == len(list(model.parameters())) + sum(
        len(memory) for o in optimizers for memory in o.state.values()
    )


# ---- the rate

def curve(schedule: str, steps: int = 100, warmup: int = 10, decay: float = 0.2) -> list[float]:
    return [optim.lr_factor(step, steps, warmup, schedule, decay) for step in range(steps)]


@pytest.mark.parametrize("schedule", optim.SCHEDULES)
def test_the_rate_rises_in_a_line_and_ends_just_above_zero(schedule):
    rates = curve(schedule)
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)]) and max(rates) == rates[9] == 1.0
    assert rates[9:] == sorted(rates[9:], reverse=True) and 0 < rates[-1] < 0.06
    assert optim.lr_factor(0, 100, 0, schedule) == 1.0 and curve(schedule, warmup=0)[0] == 1.0


def test_each_curve_has_its_shape():
    linear, cosine, wsd = (curve(schedule) for schedule in ("linear", "cosine", "wsd"))
    assert linear[9:] == pytest.approx([(100 - s) / 91 for s in range(9, 100)])
    assert cosine[9:] == pytest.approx([0.5 + 0.5 * math.cos(math.pi * (s - 9) / 91) for s in range(9, 100)])
    assert wsd[9:81] == [1.0] * 72 and wsd[80:] == pytest.approx([(100 - s) / 20 for s in range(80, 100)])


def test_a_warm_up_as_long_as_the_run_is_no_error():
    for schedule in optim.SCHEDULES:
        assert all(0 <= rate <= 1 for rate in curve(schedule, steps=5, warmup=20))


@pytest.mark.parametrize("schedule, theirs", [
    ("cosine", lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=91, eta_min=0.3)),
    ("linear", lambda o: torch.optim.lr_scheduler.LinearLR(o, start_factor=1, end_factor=0.1, total_iters=91)),
])
def test_a_rate_that_ends_at_a_minimum_is_the_curve_of_torch(schedule, theirs):
    """From where the warm-up ends; the peak is 3 and the minimum 0.3."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3.0)
    scheduler, expected = theirs(optimizer), []
    for _ in range(91):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    found = [3 * optim.lr_factor(step, 100, 10, schedule, least=0.1) for step in range(100)]
    assert found[9:] == pytest.approx(expected) and found[0] == pytest.approx(0.3 * 1)
    assert optim.lr_factor(99, 100, 10, "wsd", least=0.1) == pytest.approx(0.1 + 0.9 / 20)


def test_betas_are_those_of_torch():
    start, gradients = torch.randn(6, 5), torch.randn(4, 6, 5)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    a = optim.adamw([{"params": [ours], "weight_decay": 0.1, "lr_scale": 1.0}], (0.8, 0.99))
    b = torch.optim.AdamW([theirs], lr=0.01, betas=(0.8, 0.99), weight_decay=0.1, fused=True)
    optim.init_state([a])
    for gradient in gradients:
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        optim.step([a], 0.01)
        b.step()
    assert torch.equal(ours, theirs)
    model = Decoder(preset("llama", 300, 32))
    for name in ("adamw", "muon"):
        groups = optim.build(model, name, 0.0, torch.float32, (0.8, 0.99))[-1].param_groups
        assert all(group["betas"] == (0.8, 0.99) for group in groups)
