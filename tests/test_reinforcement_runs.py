"""Reinforcement in the trainer: GRPO and PPO, full, frozen, LoRA and QLoRA, resumed, on two ranks, and its options."""

import json
import signal
import sys
from pathlib import Path

import pytest

import train
from nanollm.errors import DataError, InputError, RunError
from nanollm.training import options
from tests import forked, killed
from tests.test_preference_runs import KINDS, LORA, base, held_out, log, steps  # noqa: F401

METHODS = {"grpo": ("--group", 4), "ppo": ("--group", 2, "--value-weight", 0.5)}


def arguments(base: Path, out: Path, method: str, *more: object) -> list[str]:  # noqa: F811
    prompts = base / "prompts.jsonl"
    if not prompts.exists():
        words = ("alpha", "beta", "gamma", "delta")
        prompts.write_text("".join(json.dumps({"prompt": f"{a} {b} {i}", "word": "beta"}) + "\n"
                                   for a in words for b in words for i in range(2)))
    every = ("--out", out, "--init", base / "base", f"--{method}", prompts, "--reward-function", "tests.rewards:betas",
             "--context", 32, "--max-new-tokens", 6, "--batch-size", 4, "--warmup", 0, "--lr", 0.005, "--dtype",
             "float32", "--sample-every", 0, "--eval-every", 100, "--save-every", 2, "--steps", 6, *METHODS[method])
    return [str(each) for each in (*every, *more)]


def launch(ranks: int, *args: object) -> list[dict]:
    ended = forked.start(ranks, train.run, *arguments(*args)).end(300)
    assert ended.codes == [0] * ranks, ended.said
    return log(args[1])


def here(monkeypatch, *args: object) -> list[dict]:
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments(*args)])
    train.run()
    return log(args[1])


@pytest.mark.parametrize("method", METHODS)
def test_x(monkeypatch, base, tmp_path, method):  # noqa: F811
    entries = here(monkeypatch, base, tmp_path / "run", method, *LORA, "--steps", 12)
    for e in entries: print({k: (round(v, 5) if isinstance(v, float) else v) for k, v in e.items()})
