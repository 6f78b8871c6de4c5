"""Files and folders as they should be: read and written as the library does. What is written is whole, or not there.

Damaged and hostile ones are in tests/hostile/."""

import json
import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import convert
from checkpoints.storage import files, pickles, stream, writing
from nanollm.errors import CheckpointError

TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.zeros(0, 3),
    "d": torch.tensor(7.0),
}


def write_folder(folder, tensors, shard_bytes) -> None:
    stored = writing.lay_out(
        folder, {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}, shard_bytes
    )
    with stream.Writer() as out:
        for name, tensor in tensors.items():
            stream.write(stored[name], 0, tensor, name, out)


def test_reads_what_the_library_writes(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors", {"format": "pt"})
    stored = files.read_header(tmp_path / "x.safetensors")
    assert stored.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        straight, cast = torch.empty_like(tensor), torch.empty_like(tensor, dtype=torch.float64)
        stream.read(stored[name], 0, straight, name)
        stream.read(stored[name], 0, cast, name)
        assert torch.equal(straight, tensor) and torch.equal(cast, tensor.double())


def test_writes_what_the_library_writes(tmp_path):
    save_file(TENSORS, tmp_path / "theirs", {"format": "pt"})
    write_folder(tmp_path, TENSORS, 10**9)
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_shards_and_their_index(tmp_path):
    tensors = {f"t{n}": torch.full((n + 1,), float(n)) for n in range(8)}
    write_folder(tmp_path, tensors, 40)
    index = json.loads((tmp_path / files.INDEX).read_text())
    assert index["metadata"]["total_size"] == 4 * sum(range(1, 9)) and index["weight_map"].keys() == tensors.keys()
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert (
        shards == [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
        and len(shards) == 5
    )
    found = {name: tensor for shard in shards for name, tensor in load_file(tmp_path / shard).items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert files.read_folder(tmp_path).keys() == tensors.keys()


def test_a_file_cut_while_it_is_read(tmp_path):
    save_file(TENSORS, tmp_path / "x")
    stored = files.read_header(tmp_path / "x")
    os.truncate(tmp_path / "x", stored["a"].start + 4)
    with pytest.raises(CheckpointError, match="truncated while it was read: expected 24 bytes, found 4"):
        stored["a"].read_run(0, torch.empty(2, 3))


def test_other_layouts_are_not_guessed_at(tmp_path):
    with pytest.raises(CheckpointError, match="neither model.safetensors nor"):
        files.read_folder(tmp_path)
    save_file(TENSORS, tmp_path / "consolidated.safetensors")
    with pytest.raises(CheckpointError, match="consolidated.safetensors follow another layout"):
        files.read_folder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="only pickled weights .*convert SRC DST --allow-pickle"):
        pickles.read_folder(tmp_path, allowed=False)


def test_equal_bytes(tmp_path):
    save_file(
        {"a": torch.ones(9), "b": torch.ones(9), "c": torch.tensor([1.0] * 8 + [2.0]), "d": torch.ones(3, 3)},
        tmp_path / "x",
    )
    stored = files.read_header(tmp_path / "x")
    assert [files.equal_bytes(stored["a"], stored[name], most=5) for name in "abcd"] == [True, True, False, False]


# ---- writing

def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for name in ("full", "file"):
        with pytest.raises(CheckpointError, match="nothing is overwritten"), writing.new_folder(tmp_path / name):
            pytest.fail("the block ran")
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new", "deep/er"):
        with writing.new_folder(tmp_path / name) as draft:
            (draft / "x").write_text("1")
        assert [path.name for path in (tmp_path / name).iterdir()] == ["x"]
    assert sorted(os.listdir(tmp_path)) == ["deep", "empty", "file", "full", "new"]


FULL = OSError(28, "No space left on device")


@pytest.mark.parametrize("failure, seen", [(KeyboardInterrupt(), KeyboardInterrupt), (FULL, CheckpointError)])
def test_a_failure_leaves_nothing(tmp_path, failure, seen):
    with pytest.raises(seen), writing.new_folder(tmp_path / "out") as draft:
        (draft / "half").write_text("x")
        raise failure
    assert os.listdir(tmp_path) == []


@pytest.fixture
def other_disk():
    """An empty folder on another file system."""
    shared = Path("/dev/shm")
    if not shared.is_dir() or shared.stat().st_dev == Path(tempfile.gettempdir()).stat().st_dev:
        pytest.skip("no second file system")
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        yield Path(folder)


def fill(destination, content="1"):
    with writing.new_folder(destination) as draft:
        for name in ("config.json", "z.safetensors"):
            (draft / name).write_text(content)
        (draft / "additional_chat_templates").mkdir()
        (draft / "additional_chat_templates" / "x.jinja").write_text(content)


def need_filled(folder):
    assert sorted(os.listdir(folder)) == ["additional_chat_templates", "config.json", "z.safetensors"]
    assert (folder / "additional_chat_templates/x.jinja").read_text() == "1"


def test_a_link_to_an_empty_folder_on_another_disk(tmp_path, other_disk, monkeypatch):
    """It stays a link, and the room is asked of the disk that it leads to."""
    (tmp_path / "out").symlink_to(other_disk)
    fill(tmp_path / "out")
    need_filled(other_disk)
    assert (tmp_path / "out").is_symlink() and os.listdir(tmp_path) == ["out"]
    asked = []
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(os.stat(path).st_dev) or real(path))
    for folder in (tmp_path / "out", tmp_path / "out" / "new" / "er", tmp_path / "there" / "not"):
        convert.need_room(folder, 1)
    assert asked == [other_disk.stat().st_dev] * 2 + [tmp_path.stat().st_dev]


def test_an_empty_folder_that_cannot_be_replaced(tmp_path, monkeypatch):
    """A mount point is busy, and the parent may be someone else's: nothing is made beside DST or takes its place."""
    (tmp_path / "out").mkdir()
    before, replace, mkdir = (tmp_path / "out").stat().st_ino, os.replace, Path.mkdir

    def busy(path, target):
        if Path(target) == tmp_path / "out":
            raise OSError(16, "Device or resource busy", str(target))
        replace(path, target)

    def not_ours(path, *args, **more):
        if path.parent == tmp_path:
            raise PermissionError(13, "Permission denied", str(path))
        mkdir(path, *args, **more)

    monkeypatch.setattr(os, "replace", busy)
    monkeypatch.setattr(Path, "mkdir", not_ours)
    fill(tmp_path / "out")
    need_filled(tmp_path / "out")
    assert (tmp_path / "out").stat().st_ino == before
    with pytest.raises(CheckpointError, match="new: cannot write: .*Permission denied"):
        fill(tmp_path / "new")


@pytest.mark.parametrize("at", range(3))
def test_a_failure_while_files_are_moved_up(at, tmp_path, monkeypatch):
    """Up to the last rename nothing looks like a model; after a failure nothing is left."""
    (tmp_path / "out").mkdir()
    seen, replace = [], os.replace

    def failing(path, target):
        assert not (tmp_path / "out/config.json").exists()
        seen.append(Path(target).name)
        if len(seen) > at:
            raise OSError(28, "No space left on device")
        replace(path, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(CheckpointError, match="out: cannot write: .*No space left"):
        fill(tmp_path / "out")
    assert os.listdir(tmp_path / "out") == [] and len(seen) == at + 1 and (at < 2 or seen[-1] == "config.json")
    monkeypatch.undo()
    fill(tmp_path / "out")
    need_filled(tmp_path / "out")


def test_what_a_killed_process_left_inside(tmp_path):
    """A draft that no one holds is taken away; one that is being written is not."""
    (tmp_path / "out" / ".out.12345678.tmp").mkdir(parents=True)
    fill(tmp_path / "out")
    need_filled(tmp_path / "out")
    (tmp_path / "busy").mkdir()
    with writing.new_folder(tmp_path / "busy") as draft:
        with pytest.raises(CheckpointError, match="busy: exists and is not an empty folder"):
            fill(tmp_path / "busy")
        (draft / "config.json").write_text("1")
    assert os.listdir(tmp_path / "busy") == ["config.json"]


@pytest.mark.parametrize("at", range(4))
def test_killed_while_files_are_moved_up(at, tmp_path):
    """The next one takes away what it finds of it, unless the last file, which makes it a model, was in its place."""
    out, replace = tmp_path / "out", os.replace
    out.mkdir()
    pid = os.fork()
    if not pid:
        seen = []

        def killing(path, target):
            if len(seen) == at:
                os.kill(os.getpid(), signal.SIGKILL)
            seen.append(replace(path, target))

        os.replace, shutil.rmtree = killing, lambda *args, **more: os.kill(os.getpid(), signal.SIGKILL)
        try:
            fill(out)
        finally:
            os._exit(0)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    assert len([name for name in os.listdir(out) if not name.endswith(".tmp")]) == at
    assert (out / "config.json").exists() == (at == 3)
    if at == 3:
        with pytest.raises(CheckpointError, match="nothing is overwritten"):
            fill(out)
    else:
        fill(out)
    need_filled(out)


def test_a_link_to_nothing_is_no_destination(tmp_path):
    (tmp_path / "out").symlink_to("nowhere")
    with pytest.raises(CheckpointError, match="out: a link to nowhere, where there is nothing; make that folder"):
        fill(tmp_path / "out")
