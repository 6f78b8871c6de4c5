"""What a person meets who types a command: Ctrl-C at once, a wrong folder, a compiler that is not there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import torch
import torch._inductor.config
import transformers

import checkpoints
import generate
from checkpoints import compare, convert, inspect
from checkpoints.show import Costs, billions
from checkpoints.show import __main__ as show
from nanollm.errors import CheckpointError, ConfigError, InputError
from nanollm.inference.quantize import check
from tests.fixtures import FIXTURES
from tests.oracles import write

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("command", [
    ["generate.py"], ["train.py"], ["-m", "checkpoints.convert"], ["-m", "checkpoints.inspect"],
    ["-m", "checkpoints.compare"], ["-m", "checkpoints.show"], ["-m", "nanollm.data"]], ids=lambda words: words[-1])
def test_ctrl_c_while_torch_is_imported(command, tmp_path):
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run([sys.executable, *command, "--help"], cwd=ROOT, env=os.environ | {"PYTHONPATH": path},
                          capture_output=True, text=True, check=False)
    assert done.returncode == 130 and done.stderr == ""


def run(monkeypatch, command, *words) -> None:
    """A command of checkpoints, in this process."""
    monkeypatch.setattr(sys, "argv", ["command", *map(str, words)])
    command.run()


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("commands") / "llama"
    write(FIXTURES["llama-1"], folder)
    return folder


def test_show_takes_the_options_that_its_errors_name(llama, tmp_path, monkeypatch, capsys):
    told = json.loads((llama / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(told | {"curvature": 3}))
    with pytest.raises(ConfigError, match="--ignore curvature"):
        run(monkeypatch, show, tmp_path)
    run(monkeypatch, show, tmp_path, "--ignore", "curvature")
    drawn = capsys.readouterr().out
    del told["model_type"]
    (tmp_path / "config.json").write_text(json.dumps(told))
    run(monkeypatch, show, tmp_path, "--family", "llama")
    assert capsys.readouterr().out == drawn


@pytest.mark.filterwarnings("ignore:params.json has no key for the context")
def test_show_draws_a_folder_of_pickles(llama, tmp_path, monkeypatch, capsys):
    """Meta's, whose params.json does not say how many rows the embedding has."""
    run(monkeypatch, convert, llama, tmp_path / "meta", "--to", "meta")
    capsys.readouterr()
    with pytest.raises(CheckpointError, match="--allow-pickle"):
        run(monkeypatch, show, tmp_path / "meta")
    run(monkeypatch, show, tmp_path / "meta", "--allow-pickle", "--json")
    ours = json.loads(capsys.readouterr().out)
    run(monkeypatch, show, llama, "--json", "--context", 4096)
    theirs = json.loads(capsys.readouterr().out)
    assert [ours[name] for name in Costs._fields] == [theirs[name] for name in Costs._fields]


def test_just_below_a_billion_is_not_1_g():
    assert [billions(number) for number in (999_885_952, 999_499_999, 1_000_000_000)] == ["1.00 B", "999 M", "1.00 B"]


def test_convert_looks_at_dst_before_it_looks_for_src(tmp_path, monkeypatch):
    (tmp_path / "mine").touch()
    with pytest.raises(CheckpointError, match="exists and is not an empty folder"):
        run(monkeypatch, convert, "owner/model-that-would-be-fetched", tmp_path)


@pytest.mark.filterwarnings("ignore:model.gguf is written without a tokenizer")
def test_a_gguf_is_called_by_its_file(llama, tmp_path, monkeypatch, capsys):
    """Beside another one, and with the types that the format has for its blocks."""
    for name in ("one", "two"):
        run(monkeypatch, convert, llama, tmp_path / name, "--to", "gguf", "--dtype", "q8_0")
    one = (tmp_path / "one" / "model.gguf").rename(tmp_path / "one" / "a.gguf")
    (tmp_path / "two" / "model.gguf").rename(tmp_path / "one" / "b.gguf")
    capsys.readouterr()
    run(monkeypatch, inspect, one)
    said = capsys.readouterr().out
    assert said.startswith(f"{one}\n") and "a.gguf   " in said and "b.gguf" not in said
    reader = gguf.GGUFReader(one)
    kinds = {tensor.tensor_type.name for tensor in reader.tensors}
    assert "Q8_0" in kinds and all(f"B of {kind}" in said for kind in kinds) and " bits" not in said
    run(monkeypatch, show, one)
    assert "B of Q8_0" in capsys.readouterr().out
    run(monkeypatch, convert, one, tmp_path / "back", "--dry-run")
    assert capsys.readouterr().out.startswith(f"{one} (llama, gguf) → ")


@pytest.mark.parametrize("name, said", [
    ("empty", "config.json: no such file; a model folder expected"), ("docs", "config.json: no such file")])
def test_a_folder_without_a_model_is_said_to_be_none(name, said, tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "guide.md").write_text("# Guide")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=said):
        checkpoints.tokenizer(tmp_path / name)


def test_a_bare_name_is_told_how_the_hub_names_models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="gpt2: .* owner/name, such as openai-community/gpt2"):
        checkpoints.tokenizer("gpt2")


def test_without_a_compiler_it_is_said_before_the_model_loads(monkeypatch, capsys):
    """And decoding goes on as if --compile were not there: here to the model that is missing."""
    with torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        with pytest.raises(CheckpointError, match="missing"):
            run(monkeypatch, generate, "--model", "./missing", "--ask", "Who?", "--compile")
    assert "--compile: no C++ compiler (apt install g++, or CXX=…); decoding without it" in capsys.readouterr().err


def test_a_group_that_does_not_divide_names_those_that_do():
    with pytest.raises(InputError, match="576 inputs, expected a multiple of the group of 128; groups of 32 and 64"):
        check(torch.zeros(4, 576), 4, 128, "weight")
    with pytest.raises(InputError, match="no group divides them: take 8 bits"):
        check(torch.zeros(4, 48), 4, 32, "weight")


def test_what_transformers_says_to_install_is_quoted(llama, monkeypatch):
    def refuse(*words, **options):
        raise ImportError("it needs `pip install compressed-tensors>=0.15.0`, which is not there")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    with pytest.raises(CheckpointError, match='`pip install "compressed-tensors>=0.15.0"`'):
        compare.transformers_side(llama, torch.float32)
