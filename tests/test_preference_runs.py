"""Preferences in the trainer: every loss, full, frozen, LoRA and QLoRA, resumed, on two ranks, and its options."""

import json
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoints
import train
from nanollm.data import prepare as texts
from nanollm.errors import DataError, InputError
from nanollm.training import lora, options, reference
from nanollm.training.log_probs import answer_log_probs
from tests import forked, killed
from tests.toys import grammar

LORA = ("--lora-rank", 4)
KINDS = {"full": (), "frozen": ("--train-last", 1), "lora": LORA, "qlora": (*LORA, "--quantize", "nf4")}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A toy that learnt a little, and pairs that say which of two words is the better one: FOLDER/base, pairs.jsonl."""
    folder = tmp_path_factory.mktemp("base")
    text = texts.read(grammar(tmp_path_factory.mktemp("text")))
    texts.prepare(text, folder / "shards", vocab=300, tokenizer=None, context=32)
    every = ("--out", folder / "base", "--data", folder / "shards", "--optimizer", "adamw", "--steps", 8,
             "--context", 32, "--batch-size", 4, "--dtype", "float32", "--sample-every", 0)
    assert forked.start(1, train.run, *map(str, every)).end(300).codes == [0]
    draw = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta"]
    pairs = [{"prompt": " ".join(draw.choice(words, draw.integers(1, 4))) + f" {i}", "rejected": " delta",
              "chosen": " beta" * int(draw.integers(1, 4)), "margin": float(draw.integers(2))} for i in range(60)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return folder


def arguments(base: Path, out: Path, *more: object) -> list[str]:
    every = ("--out", out, "--init", base / "base", "--preference", base / "pairs.jsonl", "--context", 32,
             "--batch-size", 4, "--warmup", 1, "--lr", 0.003, "--dtype", "float32", "--sample-every", 0,
             "--eval-every", 3, "--save-every", 2, "--steps", 6)
    return [str(each) for each in (*every, *more)]


def launch(ranks: int, base: Path, out: Path, *more: object) -> list[dict]:
    """A run in processes of its own; its log."""
    ended = forked.start(ranks, train.run, *arguments(base, out, *more)).end(300)
    assert ended.codes == [0] * ranks, ended.said
    return log(out)


def here(monkeypatch, base: Path, out: Path, *more: object) -> list[dict]:
    """A run in this process; its log."""
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments(base, out, *more)])
    train.run()
    return log(out)


def log(out: Path) -> list[dict]:
    return [*map(json.loads, (out / "log.jsonl").read_text().splitlines())]


def steps(entries: list[dict]) -> list[dict]:
    return [entry for entry in entries if "loss" in entry]


def held_out(entries: list[dict], name: str) -> list[float]:
    return [entry[f"held_out_{name}"] for entry in entries if "held_out_loss" in entry]


# ---- what is learnt

@pytest.mark.parametrize("loss, kind", [
    ("dpo", "qlora"), *(pytest.param(*case, marks=pytest.mark.slow) for case in [
        ("dpo", "full"), ("dpo", "frozen"), ("dpo", "lora"), ("kto", "full"), ("kto", "frozen"), ("kto", "lora"),
        ("kto", "qlora"), ("orpo", "full"), ("orpo", "frozen"), ("orpo", "lora"), ("orpo", "qlora"), ("simpo", "full"),
        ("simpo", "frozen"), ("simpo", "lora"), ("simpo", "qlora"), ("ipo", "full"), ("hinge", "lora"),
        ("robust --label-smoothing 0.1", "full")])])
def test_the_margin_on_held_out_pairs_rises(monkeypatch, base, tmp_path, loss, kind):
    entries = here(monkeypatch, base, tmp_path / "run", "--loss", *loss.split(), *KINDS[kind])
    margins, losses = held_out(entries, "margin"), held_out(entries, "loss")
    assert len(margins) == 3 and margins[0] < margins[1] < margins[2] and losses[2] < losses[0]
    if loss in ("dpo", "robust", "kto"):
        assert abs(margins[0]) < 1e-5                           # the model is its own reference
    assert (tmp_path / "run/adapter_config.json").exists() == ("lora" in kind)


def test_the_reference_is_the_model_with_the_adapter_off(monkeypatch, base, tmp_path):
    """And no second copy: after six steps the numbers that are kept are those of the folder."""
    kept = []
    monkeypatch.setattr(train, "export", lambda run: kept.append(run))
    here(monkeypatch, base, tmp_path / "run", *LORA)
    run, plain = kept[0], checkpoints.load(base / "base", dtype=torch.float32)
    source, = run.corpus.stream.sources
    seen = sorted({run.corpus.stream.place(row)[2] for row in range(6 * 4)})
    assert 0 < len(seen) < source.rows
    batch = source.stack([source.row(row) for row in seen])
    with torch.no_grad():
        expected = answer_log_probs(plain, batch.tokens, batch.targets).total
        moved = answer_log_probs(run.model, batch.tokens, batch.targets).total
        for module in lora.loras(run.model).values():
            module.scale = 0.0
        off = answer_log_probs(run.model, batch.tokens, batch.targets).total
    assert torch.allclose(batch.reference, expected, atol=1e-5) and torch.allclose(off, expected, atol=1e-5)
    assert (moved - expected).abs().max() > 0.01
    unseen = [row for row in range(source.rows) if row not in seen]
    assert not source.reference[seen].isnan().any() and source.reference[unseen].isnan().all()
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in run.model.parameters())
    assert whole - trained == sum(p.numel() for p in plain.parameters())


# ---- against itself

@pytest.mark.parametrize("more", [LORA, *(pytest.param(more, marks=pytest.mark.slow) for more in (
    (), ("--loss", "kto", "--micro-batch", 2)))], ids=str)
def test_a_killed_run_ends_as_one_that_was_not(monkeypatch, base, tmp_path, more):
    """And the reference is measured once: what the first start measured is in its checkpoints."""
    whole = launch(1, base, tmp_path / "whole", *more)
    ended = forked.start(1, killed.run, "optimizer", "4", *arguments(base, tmp_path / "run", *more)).end(300)
    assert ended.codes == [-signal.SIGKILL], ended.said
    monkeypatch.setattr(reference, "measure", None)
    resumed = here(monkeypatch, base, tmp_path / "run", *more, "--resume")
    same = ("loss", "gradient_norm", "margin")
    assert [[entry[name] for name in same] for entry in steps(resumed)] == [
        [entry[name] for name in same] for entry in steps(whole)]
    name = "adapter_model.safetensors" if LORA == more else "model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("more", [
    ("--loss", "kto"), *(pytest.param(more, marks=pytest.mark.slow) for more in (
        ("--loss", "dpo"), ("--loss", "orpo", *LORA), ("--loss", "dpo", *LORA, "--quantize", "nf4")))], ids=str)
def test_two_ranks_are_one(base, tmp_path, more):
    """z of KTO is of the rows of both; of held-out ones, where a rank has none left, not quite: so their margin."""
    one = launch(1, base, tmp_path / "one", *more, "--micro-batch", 4)
    two = launch(2, base, tmp_path / "two", *more, "--micro-batch", 2)
    for a, b in zip(steps(one), steps(two), strict=True):
        assert abs(a["loss"] - b["loss"]) <= 2e-6 and abs(a["gradient_norm"] / b["gradient_norm"] - 1) < 5e-5
    assert abs(held_out(one, "margin")[-1] - held_out(two, "margin")[-1]) < 1e-4


@pytest.mark.slow
def test_micro_batches_are_one_big_batch(base, tmp_path):
    one, many = (launch(1, base, tmp_path / str(each), "--micro-batch", each) for each in (4, 1))
    assert all(abs(a["loss"] - b["loss"]) <= 2e-6 for a, b in zip(steps(one), steps(many), strict=True))


# ---- options

@pytest.mark.parametrize("args, message", [
    (("--loss", "orpo", "--gamma", 1), "--gamma goes with --loss simpo; found orpo"),
    (("--label-smoothing", 0.1, "--loss", "ipo"), "--label-smoothing goes with --loss dpo, robust; found ipo"),
    (("--loss", "robust"), "--loss robust: give --label-smoothing"),
    (("--loss", "robust", "--label-smoothing", 0.5), "--loss robust: give --label-smoothing"),
    (("--beta", 0), "--beta 0"), (("--long", "truncate"), "--long truncate: half an answer"),
    (("--chat", "x"), "--preference with --chat"), (("--data", "x"), "--preference with --data"),
    (("--z-loss", 0.1), "--preference with --z-loss"), (("--plan",), "--preference with --plan"),
])
def test_options_that_do_not_go_together(tmp_path, args, message):
    with pytest.raises(InputError, match=message):
        options.parse("", ["--init", str(tmp_path), "--preference", "p.jsonl", *map(str, args)])


def test_options_of_preferences_need_them_and_a_model(tmp_path):
    for args, message in ((["--loss", "dpo"], "--loss goes with --preference"),
                          (["--beta", "1"], "--beta goes with --preference"),
                          (["--preference", "x"], "--preference tunes a model that exists")):
        with pytest.raises(InputError, match=message):
            options.parse("", args)
    chosen = options.parse("", ["--init", str(tmp_path), "--preference", "p.jsonl"])
    assert (chosen.loss, chosen.lr, chosen.label_smoothing, chosen.gamma) == ("dpo", 1e-6, 0.0, None)
    assert options.parse("", ["--init", str(tmp_path), "--preference", "p.jsonl", *map(str, LORA)]).lr == 1e-5


def test_an_empty_answer_leaves_no_folder(monkeypatch, base, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": ""}) + "\n")
    with pytest.raises(DataError, match="bad.jsonl, line 1: expected an answer that says something"):
        here(monkeypatch, base, tmp_path / "run", "--preference", bad)
    assert not (tmp_path / "run").exists()
