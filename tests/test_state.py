"""state.py and runs.py in one process: what is read is what was written, or an error; what is not ours is left alone.

The ranks of a checkpoint are played one after another, on torch's "fake" process group, which knows its rank and its
size and sends nothing. tests/test_resume.py has real ones.
"""

import argparse
import contextlib
import errno
import json
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from nanollm.errors import RunError
from nanollm.training import distributed, runs, state
from nanollm.training import log as logs
from nanollm.training.distributed import World

FACTS = {"balance": [[0.1, 0.9]], "recent": [[5.704117838541667, 1e-300]]}


@dataclass(frozen=True)
class Rank(World):
    """A rank that hears of the others through `savers`, one for each."""
    savers: Sequence[state.Saver]

    def all_gather_objects(self, value: object) -> list:
        mine = self.savers[self.rank].result if self.savers else None
        return [saver.result for saver in self.savers] if value is mine is not None else [value] * self.size


@contextlib.contextmanager
def rank(number: int, size: int, savers: Sequence[state.Saver] = (), replicas: int = 1) -> Iterator[Rank]:
    dist.init_process_group("fake", store=FakeStore(), rank=number, world_size=size)
    try:
        shape = (size,) if replicas == 1 else (replicas, size // replicas)
        yield Rank(
            number, size, torch.device("cpu"),
            init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :]), savers,
        )
    finally:
        dist.destroy_process_group()


def values() -> dict[str, Tensor]:
    """Whole tensors. 2 or 4 ranks cut the experts along their second dimension, 3 along their first. 7 rows do
    not come out even on 2 ranks, 3 leave the last of 4 with none; the last tensor is not sliced."""
    torch.manual_seed(1)
    return {
        "model.embed.weight": torch.randn(40, 8), "model.layers.0.gain": torch.randn(7).bfloat16(),
        "model.odd": torch.randn(3, 2, 2), "model.experts": torch.randn(3, 8, 5),
        "optimizer.odd.step": torch.tensor(12.0),
    }


def zeros() -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in values().items()}


def slices(whole: dict[str, Tensor], world: Rank) -> dict[str, Tensor]:
    """What the rank holds: rows as torch.chunk cuts them, or of experts that do not come out even their second
    dimension, copied."""
    mesh, made = world.mesh, {}
    for name, tensor in whole.items():
        cut = distributed.shard_placement(mesh.size(-1), tensor) or Shard(0)
        chunks = tensor.chunk(mesh.size(-1), cut.dim) if tensor.ndim else ()
        number = mesh.get_local_rank(mesh.ndim - 1)
        local = chunks[number] if number < len(chunks) else tensor[:0] if tensor.ndim else tensor
        placements = [*[Replicate()] * (mesh.ndim - 1), cut]
        made[name] = (
            DTensor.from_local(
                local.clone(), mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
            )
            if tensor.ndim
            else tensor.clone()
        )
    return made


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def save(
    folder: Path, size: int = 2, step: int = 200, keep: int = 2, replicas: int = 1,
    whole: dict[str, Tensor] | None = None,
) -> str | None:
    """A checkpoint as `size` ranks write it; what finish says on the first."""
    savers: list[state.Saver] = []
    for number in range(size):
        with rank(number, size, savers, replicas) as world:
            savers.append(state.Saver(folder, world, keep))
            savers[-1].begin(step, slices(whole or values(), world), FACTS)
    return [saver.finish() for saver in reversed(savers)][-1]


def load(folder: Path) -> dict[str, Tensor]:
    """As one rank reads it, which needs every file. Where that fails not a bit of a tensor has changed."""
    with rank(0, 1) as world:
        tensors = slices(zeros(), world)
        try:
            facts = state.load(folder, tensors)
        except RunError:
            assert all((local(tensor) == 0).all() for tensor in tensors.values())
            raise
    assert facts == FACTS | {"step": int(folder.name)}
    return {name: local(tensor) for name, tensor in tensors.items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def saved(tmp_path) -> Path:
    assert save(tmp_path) is None
    return tmp_path / "00000200"


# ---- what is read is what was written

@pytest.mark.parametrize("size", [1, 2, 4])
def test_any_number_of_ranks_reads_what_any_number_wrote(tmp_path, size):
    assert save(tmp_path, size) is None
    for readers in (1, 2, 3, 4):
        for number in range(readers):
            with rank(number, readers) as world:
                found, expected = slices(zeros(), world), slices(values(), world)
                assert state.load(tmp_path / "00000200", found) == FACTS | {"step": 200}
                assert equal(
                    {name: local(tensor) for name, tensor in found.items()},
                    {name: local(tensor) for name, tensor in expected.items()},
                )


def test_of_equal_copies_one_is_written(tmp_path):
    """2 groups of 2 ranks hold the same: the files of the second group are empty."""
    assert save(tmp_path, 4, replicas=2) is None
    files = state.read_manifest(tmp_path / "00000200")["files"]
    assert [file["pieces"].get("model.embed.weight") for file in files] == [
        [[0, 20], [0, 8]], [[20, 40], [0, 8]], None, None,
    ]
    assert equal(load(tmp_path / "00000200"), values())


def test_what_is_written_is_what_was_there_at_the_beginning(tmp_path, monkeypatch):
    """Training goes on while the thread writes."""
    on, write = threading.Event(), state.write_shards
    monkeypatch.setattr(state, "write_shards", lambda *args: (on.wait(60), write(*args)))
    savers: list[state.Saver] = []
    with rank(0, 1, savers) as world:
        tensors = slices(values(), world)
        savers.append(state.Saver(tmp_path, world, 2))
        savers[0].begin(200, tensors, FACTS)
        for tensor in tensors.values():
            local(tensor).zero_()
        assert savers[0].busy and state.complete(tmp_path) == []                # not a checkpoint before it is finished
        with pytest.raises(AssertionError):
            savers[0].begin(201, tensors, FACTS)
        on.set()
        assert savers[0].finish() is None and not savers[0].busy and savers[0].finish() is None
    assert equal(load(tmp_path / "00000200"), values())


# ---- or an error

def test_each_of_200_flipped_bits_is_found(saved):
    rng, places = np.random.default_rng(0), []
    files = sorted(saved.iterdir())
    assert [path.name for path in files] == [
        "manifest.crc32", "manifest.json", "rank-0.safetensors", "rank-1.safetensors",
    ]
    for number in range(200):
        path = files[number % 4]
        whole = path.read_bytes()
        broken, bit = bytearray(whole), int(rng.integers(8 * len(whole)))
        broken[bit // 8] ^= 1 << bit % 8
        path.write_bytes(broken)
        with pytest.raises(RunError) as error:
            load(saved)
        assert (
            str(error.value).startswith(f"{saved}: damaged: ")
            and path.name in str(error.value)
            and "\n" not in str(error.value)
        )
        path.write_bytes(whole)
        if path.suffix == ".safetensors":
            places.append("header" if bit // 8 < 8 + int.from_bytes(whole[:8], "little") else "data")
    assert min(places.count("header"), places.count("data")) > 20
    assert equal(load(saved), values())


@pytest.mark.parametrize("name", ["manifest.crc32", "manifest.json", "rank-0.safetensors", "rank-1.safetensors"])
def test_a_file_that_is_cut_short_or_missing_is_named(saved, name):
    whole = (saved / name).read_bytes()
    for length in (0, len(whole) // 4, len(whole) // 2, 3 * len(whole) // 4, len(whole) - 1):
        (saved / name).write_bytes(whole[:length])
        with pytest.raises(RunError, match=f"00000200: damaged: .*{name}.*move this folder away"):
            load(saved)
    (saved / name).unlink()
    with pytest.raises(RunError, match=f"00000200: damaged: {name}: No such file"):
        load(saved)


def test_files_of_two_ranks_in_each_others_place_are_found(saved):
    a, b = saved / "rank-0.safetensors", saved / "rank-1.safetensors"
    a.rename(saved / "c"), b.rename(a), (saved / "c").rename(b)
    with pytest.raises(RunError, match="rank-0.safetensors has CRC-32"):
        load(saved)


def test_rows_that_no_file_has_are_missed(saved):
    """A whole manifest that lists too little: a bug of ours, but not a silent one."""
    manifest = state.read_manifest(saved)
    del manifest["files"][1]["pieces"]["model.embed.weight"]
    state.write_manifest(saved, manifest)
    with pytest.raises(RunError, match="model.embed.weight: 320 numbers are wanted, 160 of them are there"):
        load(saved)


def test_another_format_is_not_read(saved):
    state.write_manifest(saved, state.read_manifest(saved) | {"format": 2})
    with pytest.raises(RunError, match="00000200: manifest.json has format 2, this version reads 1"):
        load(saved)


@pytest.mark.parametrize(
    "name, other, words",
    [
        (
            "model.odd", torch.zeros(3, 2, 3),
            r"model.odd is \['float32', 3, 2, 2\] there, this run has \['float32', 3, 2, 3\]",
        ),
        ("model.odd", torch.zeros(3, 2, 2).bfloat16(), r".* this run has \['bfloat16', 3, 2, 2\]"),
        ("model.odd", None, "model.odd is .* there, this run has none"),
        ("model.more", torch.zeros(3), "model.more is absent there"),
    ],
)
def test_tensors_of_another_run_are_not_read(saved, name, other, words):
    whole = {key: tensor for key, tensor in (zeros() | {name: other}).items() if tensor is not None}
    with rank(0, 1) as world:
        tensors = slices(whole, world)
        with pytest.raises(RunError, match=f"00000200: {words}"):
            state.load(saved, tensors)
        assert all((local(tensor) == 0).all() for tensor in tensors.values())


# ---- a checkpoint is there or it is not

def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_the_newest_checkpoints_stay(tmp_path):
    for step in (99_999_998, 99_999_999, 100_000_000):                          # names that do not sort as text
        assert save(tmp_path, step=step, keep=2) is None
    assert [path.name for path in state.complete(tmp_path)] == ["99999999", "100000000"] and len(names(tmp_path)) == 2


def test_a_run_that_went_back_replaces_what_it_passes(saved):
    other = {name: tensor + 1 for name, tensor in values().items()}
    assert save(saved.parent, whole=other) is None
    assert names(saved.parent) == ["00000200"] and equal(load(saved), other)


def test_drafts_and_what_is_not_ours_are_no_checkpoints(saved):
    for junk in (".00000300.tmp", ".00000100.old.tmp", "notes", "300-copy", "v300"):
        (saved.parent / junk).mkdir()
    (saved.parent / "00000400").write_text("a file")
    assert state.complete(saved.parent) == [saved]
    assert save(saved.parent, step=300) is None  # and the next one clears the drafts away
    assert names(saved.parent) == ["00000200", "00000300", "00000400", "300-copy", "notes", "v300"]


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def refuse(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, path: str) -> None:
    """Let owner.name fail as a full disk does wherever one of its arguments ends in `path`."""
    original = getattr(owner, name)
    monkeypatch.setattr(
        owner, name, lambda *args: no_space() if any(str(arg).endswith(path) for arg in args) else original(*args)
    )


@pytest.mark.parametrize(
    "owner, name, path",
    [
        (Path, "mkdir", ".00000300.tmp"), (state, "save_file", "rank-0.safetensors"),
        (state, "save_file", "rank-1.safetensors"), (state, "crc", "rank-1.safetensors"),
        (state, "sync", "rank-1.safetensors"), (Path, "write_bytes", "manifest.json"),
        (Path, "write_bytes", "manifest.crc32"), (os, "rename", "00000300"),
    ],
)
def test_a_disk_that_is_full_costs_that_checkpoint_and_no_other(saved, monkeypatch, owner, name, path):
    original = getattr(owner, name)
    def failing(*args, **more):
        if any(str(arg).endswith(path) for arg in args):
            no_space()
        return original(*args, **more)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing)
        assert "No space left" in save(saved.parent, step=300)
    assert names(saved.parent) == ["00000200"] and equal(load(saved), values())
    assert save(saved.parent, step=400) is None and names(saved.parent) == ["00000200", "00000400"]


def test_where_steps_is_a_file_the_error_names_it(tmp_path):
    (tmp_path / "steps").write_text("")
    assert "steps" in save(tmp_path / "steps") and names(tmp_path) == ["steps"]


def test_a_checkpoint_that_cannot_be_deleted_stays_whole(saved, monkeypatch):
    with monkeypatch.context() as patch:
        refuse(patch, os, "rename", ".00000200.old.tmp")
        assert save(saved.parent, step=300, keep=1) is None
        assert names(saved.parent) == ["00000200", "00000300"] and equal(load(saved), values())
    assert save(saved.parent, step=400, keep=1) is None and names(saved.parent) == ["00000400"]


# ---- the run folder

NO_MONITORS = argparse.Namespace(tensorboard=False, wandb=None, mlflow=None)
OPTIONS = {"steps": 8, "out": Path("runs/demo"), "data": [Path("a"), Path("b")], "keep": 2, "resume": False}


def test_a_run_is_compared_with_what_it_was(tmp_path):
    runs.record(tmp_path, {"options": OPTIONS, "data": {"fingerprint": 7}}, resume=False)
    runs.compare(
        tmp_path,
        {"options": OPTIONS | {"keep": 5, "out": Path("elsewhere"), "resume": True}, "data": {"fingerprint": 7}},
    )
    for change, words in (
        ({"options": OPTIONS | {"steps": 9}}, r"--steps 8 → 9"),
        ({"data": {"fingerprint": 8}}, r"data.fingerprint 7 → 8"),
        ({"options": OPTIONS | {"tokenizer": Path("a")}}, r"--tokenizer None → a"),
        ({"options": {"z_loss": 0.1}}, r"--z-loss 0.0 → 0.1"),               # not recorded: not given
    ):
        with pytest.raises(RunError, match=f"{tmp_path}: holds another run .*{words}.*--resume --force"):
            runs.compare(tmp_path, change)


def test_a_model_of_another_shape_is_refused_in_one_line_that_does_not_advise_force(tmp_path):
    """As a toy has it that a later version changed. What the older version did not record counts as a difference."""
    large, small = ({"dim": dim, "layers": [[count, {"is": "Layer"}]]} for dim, count in ((192, 4), (128, 6)))
    runs.record(tmp_path, {"options": OPTIONS, "model": large}, resume=False)
    with pytest.raises(RunError) as error:
        runs.compare(tmp_path, {"options": OPTIONS, "model": small, "muon": {"momentum": 0.9}})
    assert str(error.value) == (
        f"{tmp_path}: holds another run (model.dim 192 → 128; other model.layers; muon.momentum None → 0.9); "
        "--force starts over, --out names another folder"
    )
    with pytest.raises(RunError, match=r"\(muon.momentum None → 0.9\); with --resume --force"):
        runs.compare(tmp_path, {"options": OPTIONS, "model": large, "muon": {"momentum": 0.9}})


def test_another_method_is_one_difference_and_more_steps_are_explained(tmp_path):
    """What follows from the method is no difference of its own, and nobody is told to change it halfway."""
    dpo = {"init": Path("base"), "preference": [Path("a")], "loss": "dpo", "label_smoothing": 0.0, "gamma": None}
    runs.record(tmp_path, {"options": OPTIONS | dpo | {"lora_rank": 8}}, resume=False)
    simpo = OPTIONS | dpo | {"loss": "simpo", "label_smoothing": None, "gamma": 1.0, "lora_rank": 8}
    with pytest.raises(RunError) as error:
        runs.compare(tmp_path, {"options": simpo})
    assert str(error.value) == (
        f"{tmp_path}: holds another run (--preference --loss dpo → --preference --loss simpo); a run goes on with "
        "the method that it began with: repeat its command with --resume; --out names another folder, where --adapter "
        f"{tmp_path} beside the same --init begins from its adapter"
    )
    with pytest.raises(RunError, match="--loss dpo → text"):
        runs.compare(tmp_path, {"options": OPTIONS | dict.fromkeys(dpo)})
    with pytest.raises(RunError, match="--steps 8 → 9.; the learning rate falls over all of --steps.*had other rates"
                                       ".*--resume --force it goes on at the rates of a run of 9"):
        runs.compare(tmp_path, {"options": OPTIONS | dpo | {"steps": 9}})


def test_a_run_that_starts_over_leaves_nothing_of_an_adapter_or_a_reward_model(tmp_path):
    for name in ("run.json", "adapter_config.json", "adapter_model.safetensors", "score.safetensors"):
        (tmp_path / name).write_text("{}")
    runs.clear(tmp_path)
    assert names(tmp_path) == ["run.json"]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"options": 3}', "\x00"])
def test_what_is_not_a_record_is_named(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(RunError, match="run.json: not a record of train.py"):
        runs.compare(tmp_path, {"options": OPTIONS})
    runs.record(tmp_path, {"options": OPTIONS}, resume=True)                    # --resume --force comes here
    assert len(json.loads((tmp_path / "run.json").read_text())["starts"]) == 1


def test_every_start_is_recorded(tmp_path):
    for resume, count in ((False, 1), (True, 2), (True, 3), (False, 1)):
        runs.record(tmp_path, {"options": OPTIONS}, resume)
        record = json.loads((tmp_path / "run.json").read_text())
        assert len(record["starts"]) == count and record["options"]["data"] == ["a", "b"]
    assert record["starts"][0]["packages"]["torch"] == torch.__version__
    assert names(tmp_path) == ["run.json"]


def test_a_folder_is_taken_only_if_it_is_new_or_it_is_said_what_becomes_of_the_run_in_it(tmp_path):
    folder = tmp_path / "run"
    for there in ("", ".", "lock", "data", ".run.json.tmp"):                    # nothing yet, or killed while it began
        if there:
            (folder / there).mkdir() if there in (".", "data") else (folder / there).touch()
        runs.check(folder, OPTIONS, resume=False, force=False)
    (folder / "thesis.tex").write_text("years of work")
    for resume, force in ((False, False), (True, False), (False, True), (True, True)):
        with pytest.raises(RunError, match="not empty, and not made by train.py"):
            runs.check(folder, OPTIONS, resume, force)
        with pytest.raises(RunError, match="thesis.tex: not empty, and not made"):
            runs.check(folder / "thesis.tex", OPTIONS, resume, force)
    runs.record(folder, {"options": OPTIONS}, resume=False)
    assert save(folder / "steps") is None
    with pytest.raises(RunError, match="holds a run with a checkpoint at step 200; --resume goes on"):
        runs.check(folder, OPTIONS, resume=False, force=False)
    with pytest.raises(RunError, match="--steps 8 → 9"):
        runs.check(folder, OPTIONS | {"steps": 9}, resume=True, force=False)
    for resume, force in ((True, False), (False, True), (True, True)):
        runs.check(folder, OPTIONS, resume, force)


def test_a_run_that_starts_over_takes_away_what_was_a_runs_and_nothing_else(tmp_path):
    ours = [
        "config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json",
        "log.jsonl", "loss.png",
    ]
    theirs = [
        "notes.md", "my_model.safetensors", "log.jsonl.old", "data/train-00000.bin",
        "steps/00000200-copy/rank-0.safetensors", "steps/00000300",
    ]
    for name in (*ours, *theirs, "steps/00000200/manifest.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    runs.record(tmp_path, {"options": OPTIONS}, resume=False)
    runs.clear(tmp_path)
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert left == sorted(
        [*theirs, "run.json"]
    )  # run.json goes when the next takes its place: whose folder is it else?


def test_what_cannot_be_written_is_one_error_and_leaves_what_was_there(tmp_path, monkeypatch):
    runs.record(tmp_path, {"options": OPTIONS}, resume=False)
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n')
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for owner, name in ((Path, "write_text"), (os, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, no_space)
            with pytest.raises(
                RunError, match=f"{tmp_path}/run.json: cannot write: No space left on device; make room"
            ):
                runs.record(tmp_path, {"options": OPTIONS}, resume=True)
            with pytest.raises(RunError, match=f"{tmp_path}/log.jsonl: cannot write: No space left"):
                logs.Log(tmp_path, 9, NO_MONITORS, facts={})
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# ---- the lock

def test_a_folder_is_held_by_one_at_a_time(tmp_path):
    folder = tmp_path / "new" / "run"
    with runs.locked(folder):
        (folder / "log.jsonl").touch()
        with (
            pytest.raises(
                RunError, match=f"{folder}: another run is at work in it .process {os.getpid()}.; wait for it"
            ),
            runs.locked(folder),
        ):
            pass
    (folder / "lock").write_text("99999 of a process that is no more")
    with runs.locked(folder):
        assert (folder / "lock").read_text() == str(os.getpid())


def test_a_folder_that_was_made_for_nothing_goes_again(tmp_path):
    (tmp_path / "there").mkdir()
    for folder, left in ((tmp_path / "a" / "b" / "run", ["there"]), (tmp_path / "there", ["there"])):
        with contextlib.suppress(RunError), runs.locked(folder):
            raise RunError("bad data")
        assert names(tmp_path) == left and not (tmp_path / "there" / "lock").exists()
    with runs.locked(tmp_path / "a" / "run"):
        (tmp_path / "a" / "other run").mkdir()
    assert names(tmp_path / "a") == ["other run"]


def test_a_disk_that_is_full_does_not_break_the_lock():
    """/dev/full takes no byte: every write to it fails as on a full disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", lambda path, *args, **more: open("/dev/full", *args, **more))
        patch.setattr(Path, "iterdir", lambda path: iter([Path("lock"), Path("data")]))
        with runs.locked(Path("/dev")):
            held = True
    assert held


@pytest.mark.parametrize("place", ["file/run", "/proc/run", "x" * 300])
def test_a_folder_that_cannot_be_made_is_one_error(tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"run: cannot write: |x: cannot be read: File name too long"):
        runs.check(tmp_path / place, OPTIONS, resume=False, force=False)
        with runs.locked(tmp_path / place):
            pass
    assert names(tmp_path) == ["file"]


# ---- the log, the model, signals

def test_a_log_goes_on_after_the_step_that_the_run_goes_on_from(tmp_path):
    path = tmp_path / "log.jsonl"
    with logs.Log(tmp_path, 0, NO_MONITORS, facts={}) as log:
        for step in (1, 2, 3, 4):
            log(step, loss=step / 3, text="line\u2028separator\n")
    whole = path.read_text()
    for torn in ('{"step": 5, "lo', '{"step": 5, "loss": 1.0}\n\0\0\0', "\udcff"):
        path.write_text(whole + torn, errors="surrogateescape")
        assert [entry["step"] for entry in logs.read_log(path)] in ([1, 2, 3, 4], [1, 2, 3, 4, 5])
        with logs.Log(tmp_path, 2, NO_MONITORS, facts={}) as log:
            log(3, loss=1.0)
            assert [entry["step"] for entry in logs.read_log(path)] == [1, 2, 3]        # on disk at once
        assert path.read_text() == "".join(whole.splitlines(True)[:2]) + '{"step": 3, "loss": 1.0}\n'
    assert logs.read_log(path)[0] == {"step": 1, "loss": 1 / 3, "text": "line\u2028separator\n"}


def test_a_log_that_cannot_grow_is_one_error(tmp_path):
    with logs.Log(tmp_path, 0, NO_MONITORS, facts={}) as log:
        log.file = open("/dev/full", "a", buffering=1)
        assert log.request == 0 and log.check() is None
        log(1, loss=1.0)  # the other ranks have no log: it must not raise here
        assert log.request == runs.STOP
        with pytest.raises(RunError, match="/dev/full: cannot write: No space left on device; .*--resume"):
            log.check()


def test_a_model_is_replaced_when_the_new_one_is_complete(tmp_path):
    (tmp_path / "model.safetensors").write_text("old")
    (tmp_path / ".model.killed").mkdir()                                        # left by a process that was killed here
    with pytest.raises(RunError, match="the model cannot be written: No space left"), runs.replacing(tmp_path) as draft:
        draft.mkdir()
        (draft / "model.safetensors").write_text("half")
        no_space()
    assert names(tmp_path) == ["model.safetensors"] and (tmp_path / "model.safetensors").read_text() == "old"
    with runs.replacing(tmp_path) as draft:
        draft.mkdir()
        (draft / "model.safetensors").write_text("new")
        assert (tmp_path / "model.safetensors").read_text() == "old"
    assert names(tmp_path) == ["model.safetensors"] and (tmp_path / "model.safetensors").read_text() == "new"


def test_signals_are_requests_until_they_are_served(ctrl_c_heard):
    every = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.getsignal(number) for number in every]
    with runs.signals() as requests:
        assert requests.pending == 0
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert requests.pending == runs.LEAVE                                   # the larger one, whichever came last
        requests.served(runs.SAVE)                                               # the ranks had agreed before it came
        assert requests.pending == runs.LEAVE
        requests.served(runs.LEAVE)
        assert requests.pending == 0
        os.kill(os.getpid(), signal.SIGUSR1)
        assert requests.pending == runs.SAVE
        os.kill(os.getpid(), signal.SIGINT)
        assert requests.pending == runs.INTERRUPT
        with pytest.raises(KeyboardInterrupt):                                  # a second Ctrl-C waits for no step
            os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in every] == before


def test_where_ctrl_c_is_ignored_a_run_ignores_it():
    """As a script's background processes do."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with runs.signals() as requests:
            os.kill(os.getpid(), signal.SIGINT)
            assert requests.pending == 0
    finally:
        signal.signal(signal.SIGINT, before)
