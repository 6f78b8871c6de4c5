"""Reinforcement in the trainer: GRPO and PPO, full, frozen, LoRA and QLoRA, resumed, on two ranks, and its options."""

import json
import math
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import checkpoints
import train
from nanollm.data import prompts
from nanollm.data.chat_formats import Chat
from nanollm.data.prompts import Prompt
from nanollm.errors import DataError, InputError, RunError
from nanollm.text import tokenizer
from nanollm.training import log as logs
from nanollm.training import options, reward, reward_function
from nanollm.training.averages import averaged
from tests import forked, killed
from tests.test_preference_runs import KINDS, LORA, base, held_out, log, steps  # noqa: F401
from tests.test_preferences import folder  # noqa: F401
from tests.test_reward import rewarding

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


slow = pytest.mark.slow


@pytest.mark.parametrize("method, kind", [
    ("grpo", "qlora"), *(pytest.param(method, kind, marks=slow) for method, kind in [
        ("grpo", "full"), ("grpo", "frozen"), ("grpo", "lora"), ("ppo", "full"), ("ppo", "frozen"), ("ppo", "lora"),
        ("ppo", "qlora")])])
def test_the_reference_is_the_model_as_it_was(monkeypatch, base, tmp_path, method, kind):  # noqa: F811
    """Full, frozen, LoRA and QLoRA; what is kept of it are the parameters that are trained, and no others."""
    kept = []
    monkeypatch.setattr(train, "export", lambda run: kept.append(run))
    more = (*KINDS[kind], "--beta", 0.1, "--steps", 3, "--recompute", "full")
    found = steps(here(monkeypatch, base, tmp_path / "run", method, *more))
    assert abs(found[0]["kl"]) < 1e-6 and found[2]["kl"] > 1e-4 and found[0]["gradient_norm"] > 0
    assert all(entry["sampler_difference_max"] < 1e-3 for entry in found)
    run, = kept
    plain = checkpoints.load(base / "base", dtype=torch.float32, quantize="nf4" if kind == "qlora" else None)
    tokens = torch.arange(5, 21)[None]
    with torch.no_grad():
        moved, expected = run.model(tokens), plain(tokens)
        with averaged(run.method.first):
            before = run.model(tokens)
    assert (before - expected).abs().max() < 1e-4 < 1e-2 < (moved - expected).abs().max()
    trained = {name for name, p in run.model.named_parameters() if p.requires_grad}
    assert run.method.first.means.keys() == trained and ("value.weight" in trained) == (method == "ppo")
    assert (len(trained) < len([*run.model.parameters()])) == (kind != "full")


@pytest.mark.parametrize("method, more", [("ppo", LORA), pytest.param("grpo", (), marks=slow),
                                          pytest.param("grpo", (*LORA, "--beta", 0.1), marks=slow)], ids=str)
def test_a_killed_run_ends_as_one_that_was_not(monkeypatch, base, tmp_path, method, more):  # noqa: F811
    """It dies between two updates on the same samples, which are in the checkpoint; and the model folder is plain."""
    more = (*more, "--updates", 2, "--save-every", 3)
    whole = launch(1, base, tmp_path / "whole", method, *more)
    ended = forked.start(1, killed.run, "optimizer", "5", *arguments(base, tmp_path / "run", method, *more)).end(300)
    assert ended.codes == [-signal.SIGKILL], ended.said
    resumed = here(monkeypatch, base, tmp_path / "run", method, *more, "--resume")
    same = ("loss", "gradient_norm", "reward", "clipped")
    assert [[entry.get(name) for name in same] for entry in steps(resumed)] == [
        [entry.get(name) for name in same] for entry in steps(whole)]
    assert ["reward" in entry for entry in steps(whole)] == [True, False] * 3 and steps(whole)[1]["clipped"] > 0
    name = "adapter_model.safetensors" if LORA[0] in more else "model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not any("value" in key for key in load_file(tmp_path / "run" / name))
    assert not (tmp_path / "run/score.safetensors").exists()


@pytest.mark.parametrize("method, more", [
    ("grpo", ("--normaliser", "dapo", "--beta", 0.1)), *(pytest.param(*case, marks=slow) for case in [
        ("grpo", (*LORA, "--beta", 0.1)), ("ppo", ("--updates", 2)), ("ppo", (*LORA, "--quantize", "nf4"))])], ids=str)
def test_two_ranks_are_one(base, tmp_path, method, more):  # noqa: F811
    """Each answers its own prompts, from a copy of the sharded weights; the draws are those of one process."""
    one = launch(1, base, tmp_path / "one", method, *more, "--micro-batch", 2, "--steps", 4)
    two = launch(2, base, tmp_path / "two", method, *more, "--micro-batch", 2, "--steps", 4)
    assert held_out(one, "reward") == pytest.approx(held_out(two, "reward"), abs=1e-9)
    for a, b in zip(steps(one), steps(two), strict=True):
        assert abs(a["loss"] - b["loss"]) <= 5e-6 and abs(a["gradient_norm"] / b["gradient_norm"] - 1) < 5e-4
        for name in ("reward", "reward_std", "no_signal", "answer_tokens", "cut"):
            assert a.get(name) == pytest.approx(b.get(name), abs=1e-9)


@slow
def test_a_reward_model_rewards(monkeypatch, base, tmp_path):  # noqa: F811
    """One that --reward trained, an adapter beside its base; its numbers are those of reward.rewards."""
    every = rewarding(base, tmp_path / "judge", *LORA, "--steps", 2)
    monkeypatch.setattr(sys, "argv", ["train.py", *every])
    train.run()
    rewards = reward_function.by_model(tmp_path / "judge", 300, checkpoints.load)
    model = reward.read(checkpoints.load(base / "base", adapter=tmp_path / "judge"), tmp_path / "judge")
    with torch.no_grad():
        expected = reward.rewards(model, torch.tensor([[5, 6, 7]]), torch.tensor([3])).item()
    assert rewards([(None, "", [7], [5, 6, 7])]) == [pytest.approx(expected, abs=1e-6)]
    args = arguments(base, tmp_path / "run", "ppo", "--steps", 2)
    at = args.index("--reward-function")
    monkeypatch.setattr(sys, "argv", ["train.py", *args[:at], "--reward-model", str(tmp_path / "judge"),
                                      *args[at + 2 :]])
    train.run()
    assert all(math.isfinite(entry["reward"]) for entry in steps(log(tmp_path / "run")))
    with pytest.raises(InputError, match="has no score.safetensors; expected the folder of a run with --reward"):
        reward_function.by_model(base / "base", 300, checkpoints.load)


# ---- bad rewards, bad options

@pytest.mark.parametrize("name, message", [
    ("nothing", "returned nan for the answer .* to .*line [0-9]+; expected a finite number"),
    ("too_few", "returned 1 rewards for 2 answers; expected one each"),
    ("silent", "returned None; expected a list of 2 numbers"),
    ("without_columns", r"it is called with .*, word by name, and got an unexpected keyword argument 'word' "
                        r"\(.*rewards.py, line [0-9]+\); expected def .*\*\*columns\)"),
    ("in_a_library", r"JSONDecodeError: .* \(.*rewards.py, line [0-9]+\)"),
    ("broken", r"AttributeError: 'str' object has no attribute 'no_such_thing' \(.*rewards.py, line [0-9]+\)")])
def test_what_is_no_reward_is_one_clear_error(name, message):
    answered = [(Prompt(Chat("p.jsonl, line 1", []), "Hi", {"word": "b"}), text, [1], [0, 1])
                for text in ("a", "b")]
    with pytest.raises(RunError, match=f"--reward-function tests.rewards:{name}: {message}"):
        reward_function.by_function(f"tests.rewards:{name}")(answered)


@pytest.mark.parametrize("name, message", [
    ("rewards", "expected MODULE:NAME"), ("a/b:c", "expected MODULE:NAME"),
    ("tests/rewards.py:betas", "leave out .py: tests.rewards:betas"),
    ("tests.rewards:none", "no function none"), ("tests.rewards:alone", "unexpected keyword argument 'prompts'"),
    ("no_such_module:f", "no module no_such_module; expected one in"), ("this:d", "has no function d")])
def test_a_function_that_is_not_there_is_said_before_anything_is_read(name, message, tmp_path):
    with pytest.raises(InputError, match=f"--reward-function {name}.*{message}"):
        options.parse("", ["--init", str(tmp_path), "--grpo", "p.jsonl", "--reward-function", name])


@pytest.mark.parametrize("text, message", [
    ("import math\nimport no_such_package\n",
     r"importing judge failed: ModuleNotFoundError: No module named 'no_such_package' \({}, line 2\)$"),
    ("\ndef f(:\n", r"importing judge failed: SyntaxError: invalid syntax \({}, line 2\)$"),
    ("import json\n\n\njson.loads('{{')\n", r"importing judge failed: JSONDecodeError: .* \({}, line 4\)$")])
def test_what_fails_inside_the_users_file_is_told_with_its_line(text, message, tmp_path, monkeypatch):
    """The module is there, so nobody is told to look for it; nor is the line that of a library."""
    (tmp_path / "judge.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=message.format(tmp_path / "judge.py")):
        reward_function.find("judge:f")


def test_the_bar_and_the_report_of_a_run_have_its_rewards(tmp_path, monkeypatch):
    """The loss of GRPO is 0 in the first step on its samples, whatever it learns."""
    monkeypatch.setattr(logs, "loss_curve", lambda *_: True)
    assert logs.shown({"loss": 0.0, "reward": 0.25}, -0.5) == {"reward": "0.25", "loss": "0", "held_out": "0.5"}
    assert logs.shown({"loss": 0.5}, 0.5) == {"loss": "0.5", "held_out": "0.5"}
    entries = [{"step": 0, "held_out_loss": -0.5}, {"step": 1, "loss": 0.0, "reward": 0.25}, {"step": 2, "loss": 0.1},
               {"step": 3, "loss": 0.0, "reward": 0.75}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    said = logs.report(tmp_path, SimpleNamespace(facts=None, rewarded=True, targets_per_byte=None), "")
    assert [line.split() for line in said.splitlines()[:2]] == [
        ["held", "out,", "reward", "0.500"], ["(reward,", "training,", "last", "2", "rounds)", "0.500"]]


@pytest.mark.parametrize("args, message", [
    ((), "--grpo: give --reward-function"),
    (("--reward-model", "x"), "give --reward-function MODULE:NAME, or"),
    (("--compile",), "--grpo with --compile"), (("--offload",), "--offload"),
    (("--group", 1), "--group 1"), (("--gae-lambda", 1), "--gae-lambda does not go with --grpo"),
    (("--loss", "dpo"), "--loss goes with --preference"), (("--chat", "x"), "--grpo with --chat"),
    (("--ppo", "x"), "--grpo with --ppo"), (("--plan",), "--grpo with --plan")])
def test_options_that_do_not_go_together(tmp_path, args, message):
    given = ("--reward-function", "tests.rewards:betas") if args else ()
    with pytest.raises(InputError, match=message):
        options.parse("", ["--init", str(tmp_path), "--grpo", "p.jsonl", *given, *map(str, args)])


def test_options_of_reinforcement_need_it_and_have_defaults(tmp_path):
    with pytest.raises(InputError, match="--updates goes with --grpo or --ppo"):
        options.parse("", ["--updates", "2"])
    given = ["--init", str(tmp_path), "--reward-function", "tests.rewards:betas"]
    chosen = options.parse("", [*given, "--grpo", "p.jsonl", "--normaliser", "dapo"])
    assert (chosen.group, chosen.beta, chosen.epsilon, chosen.epsilon_high, chosen.lr) == (8, 0.0, 0.2, 0.28, 1e-6)
    chosen = options.parse("", [*given, "--ppo", "p.jsonl", "--epsilon", "0.1", *map(str, LORA)])
    assert (chosen.group, chosen.beta, chosen.epsilon_high, chosen.lr) == (1, 0.05, 0.1, 1e-5)
    assert options.parse("", []).updates == 1


# ---- prompts

def test_prompts_of_every_format_and_their_columns(folder, tmp_path):  # noqa: F811
    """As text, as messages, as instruction and input; completions come in the kind of the prompt, as in trl."""
    system = {"role": "system", "content": "Be brief."}
    items = [{"prompt": "Hi", "answer": 3}, {"messages": [system, {"role": "user", "content": "Hi"}], "answer": 4},
             {"instruction": "Add.", "input": "1 2", "output": "3"}, {"prompt": [{"role": "user", "content": "Hi"}]},
             {"conversations": [{"from": "human", "value": "Hi"}], "system": "Be brief."}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    words = tokenizer.load(folder)
    (source,), held, notes = prompts.open_sets([tmp_path / "p.jsonl"], None, words, 999, 10, "drop")
    rows = [source.row(i) for i in range(5)]
    assert held is None and 'columns for the reward function: "answer", "output"' in notes
    assert [row.prompt.given for row in rows][::2] == ["Hi", "Add.\n1 2", rows[4].prompt.chat.messages]
    assert [row.prompt.columns for row in rows] == [{"answer": 3}, {"answer": 4}, {"output": "3"}, {}, {}]
    assert rows[0].ids == rows[3].ids and rows[1].ids == rows[4].ids != rows[0].ids
    assert words.decode(rows[0].ids, skip_special=False).endswith("<|im_start|>assistant\n")
    assert rows[0].prompt.answer("x") == "x" and rows[3].prompt.answer("x") == [{"role": "assistant", "content": "x"}]
    (_,), _, notes = prompts.open_sets([tmp_path / "p.jsonl"], None, words, len(rows[0].ids) + 10, 10, "drop")
    assert any("3 prompts too long for --context" in note and "line 2" in note for note in notes)
    assert any("nothing is held out to measure on" in note for note in notes)
    n = len(rows[0].ids)
    with pytest.raises(DataError, match=f"a prompt of {n} tokens and an answer of --max-new-tokens 200 are {n + 200}, "
                                        "and --context is 9; "):
        prompts.open_sets([tmp_path / "p.jsonl"], None, words, 9, 200, "drop")


@pytest.mark.parametrize("item, message", [
    ({"question": "Hi"}, "line 1: expected one of the keys prompt, messages"),
    ({"prompt": "Hi", "prompts": 1}, "line 1: expected columns that are not called completion_ids"),
    ({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
     "line 1: expected a prompt that ends before the answer")])
def test_what_is_no_prompt_is_named(folder, tmp_path, item, message):  # noqa: F811
    (tmp_path / "p.jsonl").write_text(json.dumps(item) + "\n")
    with pytest.raises(DataError, match=message):
        prompts.open_sets([tmp_path / "p.jsonl"], None, tokenizer.load(folder), 99, 10, "drop")
