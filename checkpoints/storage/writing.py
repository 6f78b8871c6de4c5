"""Writing a model folder, so that half of one never exists.

Everything goes into a hidden folder beside the destination, is forced to disk, and takes its name in one rename at the
end. Where the destination is there already, and empty, the hidden folder is inside it: it may be a mount, or a link to
another disk, or stand in a folder that is not ours to write in. Then the files are moved up at the end, each by a
rename, and what describes the model (config.json, params.json) last: before that no one takes the folder for a model.

A full disk or an interrupt leaves what was there before. A process that is killed leaves the hidden folder as well,
which the next one with the same destination takes away, with what had been moved up already. What is being written is
locked, so that no one else takes it away.

A file is laid out first: its header, and as much room as its tensors need. The place of each tensor is then a Stored,
like one that is read, and they are filled in any order. The order inside a file is that of the safetensors library, so
one file holding the same tensors is the same file, byte for byte.
"""

import contextlib
import glob
import json
import math
import os
import shutil
import sys
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from checkpoints.storage.files import DTYPES, INDEX, SINGLE, Stored
from nanollm.errors import CheckpointError

if sys.platform != "win32":                      # there, drafts that a killed process left stay
    import fcntl

NAMES = {dtype: name for name, dtype in DTYPES.items()}
MOVING = ".moving"                               # in a draft: the names of what is about to be moved up, a line each
DESCRIPTIONS = ("config.json", "params.json")    # without one of them no folder is a model
Tensors = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


@contextlib.contextmanager
def new_folder(destination: Path) -> Iterator[Path]:
    """A folder to write in, whose files stand in `destination` at the end of the block; it vanishes if the block fails.

    Raises CheckpointError if `destination` is neither absent nor an empty folder, or cannot be written."""
    destination = destination.absolute()
    try:
        home = _home_of_drafts(destination)
        draft = home / f".{destination.name}.{uuid.uuid4().hex[:8]}.tmp"
        try:
            _make(draft, destination)
            with locked(draft):
                yield draft
                for path in [*_files_in(draft), draft]:
                    _to_disk(path)
                if home == destination:
                    _move_up(draft)
                else:
                    os.replace(draft, destination)
            _to_disk(home)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(f"{destination}: cannot write: {error}") from error


def need_place(destination: Path) -> None:
    """Raises CheckpointError where `new_folder` would, for who reads long before it writes."""
    try:
        _home_of_drafts(destination.absolute())
    except OSError as error:
        raise CheckpointError(f"{destination}: cannot write: {error}") from error


def _make(draft: Path, destination: Path) -> None:
    """The hidden folder. Raises CheckpointError with the folder, of those that are there, that takes none."""
    try:
        draft.mkdir(parents=True)
    except PermissionError as error:
        there = next(one for one in draft.parents if one.exists())
        raise CheckpointError(f"{destination}: cannot write: the folder {there} is not writable "
                              f"({error.strerror})") from error


def _home_of_drafts(destination: Path) -> Path:
    """The folder in which to write: `destination` if it is there, else the one that it will be in. What killed
    processes left is taken away. Raises CheckpointError if there is something else in the way."""
    if destination.is_symlink() and not destination.exists():
        raise CheckpointError(f"{destination}: a link to {os.readlink(destination)}, where there is nothing; "
                              "make that folder, or take the link away")
    home = destination if destination.is_dir() else destination.parent
    for left in home.glob(f".{glob.escape(destination.name)}.*.tmp"):
        with contextlib.suppress(OSError), locked(left):
            whole = any((home / name).exists() for name in DESCRIPTIONS)
            if home == destination and (left / MOVING).exists() and not whole:
                names = (left / MOVING).read_text().split("\n")
                _remove([home / name for name in names if name not in ("", ".", "..") and "/" not in name])
            shutil.rmtree(left)
    if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
        raise CheckpointError(f"{destination}: exists and is not an empty folder; nothing is overwritten")
    return home


def _files_in(folder: Path) -> list[Path]:
    """All files and folders below, those inside a folder before it."""
    return sorted(folder.rglob("*"), key=lambda path: -len(path.parts))


def _move_up(draft: Path) -> None:
    """What is in the draft, into the folder that it is in: all of it, or nothing if the system refuses one."""
    paths, moved = sorted(draft.iterdir(), key=lambda path: path.name in DESCRIPTIONS), []
    (draft / MOVING).write_text("\n".join(path.name for path in paths))
    _to_disk(draft)
    try:
        for path in paths:
            os.replace(path, draft.parent / path.name)
            moved.append(draft.parent / path.name)
    except BaseException:
        _remove(moved[::-1])                     # what describes the model first
        raise


def _remove(paths: list[Path]) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The folder is ours for the block; a process that is killed gives it back. Raises OSError if another has it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        if sys.platform != "win32":
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file, formatted as transformers does."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def nbytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of this dtype and shape."""
    return math.prod(shape) * dtype.itemsize


def lay_out(folder: Path, tensors: Tensors, shard_bytes: int, single: str = SINGLE) -> dict[str, Stored]:
    """Make room for the weights, in shards of at most `shard_bytes` (a larger tensor has its own), with their index.

    `tensors` gives dtypes and shapes. The answer is where each goes; nothing is written there yet."""
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name, (dtype, shape) in tensors.items():
        size = nbytes(dtype, shape)
        if size > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    if len(shards) == 1:
        return _lay_out_file(folder / single, shards[0], tensors)
    places: dict[str, Stored] = {}
    for number, names in enumerate(shards, 1):
        places |= _lay_out_file(folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors", names, tensors)
    total = sum(one.size for one in places.values())
    weight_map = {name: places[name].file.name for name in sorted(places)}
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return places


def _lay_out_file(path: Path, names: list[str], tensors: Tensors) -> dict[str, Stored]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}    # transformers reads no file without this
    end = 0
    order = sorted(names, key=lambda name: (-tensors[name][0].itemsize, name))    # wide dtypes first keeps all aligned
    for name in order:
        dtype, shape = tensors[name]
        start, end = end, end + nbytes(dtype, shape)
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        file.truncate(8 + len(text) + end)
    data = 8 + len(text)
    return {name: Stored(path, *tensors[name], data + header[name]["data_offsets"][0], nbytes(*tensors[name]))
            for name in order}
