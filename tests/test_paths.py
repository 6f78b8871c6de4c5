"""What a command is pointed at: a path that someone mistyped, a pipe where a file is expected, a folder that lacks a
piece or has one too many. Each is said in one line, at once, without the network and before anything is written."""

import os
import re
import resource
import socket
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoints
import generate
from checkpoints import compare, convert, inspect
from checkpoints.layouts import hub
from checkpoints.show import __main__ as show
from checkpoints.source import open_source
from nanollm import cli
from nanollm.errors import CheckpointError, ConfigError, NanollmError, TokenizerError
from nanollm.inference import settings
from tests import forked
from tests.clock import within
from tests.fixtures import FIXTURES
from tests.oracles import write


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    for name in ("HfApi.model_info", "snapshot_download"):
        monkeypatch.setattr(f"huggingface_hub.{name}", lambda *_, **more: pytest.fail("the hub was asked"))


@pytest.fixture
def model(tmp_path):
    write(FIXTURES["llama-3"], tmp_path / "model")
    return tmp_path / "model"


def make_socket(path):
    where = os.getcwd()
    os.chdir(path.parent)                        # a socket's path is 108 bytes at most
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(path.name)
    os.chdir(where)


KINDS = {"a pipe": os.mkfifo, "a folder": Path.mkdir, "a socket": make_socket,
         "a device": lambda path: path.symlink_to("/dev/zero")}


def said(run, *arguments, monkeypatch) -> str:
    """The line with which a command ends."""
    monkeypatch.setattr(sys, "argv", ["x", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        within(5, lambda: cli.main(run))
    text = str(end.value.code)
    assert text.startswith("error: ") and "\n" not in text
    return text


# ---- what is given

@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "a folder"])
def test_what_is_no_file_and_no_folder(kind, tmp_path, monkeypatch):
    KINDS[kind](tmp_path / "x")
    for run, more in ((convert.run, [tmp_path / "out"]), (inspect.run, []), (show.run, []), (compare.run, [])):
        assert f"{kind}, where a file is expected" in said(run, tmp_path / "x", *more, monkeypatch=monkeypatch)
    for use in (checkpoints.load, checkpoints.tokenizer, checkpoints.config):
        with pytest.raises(CheckpointError, match=f"{kind}, where a file is expected"):
            use(tmp_path / "x")
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.slow
def test_generate_ends_at_once(model):
    os.mkfifo(model.parent / "x")
    (model / "tokenizer.json").unlink(missing_ok=True)
    os.mkfifo(model / "tokenizer.json")
    for path in (model.parent / "x", model):
        ended = forked.start(1, generate.run, "--model", path, "--prompt", "x").end()
        assert ended.codes == [1] and "a pipe" in ended.err and ended.err.count("\n") == 1


def test_a_mistyped_path_is_not_asked_of_the_hub(model, monkeypatch):
    monkeypatch.chdir(model.parent)
    for name in ("./modle", "../x", "/nowhere/x", "~/nowhere-of-this-name", "model/confg.json", "models/of/mine",
                 "x/model.gguf", "a/model.safetensors", "o/pytorch_model.bin", "modle.json"):
        with pytest.raises(CheckpointError, match=f"^{re.escape(name)}: no such folder or file; .* has "):
            hub.local_path(name)
    with pytest.raises(CheckpointError, match=r"no such folder or file; .*/model has config.json.* …$"):
        hub.local_path("model/confg.json")
    for name in ("owner/name", "owner/name-1.5", "owner/name/x.gguf", "owner/name/Q4/x.gguf"):
        assert not hub.looks_local(name)


@pytest.mark.parametrize("blank", ["", " "])
def test_nothing_is_given(blank, model, monkeypatch):
    assert said(convert.run, blank, "out", monkeypatch=monkeypatch) == "error: SRC is empty"
    assert said(convert.run, model, blank, monkeypatch=monkeypatch) == "error: DST is empty"
    for run in (inspect.run, show.run, compare.run):
        assert "the name of the model is empty" in said(run, blank, monkeypatch=monkeypatch)


def test_a_folder_inside_the_one_that_is_read(model, monkeypatch):
    before = sorted(os.listdir(model))
    (model.parent / "link").symlink_to(model)
    for out in (model / "out", model / "deep" / "er", model.parent / "link" / "out"):
        assert "is inside SRC" in said(convert.run, model, out, monkeypatch=monkeypatch)
    assert "exists and is not an empty folder" in said(convert.run, model, model, monkeypatch=monkeypatch)
    assert sorted(os.listdir(model)) == before


# ---- what is beside the weights

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "generation_config.json", "x.tiktoken"])
def test_a_companion_that_is_no_file(kind, name, model):
    loaded = checkpoints.load(model)
    (model / name).unlink(missing_ok=True)
    KINDS[kind](model / name)
    expected = f"{re.escape(name)}: (a link to )?{kind}, where a file is expected"
    for to in ("hf", "meta", "gguf"):
        with pytest.raises(CheckpointError, match=expected):
            convert.plan(open_source(model), to)
    with pytest.raises(CheckpointError, match=expected):
        checkpoints.save(loaded, model.parent / "out")
    assert os.listdir(model.parent) == ["model"]
    report = inspect.look(model)                 # the weights are sound, and load
    assert report.reason is None and any(re.search(expected, note) for note in report.notes)
    what = "a folder" if kind == "a folder" else "a pipe or a device"
    with pytest.raises(TokenizerError, match=f"{re.escape(name)}: found {what}, expected a file"):
        settings.choose({}, model) if name == settings.NAME else checkpoints.tokenizer(model)


def test_a_companion_that_leads_nowhere(model):
    (model / "vocab.json").symlink_to("nowhere")
    with pytest.raises(CheckpointError, match="vocab.json: a link to nowhere, where there is nothing"):
        convert.plan(open_source(model))


def test_an_adapter_beside_the_weights_is_not_applied(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoints.load(model)
    (model / "adapter_config.json").write_text("{}")
    save_file({"x": torch.ones(2)}, model / "adapter_model.safetensors")
    with pytest.warns(UserWarning, match="adapter_config.json lies beside the weights: it is not applied"):
        checkpoints.load(model)
    with pytest.warns(UserWarning, match="transformers applies it where peft is installed. Merge it, or move it away"):
        convert.plan(open_source(model))
    assert any("it is not applied" in note for note in inspect.look(model).notes)


# ---- what is missing

@pytest.mark.parametrize("stem, suffix, index", [
    ("model", "safetensors", "model.safetensors.index.json"),
    ("pytorch_model", "bin", "pytorch_model.bin.index.json"),
])
def test_shards_without_their_index(stem, suffix, index, model):
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    for number in (1, 2):
        save_file(dict([*tensors.items()][number - 1::2]), model / f"{stem}-{number:05d}-of-00002.{suffix}")
    for path in (model, model / "config.json"):
        with pytest.raises(CheckpointError, match=f"{stem}-00001-of-00002.{suffix} … .* are shards of a model, and "
                                                  f"{index}, .* is missing; it lies in the repository"):
            open_source(path, allow_pickle=True)


def test_a_model_that_is_not_read_is_said_before_its_weights_are_missed(model):
    (model / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="neither model.safetensors nor"):
        checkpoints.load(model)
    (model / "config.json").write_text('{"model_type": "t5x"}')
    with pytest.raises(ConfigError, match="model_type is 't5x'.* lists the"):
        checkpoints.load(model)
    assert "t5x" in str(inspect.look(model).reason)


# ---- where nothing can be written

def test_no_room_for_the_archive_of_torch(model):
    """Under a bound on the size of a file, as a quota; Python leaves the signal aside, and torch raises."""
    with warnings.catch_warnings(action="ignore"):
        conversion = convert.plan(open_source(model), "meta")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(NanollmError, match="out: cannot write: consolidated.00.pth: the system takes no more"):
            convert.convert(conversion, model.parent / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(model.parent) == ["model"]
