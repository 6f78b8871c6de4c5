"""The pages: short, and every link, path, command, picture, figure and example in them is one that exists."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

import checkpoints
from checkpoints.show import describe
from nanollm.model import Decoder
from nanollm.presets import preset
from tests.test_house import LLAMA_PATH

ROOT = Path(__file__).parent.parent
FILES = subprocess.check_output("git ls-files -co --exclude-standard".split(), cwd=ROOT, text=True).split()
PAGES = sorted(name for name in FILES if name.endswith(".md"))
README = (ROOT / "README.md").read_text()
CODE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
TRAINING_PATH = "train nanollm/data/stream nanollm/training/losses nanollm/training/distributed nanollm/training/optim"


def prose(page: str) -> str:
    """The page without its code blocks."""
    return CODE.sub("", (ROOT / page).read_text())


def blocks(page: str, language: str = "") -> list[str]:
    return [text for kind, text in CODE.findall((ROOT / page).read_text()) if kind == language]


def links(text: str) -> list[str]:
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"\w+:", target)]


def test_the_readme_is_short():
    """Words outside code blocks, those of tables and links included."""
    assert len([word for word in prose("README.md").split() if re.search(r"\w", word)]) <= 1400


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_has_its_target(page):
    for target in links(prose(page)):
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page}: {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)", file.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}, target


@pytest.mark.parametrize("page", PAGES)
def test_every_file_in_backticks_exists(page):
    """With a path: from the root or from the page. A name alone: somewhere. A user's folders are not ours."""
    ours, names = {name.partition("/")[0] for name in FILES}, {Path(name).name for name in FILES}
    for said in re.findall(r"`([\w./*-]+)`", prose(page)):
        first, slash, _ = said.partition("/")
        if slash and (first in ours or said.endswith((".py", ".md"))):
            assert any(any(base.glob(said.rstrip("/"))) for base in (ROOT, (ROOT / page).parent)), f"{page}: {said}"
        elif not slash and said.endswith(".py") and "*" not in said:
            assert said in names, f"{page}: {said}"


def test_the_reading_order_is_complete():
    """Up to where the reader may choose, it links all that a forward pass and a training step are made of."""
    path = README.partition("## Reading order")[2].partition("Then, as you like")[0]
    found = [target for target in links(path) if target.endswith(".py")]
    expected = [f"nanollm/{name}.py" for name in LLAMA_PATH] + [f"{name}.py" for name in TRAINING_PATH.split()]
    assert sorted(found) == sorted(expected)


def test_the_picture_is_what_show_draws():
    assert describe(preset("mixtral-8x7b")) in README


def test_the_figures_are_those_of_the_benchmarks():
    """Rows of docs that are cut from a table of benchmarks/ stand there."""
    measured = "".join(path.read_text() for path in (ROOT / "benchmarks").glob("*.md"))
    for page in ("docs/speed.md", "docs/convert.md"):
        rows = [line for line in prose(page).splitlines() if re.match(r"\|.*\d(%|×| MB)? \|", line) and "`" not in line]
        assert len(rows) >= 8 and not [row for row in rows if row.rstrip(" |") not in measured]


# ---- what is shown to be run

@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_python_runs(page, tmp_path, monkeypatch):
    """The blocks of a page, one after the other, beside a folder runs/demo."""
    monkeypatch.chdir(tmp_path)
    checkpoints.save(Decoder(preset("llama", vocab=300)), "runs/demo")
    space: dict = {}
    for block in blocks(page, "python"):
        exec(block, space)
    with torch.no_grad():
        assert space["model"](torch.tensor([[1, 2, 3]])).isfinite().all()


def commands(page: str) -> list[str]:
    """Those in code blocks and in backticks, without comments."""
    lines = [line for block in blocks(page) for line in block.splitlines()] + re.findall(r"`([^`\n]+)`", prose(page))
    lines = [line.strip().removeprefix("$ ").partition(" #")[0] for line in lines]
    return [line for line in lines if re.match(r"(\S*python|torchrun|make|pytest) ", line)]


def sources(script: str) -> str:
    """The text of all that declares the options of a script, or of a module after -m."""
    elsewhere = {"train.py": "nanollm/training/arguments.py", "generate.py": "nanollm/inference/options.py"}
    script = elsewhere.get(script, script)
    path = ROOT / (script if script.endswith(".py") else script.replace(".", "/"))
    if path.is_dir() and (path / "__main__.py").exists():
        return "".join(file.read_text() for file in path.glob("*.py"))
    return path.with_suffix(".py").read_text()


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CHANGELOG.md"])
def test_commands_exist_and_know_their_options(page):
    makefile = (ROOT / "Makefile").read_text().replace("$(BIN)", ".venv/bin")
    targets = set(re.findall(r"^([\w./-]+):", makefile, re.MULTILINE))
    for command in commands(page):
        words = command.split()
        if words[0] == "make":
            assert set(words[1:]) <= targets, command
            continue
        if words[0] == "pytest" or words[1:3] == ["-m", "pytest"]:
            assert all((ROOT / word).exists() for word in words if "/" in word and not word.endswith("python")), command
            continue
        at = next(i for i, word in enumerate(words) if word.endswith(".py") or (word == "-m" and words[i + 1 :]))
        script, options = (words[at + 1], words[at + 2 :]) if words[at] == "-m" else (words[at], words[at + 1 :])
        text = sources(script)
        for option in options:
            if option.startswith("--") and option != "--help":
                assert f'"{option.partition("=")[0]}"' in text, f"{page}: {command}"


def test_the_diffs_of_the_fork_guide_apply_to_what_is_there():
    """Lines that a diff keeps or takes away stand in the file today; one that ends in … is cut."""
    for block in blocks("docs/fork.md", "diff"):
        for line in block.splitlines():
            if line.startswith("+++ "):
                name = line[4:].removesuffix(" (new)")
                assert (ROOT / name).exists() != line.endswith(" (new)"), line
                text = "" if line.endswith(" (new)") else (ROOT / name).read_text()
            elif line[:1] in (" ", "-") and line.strip():
                kept, cut = line[1:].removesuffix("…"), line.endswith("…")
                assert any(row == kept or (cut and row.startswith(kept)) for row in text.splitlines()), line
