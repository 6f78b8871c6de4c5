"""Distillation: against trl and by hand, and in the trainer."""

import argparse
import json
from pathlib import Path

import pytest
import torch

import checkpoints
import train
from nanollm.data import prepare as texts
from nanollm.data.stream import Batch
from nanollm.errors import InputError
from nanollm.model import Decoder
from nanollm.presets import preset
from nanollm.training import distillation, options
from tests import forked
from tests.fixtures import slow_but
from tests.test_train import log_of, losses_of, run, run_in_two
from tests.toys import grammar


@pytest.mark.parametrize("kind, beta", [("forward", 0), ("reverse", 1)])
def test_the_divergences_are_those_of_trl(kind, beta):
    """Value and gradient, of logits with tokens that are hardly likely."""
    gkd = pytest.importorskip("trl.experimental.gkd")
    student, teacher = (3 * torch.randn(5, 7, 31) for _ in range(2))
    ours, theirs = (student.clone().requires_grad_() for _ in range(2))
    found = distillation.divergence(ours.flatten(0, 1), teacher.flatten(0, 1), kind).mean()
    expected = gkd.GKDTrainer.generalized_jsd_loss(theirs, teacher, labels=torch.zeros(5, 7), beta=beta)
    found.backward()
    expected.backward()
    assert abs(found.item() - expected.item()) < 1e-6 and torch.allclose(ours.grad, theirs.grad, atol=1e-7)


@pytest.mark.parametrize("kind", distillation.KINDS)
def test_the_method_is_the_sum_over_targets_in_pieces_too(kind, monkeypatch):
    student, teacher = (Decoder(preset("llama", 300, 32), seed=seed) for seed in (1, 2))
    tokens = torch.randint(0, 300, (2, 9))
    targets = torch.where(torch.rand(2, 9) < 0.5, tokens, -100)
    teacher.requires_grad_(False)
    expected = distillation.divergence(student(tokens).flatten(0, 1), teacher(tokens).flatten(0, 1), kind)
    expected = (expected * (targets.flatten() >= 0)).sum()
    expected.backward()
    gradients = [p.grad.clone() for p in student.parameters()]
    student.zero_grad()
    monkeypatch.setattr(distillation, "PIECE", 300 * 2)
    loss, said = distillation.distillation(teacher, kind)(student, Batch(tokens, targets, None), argparse.Namespace())
    loss.backward()
    assert torch.allclose(loss, expected, rtol=1e-5) and said["loss"] == loss.detach() > 0
    assert all(torch.allclose(p.grad, g, atol=1e-6) for p, g in zip(student.parameters(), gradients, strict=True))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """A toy that learnt a little: FOLDER/teacher, and FOLDER/shards."""
    folder = tmp_path_factory.mktemp("teacher")
    text = texts.read(grammar(tmp_path_factory.mktemp("text")))
    texts.prepare(text, folder / "shards", vocab=300, tokenizer=None, context=32)
    launch(1, folder / "teacher", folder, "--steps", 20)
    return folder


def arguments(out: Path, folder: Path, *more: object) -> list[str]:
    every = ("--out", out, "--data", folder / "shards", "--context", 32, "--batch-size", 8, "--warmup", 1,
             "--lr", 0.003, "--dtype", "float32", "--optimizer", "adamw", "--sample-every", 0, "--eval-every", 5, *more)
    return [str(each) for each in every]


def launch(ranks: int, out: Path, folder: Path, *more: object) -> list[dict]:
    ended = forked.start(ranks, train.run, *arguments(out, folder, *more)).end(300)
    assert ended.codes == [0] * ranks, ended.said
    return [*map(json.loads, (out / "log.jsonl").read_text().splitlines())]


@pytest.mark.parametrize("kind", ["forward", pytest.param("reverse", marks=pytest.mark.slow)])
def test_a_student_comes_close_to_its_teacher(monkeypatch, teacher, tmp_path, kind):
    """And the teacher itself, as a student, has nothing to learn."""
    learn = ("--teacher", teacher / "teacher", "--distill", kind)
    entries = launch(1, tmp_path / "run", teacher, "--steps", 10, "--seed", 5, *learn)
    found = [entry["held_out_loss"] for entry in entries if "held_out_loss" in entry]
    assert found[2] < found[1] < found[0]
    same = launch(1, tmp_path / "same", teacher, "--init", teacher / "teacher", "--steps", 1, *learn)
    assert abs(same[0]["held_out_loss"]) < 1e-5


@pytest.fixture(scope="module")
def pupil(teacher) -> Path:
    """FOLDER/pupil, a model of other weights with the teacher's tokenizer, and FOLDER/chats.jsonl."""
    checkpoints.save(Decoder(preset("llama", 300, 32), seed=5), teacher / "pupil")
    for path in (teacher / "teacher").glob("tokenizer*"):
        (teacher / "pupil" / path.name).write_bytes(path.read_bytes())
    talks = [{"prompt": f"def {i}:", "completion": f" return {i} {i}"} for i in range(24)]
    (teacher / "chats.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    return teacher


@pytest.mark.parametrize("adapters", slow_but([("--lora-rank", "4", "--lora-dropout", "0.1")], [
    ("--lora-rank", "4", "--lora-dropout", "0.1"), ()]))
def test_chats_and_adapters_that_were_left_go_on_to_the_bit(adapters, pupil, tmp_path, monkeypatch):
    """And the loss is the teacher's on the answers: after the run the student is closer to it there."""
    args = ("--init", pupil / "pupil", "--chat", pupil / "chats.jsonl", "--teacher", pupil / "teacher", "--context", 32,
            "--batch-size", 8, "--micro-batch", 4, "--steps", 6, "--warmup", 1, "--lr", 0.003, "--dtype", "float32",
            "--sample-every", 0, "--save-every", 2, "--eval-every", 3, *adapters)
    run(*args, "--out", tmp_path / "whole")
    run_in_two(monkeypatch, *args, "--out", tmp_path / "left")
    name = "adapter_model.safetensors" if adapters else "model.safetensors"
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "left" / name).read_bytes()
    log = log_of(tmp_path / "whole")
    assert losses_of(log) == losses_of(log_of(tmp_path / "left"))
    found = [entry["held_out_loss"] for entry in log if "held_out_loss" in entry]
    assert len(found) == 3 and found[2] < found[1] < found[0]
    with pytest.raises(SystemExit, match="holds another run .--teacher"):
        run(*args, "--out", tmp_path / "left", "--resume", "--teacher", pupil / "pupil")


@pytest.mark.slow
def test_two_ranks_are_one(teacher, tmp_path):
    one, two = (launch(ranks, tmp_path / str(ranks), teacher, "--steps", 6, "--teacher", teacher / "teacher")
                for ranks in (1, 2))
    pairs = [(a, b) for a, b in zip(one, two, strict=True) if "loss" in a]
    assert len(pairs) == 6 and all(abs(a["loss"] - b["loss"]) <= 2e-6 for a, b in pairs)


def test_what_does_not_fit_is_named(monkeypatch, teacher, tmp_path):
    with pytest.raises(InputError, match="--distill reverse is for a teacher: give its folder with --teacher"):
        options.parse("", ["--distill", "reverse"])
    with pytest.raises(InputError, match="--preference with --teacher"):
        options.parse("", ["--init", "x", "--preference", "y", "--teacher", "z"])
    with pytest.raises(InputError, match="a vocabulary of 31, the model one of 300; expected a teacher with the same"):
        distillation.need_same_vocabulary(Decoder(preset("llama", 31, 32)), 300, "x")
    with pytest.raises(InputError, match="--teacher x: made for 32 tokens, --context is 64; what it says of"):
        distillation.need_room(Decoder(preset("llama", 31, 32)), 64, "x")
    with pytest.raises(InputError, match="--teacher with --z-loss: the loss is a divergence"):
        options.parse("", ["--teacher", "x", "--z-loss", "0.1"])
