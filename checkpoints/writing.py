"""Writing a model folder, so that half of one never exists.

Everything goes into a hidden sibling of the destination, is forced to disk, and takes its name in one rename at the
end. A crash, a full disk or an interrupt leaves what was there before. Tensors are written one at a time, so memory holds
the model and one tensor, wherever the model is. The order inside a file is that of the safetensors library, so one file
holding the same tensors is the same file, byte for byte.
"""

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from checkpoints.files import DTYPES, INDEX, SINGLE, as_bytes
from nanollm.errors import CheckpointError

NAMES = {dtype: name for name, dtype in DTYPES.items()}


@contextlib.contextmanager
def new_folder(destination: Path) -> Iterator[Path]:
    """A folder to write in, which becomes `destination` at the end of the block, or vanishes if the block fails."""
    destination = destination.absolute()
    if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
        raise CheckpointError(f"{destination}: exists and is not an empty folder; nothing is overwritten")
    draft = destination.parent / f".{destination.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        draft.mkdir(parents=True)
        yield draft
        for path in [*draft.iterdir(), draft]:
            _to_disk(path)
        os.replace(draft, destination)
        _to_disk(destination.parent)
    except OSError as error:
        raise CheckpointError(f"{destination}: cannot write: {error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_folder(folder: Path, tensors: Mapping[str, Tensor], read: Callable[[str], Tensor], shard_bytes: int) -> None:
    """Write the weights, in shards of at most `shard_bytes` (a larger tensor has one to itself), and their index.

    `tensors` gives names, shapes and dtypes, on the meta device; `read(name)` is called for one at a time."""
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name, tensor in tensors.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= tensor.nbytes
    if len(shards) == 1:
        return _write_file(folder / SINGLE, shards[0], tensors, read)
    files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for file, names in zip(files, shards):
        _write_file(folder / file, names, tensors, read)
    places = {name: file for file, names in zip(files, shards) for name in names}
    total = sum(tensor.nbytes for tensor in tensors.values())
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))})


def _write_file(path: Path, names: list[str], tensors: Mapping[str, Tensor], read: Callable[[str], Tensor]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}    # transformers reads no file without this
    end = 0
    order = sorted(names, key=lambda name: (-tensors[name].itemsize, name))    # wide dtypes first keeps all aligned
    for name in order:
        start, end = end, end + tensors[name].nbytes
        header[name] = {"dtype": NAMES[tensors[name].dtype], "shape": list(tensors[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in order:
            file.write(as_bytes(read(name).cpu().contiguous()))
