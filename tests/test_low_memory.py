"""GaLore and BAdam take the steps of their authors' packages, AdamW in 8 bits those of AdamW nearly; and whole runs."""

import json
import math
import warnings

import pytest
import torch

from nanollm.errors import InputError
from nanollm.model import Decoder
from nanollm.presets import preset
from nanollm.training import adamw8bit, low_memory, optim
from nanollm.training.badam import STATE, BAdam, blocks
from nanollm.training.galore import GaLore
from nanollm.training.options import parse
from tests.fixtures import slow_but
from tests.test_freezing import QUICK, base, shards, weights
from tests.test_train import log_of, losses_of, run, run_in_two

__all__ = ["base", "shards"]                                                    # fixtures
BETAS = (0.9, 0.95)
SHAPES = [(24, 40), (40, 24), (32, 32)]


def test_galore_takes_the_steps_of_its_authors():
    """Ten, with three subspaces: one matrix is wide, one tall, one square."""
    theirs = pytest.importorskip("galore_torch")
    start = [0.001 * torch.randn(shape) for shape in SHAPES]            # small: a step is seen to more digits
    gradients = [[torch.randn(shape) for shape in SHAPES] for _ in range(10)]
    ours, others = ([torch.nn.Parameter(w.clone()) for w in start] for _ in range(2))
    a = GaLore(ours, 0.0, BETAS, rank=6, every=4, scale=0.25)
    b = theirs.GaLoreAdamW([{"params": others, "rank": 6, "update_proj_gap": 4, "scale": 0.25, "proj_type": "std"}],
                           lr=0.01, betas=BETAS, eps=1e-8, no_deprecation_warning=True)
    for step in gradients:
        for parameters in (ours, others):
            for p, g in zip(parameters, step, strict=True):
                p.grad = g.clone()
        optim.step([a], 0.01)
        b.step()
    for mine, other, first in zip(ours, others, start, strict=True):
        assert (mine - other).abs().max() < 1e-5 * (other - first).abs().max()
        assert (a.state[mine]["exp_avg"] - tall(b.state[other]["exp_avg"])).abs().max() < 1e-6


def tall(average: torch.Tensor) -> torch.Tensor:
    return average.T if average.shape[0] < average.shape[1] else average


def test_galore_at_full_rank_is_adamw_turned_and_a_stack_is_its_matrices():
    """The whole space is a subspace too; where G is diagonal its vectors are the axes, and the step is AdamW's."""
    w, g = torch.randn(5, 5), torch.diag(torch.tensor([5.0, 4, 3, 2, 1]))
    ours, theirs = (torch.nn.Parameter(w.clone()) for _ in range(2))
    a, b = GaLore([ours], 0.1, BETAS, rank=5, every=2, scale=1.0), torch.optim.AdamW(
        [theirs], lr=0.01, betas=BETAS, weight_decay=0.1)
    for scale in (1.0, 0.3, 2.0):
        ours.grad, theirs.grad = scale * g, scale * g
        optim.step([a], 0.01)
        b.step()
    assert torch.allclose(ours, theirs, atol=1e-7) and not torch.equal(ours, w)
    stack, grads = torch.randn(3, 10, 16), torch.randn(3, 10, 16)
    found = []
    for parts in ([stack], list(stack)):
        parameters = [torch.nn.Parameter(part.clone()) for part in parts]
        for p, g in zip(parameters, [grads] if len(parts) == 1 else grads, strict=True):
            p.grad = g.clone()
        optim.step([GaLore(parameters, 0.0, BETAS, rank=4, every=1, scale=1.0)], 0.01)
        found.append(torch.stack([*parameters]).view_as(stack))
    assert torch.allclose(*found, atol=1e-6)


def test_badam_takes_the_steps_of_its_authors():
    """14 steps of a toy Llama, three a block, in the order of the layers, on one gradient: where it is nearly 0, Adam's
    first step in a block has its sign alone. The same parameters have one, too. Their first block has a step less than
    the others (their count begins at 0 and is compared as count + 1): it is given back."""
    theirs = pytest.importorskip("badam")
    model, other = (Decoder(preset("llama", 300, 32), seed=1) for _ in range(2))
    named = [*other.named_parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                                 # they expect weights in 16 bits
        outer = theirs.BlockOptimizer(
            torch.optim.AdamW([p for _, p in named], lr=0.01, betas=BETAS, weight_decay=0.0), named,
            [*([f"layers.{i}."] for i in range(4)), ["embed.weight", "head.weight"]],
            switch_block_every=3, switch_mode="ascending", verbose=0)
    outer.global_step = -1
    model.norm.gain.requires_grad_(False)
    ours = BAdam([{"params": [*model.parameters()], "weight_decay": 0.0, "lr_scale": 1.0}], BETAS, blocks(model), 3)
    ours.begin()
    for step in range(14):
        tokens = torch.randint(0, 300, (2, 16))
        for each in (model, other):
            torch.nn.functional.cross_entropy(each(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        for (name, p), (_, q) in zip(model.named_parameters(), named, strict=True):
            assert (p.grad is None) == (q.grad is None) == (f"layers.{step // 3}." not in name and (
                step < 12 or name not in ("embed.weight", "head.weight"))), (step, name)
            p.grad = None if q.grad is None else q.grad.clone()
        optim.step([ours], 0.01)
        outer.step()
        model.zero_grad()
    assert all((p - q).abs().max() < 1e-6 for p, (_, q) in zip(model.parameters(), named, strict=True))
    assert ours.state[STATE]["exp_avg"].numel() == max(sum(p.numel() for p in block) for block in ours.blocks)


def test_adamw_in_8_bits_is_that_of_bitsandbytes_and_adamw_nearly():
    bnb = pytest.importorskip("bitsandbytes")
    start, gradients = torch.randn(96, 64), torch.randn(10, 96, 64)
    ours, theirs, whole = (torch.nn.Parameter(start.clone()) for _ in range(3))
    group = {"weight_decay": 0.1, "lr_scale": 1.0}
    a = adamw8bit.adamw8bit([{"params": [ours], **group}], BETAS)
    b = bnb.optim.AdamW8bit([theirs], lr=0.01, betas=BETAS, weight_decay=0.1)
    c = optim.adamw([{"params": [whole], **group}], BETAS)
    for g in gradients:
        for p in (ours, theirs, whole):
            p.grad = g.clone()
        optim.step([a, c], 0.01)
        b.step()
    assert torch.equal(ours, theirs) and a.state[ours]["step"] == 10
    off = (ours - whole).norm() / (whole - start).norm()
    assert 1e-4 < off < 0.05
    assert sum(value.nbytes for key, value in a.state[ours].items() if key not in adamw8bit.TABLES) == (
        2 * 96 * 64 + 2 * 4 * 96 * 64 // 256 + 8)


@pytest.mark.parametrize("name", low_memory.NAMES)
def test_every_parameter_has_one_owner(name):
    """Of a model with experts; galore's are the matrices of the layers, with state of its rank."""
    model = Decoder(preset("mixtral", 300, 32))
    optimizers = optim.build(model, name, 0.1, torch.float32, rank=8)
    owned = [p for each in optimizers for group in each.param_groups for p in group["params"]]
    assert len({*owned}) == len(owned) and {*owned} == {*model.parameters()}
    names = {p: key for key, p in model.named_parameters()}
    theirs = {names[p].rpartition(".")[2] if ".experts." in names[p] else names[p].split(".")[-2]
              for each in optimizers if isinstance(each, GaLore) for p in each.state}
    assert theirs == ({"q", "k", "v", "o", "gate", "up", "down"} if name == "galore" else set())
    assert len(optimizers) == (2 if name == "galore" else 1)


# ---- runs

ASKED = {"galore": ("--galore-rank", "8", "--switch-every", "4"), "badam": ("--switch-every", "2"), "adamw8bit": ()}


@pytest.mark.parametrize("name", slow_but(["badam", "galore"], [*low_memory.NAMES]))
def test_a_run_that_was_left_ends_as_one_that_was_not(name, base, shards, tmp_path, monkeypatch):
    """To the bit; it left within a turn of the block, and between two subspaces. And it has learnt."""
    args = ("--init", base, "--data", shards, *QUICK, "--optimizer", name, *ASKED[name])
    run(*args, "--out", tmp_path / "whole")
    run_in_two(monkeypatch, *args, "--out", tmp_path / "left")
    whole, left = ((tmp_path / each / "model.safetensors").read_bytes() for each in ("whole", "left"))
    assert whole == left
    found = losses_of(log_of(tmp_path / "whole"))
    assert found == losses_of(log_of(tmp_path / "left")) and found[-1] < found[0]
    if name == "badam":                                 # six steps are three turns of two: the last layer waits
        before, after = weights(base), weights(tmp_path / "whole")
        moved = {key for key, value in after.items() if not torch.equal(value, before[key])}
        assert moved == {key for key in before if key.startswith(("layers.0.", "layers.1.", "layers.2."))}


@pytest.mark.parametrize("more", slow_but([("badam", "--lora-rank", "4", "--quantize", "nf4")], [
    ("badam", "--lora-rank", "4", "--quantize", "nf4"), ("adamw8bit", "--lora-rank", "16"), ("galore",), ("adamw8bit",),
    ("galore", "--train-last", "1"), ("badam", "--freeze", "embed", "norm", "head")]))
def test_they_go_with_dpo_adapters_and_freezing(more, base, tmp_path):
    """The loss falls from log 2; state is kept of nothing that is frozen."""
    pairs = [{"prompt": f"def {i}:", "chosen": " return beta", "rejected": " pass"} for i in range(24)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    run("--init", base, "--preference", tmp_path / "pairs.jsonl", "--loss", "dpo", "--out", tmp_path / "run", *QUICK,
        "--optimizer", *more, *ASKED[more[0]])
    found = losses_of(log_of(tmp_path / "run"))
    assert found[0] == pytest.approx(math.log(2), abs=1e-4) and found[-1] < found[0] - 0.01
    kept = json.loads((tmp_path / "run/steps/00000006/manifest.json").read_text())["tensors"]
    owners = {name.removeprefix("optimizer.").rpartition(".")[0] for name in kept if name.startswith("optimizer.")}
    trained = {name.removeprefix("model.") for name in kept if name.startswith("model.")}
    assert owners == ({"block"} if more[0] == "badam" else trained)
    assert all(name.endswith((".A", ".B")) for name in trained) or "--lora-rank" not in more
    assert all(name.startswith("layers.") for name in trained) or "--freeze" not in more


@pytest.mark.parametrize("args, said", [
    (("--optimizer", "galore", "--lora-rank", "4"), "--optimizer galore with adapters: it keeps"),
    (("--optimizer", "badam", "--offload"), "--optimizer badam with --offload: it needs whole parameters"),
    (("--optimizer", "adamw", "--galore-rank", "4"), "--galore-rank goes with --optimizer galore; found --optimizer"),
    (("--optimizer", "galore", "--plan"), "--plan with --optimizer galore: it counts the state of AdamW and of Muon"),
])
def test_what_does_not_go_together_is_named(args, said):
    with pytest.raises(InputError, match=said):
        parse("", ["--init", "no-such-folder", *args])


def test_shards_and_a_missing_package_are_refused_before_anything_is_read(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in low_memory.NAMES:
        with pytest.raises(InputError, match=f"--optimizer {name} with 2 processes: it needs whole parameters"):
            parse("", ["--init", "no-such-folder", "--optimizer", name])
    monkeypatch.undo()
    monkeypatch.setattr(adamw8bit.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="package bitsandbytes is not installed; pip install -e '.*8bit.*' brings"):
        parse("", ["--init", "no-such-folder", "--optimizer", "adamw8bit"])
