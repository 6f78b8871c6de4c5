"""What the system does not let us read or write is one line that names it, in Python and in the commands."""

import contextlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

import checkpoints
from checkpoints import convert, inspect
from checkpoints.source import open_source
from checkpoints.storage import writing
from nanollm import cli
from nanollm.errors import CheckpointError
from tests.fixtures import FIXTURES
from tests.oracles import write


@contextlib.contextmanager
def nobody():
    """Root may read everything: so another user, for the block."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write(FIXTURES["llama-3"], folder)
    return folder


@pytest.fixture
def model(written):
    """A folder inside folders that everyone may enter."""
    outer = Path(tempfile.mkdtemp())
    shutil.copytree(written, outer / "model")
    for path in (outer, outer / "model"):
        path.chmod(0o755)
    yield outer / "model"
    for path in [outer, outer / "model", *outer.rglob("*")]:
        with contextlib.suppress(OSError):
            path.chmod(0o755)
    shutil.rmtree(outer)


LOCKED = {
    "the weights": lambda model: model / "model.safetensors", "the config": lambda model: model / "config.json",
    "the folder": lambda model: model, "the folder above": lambda model: model.parent,
}


@pytest.mark.parametrize("which", LOCKED)
def test_reading(which, model, monkeypatch, capfd):
    LOCKED[which](model).chmod(0)
    with nobody(), pytest.raises(CheckpointError, match="cannot be read: Permission denied") as error:
        checkpoints.load(model)
    assert "\n" not in str(error.value) and str(model.parent) in str(error.value)
    out = model.parent / "out"
    for run, name, arguments in ((inspect.run, "inspect", [model]), (convert.run, "convert", [model, out])):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        with nobody(), pytest.raises(SystemExit) as end:
            cli.main(run)
        said = str(end.value.code) if name == "convert" else f"{end.value.code}{''.join(capfd.readouterr())}"
        assert "Permission denied" in said and "Traceback" not in said


def test_writing(model, monkeypatch):
    """A parent that is not ours; with an empty folder of ours in it, what is written goes there."""
    (model.parent / "mine").mkdir()
    if os.geteuid() == 0:
        os.chown(model.parent / "mine", 65534, 65534)
    else:
        model.parent.chmod(0o555)
    loaded = checkpoints.load(model)
    with nobody(), pytest.raises(CheckpointError, match="new: cannot write: .*Permission denied"):
        checkpoints.save(loaded, model.parent / "new")
    with nobody():
        checkpoints.save(loaded, model.parent / "mine")
    assert (model.parent / "mine/model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    assert {path.name for path in model.parent.iterdir()} == {"model", "mine"}


def test_a_companion_is_asked_for_before_the_first_weight(model):
    (model / "merges.txt").write_text("")
    (model / "merges.txt").chmod(0)
    loaded, source = checkpoints.load(model), open_source(model)
    for use in (lambda: convert.plan(source), lambda: checkpoints.save(loaded, model.parent / "out")):
        with nobody(), pytest.raises(CheckpointError, match="merges.txt: cannot be read: Permission denied"):
            use()


def test_the_folder_that_takes_nothing_is_named(model):
    out = model.parent / "closed" / "a" / "b"
    (model.parent / "closed").mkdir(mode=0o555)
    with nobody(), pytest.raises(CheckpointError) as error, writing.new_folder(out):
        pytest.fail("the block ran")
    assert str(error.value) == (f"{out}: cannot write: the folder {model.parent / 'closed'} is not writable "
                                "(Permission denied)")


def test_what_a_warning_looks_like(capsys):
    cli.one_line(UserWarning("x: left out"), UserWarning, "a.py", 7)
    cli.one_line("old", DeprecationWarning, "a.py", 7)
    assert capsys.readouterr().err == "warning: x: left out\na.py:7: DeprecationWarning: old\n"
