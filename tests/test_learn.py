"""docs/learn.md: what it shows is what comes out, and the files, tests and exercises that it names are there."""

import ast
import doctest
import json
import re
import runpy

import torch

import nanollm.presets
from docs.exercises import EXERCISES
from docs.exercises.blank import find
from nanollm import Decoder
from nanollm.data import documents
from tests.test_docs import CODE, ROOT

PAGE = (ROOT / "docs/learn.md").read_text()
STEPS = re.split(r"^## \d+\. ", PAGE, flags=re.MULTILINE)[1:]


def blocks(kind: str) -> list[str]:
    return [text for found, text in CODE.findall(PAGE) if found == kind]


def test_the_sessions_say_what_is_written(monkeypatch):
    """Every line behind >>>, in order, in one session."""
    monkeypatch.chdir(ROOT)
    test = doctest.DocTestParser().get_doctest("\n".join(blocks("pycon")), {}, "docs/learn.md", None, 0)
    said: list[str] = []
    assert len(test.examples) > 30
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    assert runner.run(test, out=said.append).failed == 0, "".join(said)


def test_the_chats_of_step_10_are_written(monkeypatch, capsys):
    """Of the first modules of the standard library."""
    few = documents.standard_library()[:30]
    monkeypatch.setattr(documents, "standard_library", lambda: few)
    runpy.run_path(str(ROOT / "docs/make_chats.py"))
    chats = [json.loads(line)["messages"] for line in capsys.readouterr().out.splitlines()]
    assert {"role": "user", "content": "What is argparse for?"} in [chat[0] for chat in chats]


def test_twelve_steps_each_with_its_parts():
    assert len(STEPS) == 12
    for step in STEPS:
        assert all(f"- **{part}** " in step for part in ("Read", "Exercise", "Question")) and "```" in step
        assert re.search(r"- \*\*Read\*\*.*\]\(\.\.", step)


def test_each_question_is_answered_by_a_test():
    named = re.findall(r"`(test_\w+)` in `(tests/[\w/]+\.py)`", PAGE)
    assert len(named) == len(STEPS)
    for test, file in named:
        assert find(ast.parse((ROOT / file).read_text()), test)


def test_every_exercise_belongs_to_a_step():
    lines = re.findall(r"- \*\*Exercise\*\* (.*)", PAGE)
    named = [name for line in lines for name in re.findall(r"`(\w+)`", line)]
    assert sorted(name for name in named if name in EXERCISES) == sorted(EXERCISES)


def test_the_fork_is_a_model(monkeypatch):
    """Lines of the diff that are kept stand in presets.py; those that are added make a preset that runs."""
    diff, = blocks("diff")
    name, *lines = diff.splitlines()
    source = (ROOT / name.removeprefix("+++ ")).read_text()
    kept, = (line[1:] for line in lines if line.startswith(" "))
    assert kept in source.splitlines()
    before, after = ("\n".join(line[1:] for line in part) for part in
                     (lines[: lines.index(" " + kept)], lines[lines.index(" " + kept) + 1 :]))
    space: dict = {"__name__": "presets"}
    exec(source.replace(kept, f"{before}\n{kept}\n{after}"), space)
    model = Decoder(space["preset"]("mine", vocab=300))
    assert model(torch.tensor([[1, 2, 3]])).isfinite().all()
    assert "mine-toy" not in nanollm.presets.PRESETS
