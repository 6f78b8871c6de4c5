"""Model folders and safetensors files, read without trusting them.

A safetensors file is three pieces, one after the other:

    8 bytes      N, the length of the header, little-endian
    N bytes      {"lm_head.weight": {"dtype": "BF16", "shape": [32000, 4096], "data_offsets": [0, 262144000]}, …}
    the rest     the tensors, back to back, little-endian; offsets count from the start of this piece

The header says every name, shape and dtype, so a whole model is checked before a byte of weights is read. A header that
does not add up is refused, and where the file is something else altogether (a git-lfs pointer, a web page, a pickle)
the error says what it is. A model is `model.safetensors`, or the shards that `model.safetensors.index.json` names;
other files in the folder are never guessed at, because repositories keep the same weights twice
(`consolidated.safetensors`).

A link is followed wherever it leads, as it was made on this machine: the hub's cache keeps files so, and people keep
shards on another disk. What stands at its end must be a regular file. A *name in an index* was written by whoever made
the model, so it must be the plain name of a file in the folder.

Format: https://github.com/huggingface/safetensors/blob/v0.5.3/README.md#format
"""

import contextlib
import errno
import gc
import io
import json
import math
import os
import re
import reprlib
import stat
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanollm.errors import CheckpointError, counted

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"(model-\d{5}-of-\d{5}\.safetensors|pytorch_model-\d{5}-of-\d{5}\.bin)", re.ASCII)
LARGEST_HEADER = 25_000_000                      # bytes, room for 200,000 tensors; parsed, JSON takes 25 times its size
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "BOOL": torch.bool, "U8": torch.uint8, "U32": torch.uint32,
    "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
}

AGAIN = "; download it again"                    # what helps where bytes were lost on the way
ENTRY = {"dtype", "shape", "data_offsets"}       # of a tensor in a header
KINDS = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"), (stat.S_ISCHR, "a device"),
         (stat.S_ISBLK, "a device"))


@dataclass(frozen=True)
class Stored:
    """Where one tensor lies."""
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int                                   # bytes from the start of the file
    size: int                                    # bytes

    def run_dtype(self, wanted: torch.dtype) -> torch.dtype:
        """The dtype that `read_run` fills, where `wanted` is what will be made of it: as in the file.

        Packed weights have none of their own."""
        return self.dtype

    def packed(self, first: int, run: Tensor) -> tuple[int, memoryview]:
        """The byte of the file where a run that begins with the first-th element goes, and what is written there."""
        return self.start + first * self.dtype.itemsize, as_bytes(run)

    def read_run(self, first: int, run: Tensor) -> None:
        """Fill `run`, contiguous, on the CPU and of `run_dtype`, with the elements from the first-th on.

        Raises CheckpointError if the file has ended."""
        with _open(self.file) as file:
            file.seek(self.start + first * self.dtype.itemsize)
            found = file.readinto(as_bytes(run))
        if found != run.nbytes:
            raise CheckpointError(f"{self.file}: truncated while it was read: "
                                  f"expected {run.nbytes} bytes, found {found}{AGAIN}")


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Keep Python from looking for garbage: where much is made and little of it is garbage, that takes most time."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


def read_json(path: Path, largest: int = LARGEST_HEADER) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError if there is none, or if it is not one, or names a key twice."""
    need_file(path)
    if path.stat().st_size > largest:
        raise CheckpointError(f"{path}: {path.stat().st_size} bytes, too large for what it should be")
    with _open(path) as file:
        return parse_json(file.read(), str(path))


@contextlib.contextmanager
def refused_in_words() -> Iterator[None]:
    """What the system refuses inside the block (no permission, a name too long) becomes a CheckpointError."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be read: {error.strerror}") from error


def need_file(path: Path, because: str = "") -> None:
    """Raises CheckpointError, with what is there instead, if the path, all links followed, is no regular file."""
    try:
        found = path.stat()
    except PermissionError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except OSError as error:
        if not path.is_symlink():
            raise CheckpointError(f"{path}: {'missing' if because else 'no such file'}{because}") from error
        loop = error.errno == errno.ELOOP
        end = "a link that leads back to itself" if loop else f"a link to {os.readlink(path)}, where there is nothing"
        raise CheckpointError(f"{path}: {end}{because}") from error
    if not stat.S_ISREG(found.st_mode):
        kind = next((name for is_it, name in KINDS if is_it(found.st_mode)), "something else")
        link = "a link to " if path.is_symlink() else ""
        raise CheckpointError(f"{path}: {link}{kind}, where a file is expected{because}")


def _open(path: Path) -> io.BufferedReader:
    try:
        return open(path, "rb")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def parse_json(text: bytes, where: str) -> dict[str, Any]:
    """The object in a JSON text; Python's own parser takes the last of two equal keys, this one neither."""
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise CheckpointError(f"{where}: {Counter(name for name, _ in pairs).most_common(1)[0][0]!r} appears twice")
        return found

    try:
        value = json.loads(text.decode(), object_pairs_hook=unique)
    except RecursionError:
        raise CheckpointError(f"{where}: JSON nested too deeply") from None
    except ValueError as error:                  # not UTF-8, not JSON, a number of ten thousand digits
        raise CheckpointError(f"{where}: {what_it_is(text) or f'not JSON ({error}){AGAIN}'}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: a JSON object expected, found {type(value).__name__}")
    return value


def what_it_is(head: bytes) -> str | None:
    """What a file really holds that should have held something else, as far as its first bytes tell; None: no idea."""
    start = head[:256].lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, not the file itself; run `git lfs pull` in the folder"
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page, not the file itself; the download failed, perhaps for want of a login"
    if head.startswith(b"PK\x03\x04"):
        return "a zip archive, as torch.save writes"
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "a Python pickle"
    return "a GGUF file" if head.startswith(b"GGUF") else None


def read_header(path: Path) -> dict[str, Stored]:
    """Names, shapes and places of the tensors in one file. Raises CheckpointError, with the cause, on a damaged one."""
    need_file(path)
    size = path.stat().st_size
    if size == 0:
        raise CheckpointError(f"{path}: empty{AGAIN}")
    with _open(path) as file:
        head = file.read(256)
        length = int.from_bytes(head[:8], "little")
        if size < 8 or length > min(size - 8, LARGEST_HEADER) or head[8:9] != b"{":
            kind = what_it_is(head)
            raise CheckpointError(f"{path}: {f'not safetensors, but {kind}' if kind else _why_no_header(length, size)}")
        file.seek(8)
        header = parse_json(file.read(length), f"{path}, header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ should be strings by name")

    data = 8 + length
    stored = {name: _read_entry(path, name, entry, data) for name, entry in header.items()}
    end = data
    for name, one in sorted(stored.items(), key=lambda item: (item[1].start, item[1].size)):
        if one.start != end:
            how = "inside" if one.start < end else "with a gap after"
            raise CheckpointError(f"{path}: {name} starts at byte {one.start}, {how} the one before, "
                                  f"which ends at {end}")
        end = one.start + one.size
    if end != size:
        how = "truncated" if end > size else "bytes after the last tensor"
        raise CheckpointError(f"{path}: {how}: expected {end} bytes, found {size}{AGAIN}")
    return stored


def _why_no_header(length: int, size: int) -> str:
    if size < 8:
        return f"truncated: {size} bytes, not even the length of a header{AGAIN}"
    if length > LARGEST_HEADER:
        return f"not safetensors: a header of {length} bytes is too large"
    if length > size - 8:
        return f"truncated in the header: expected at least {8 + length} bytes, found {size}{AGAIN}"
    return "not safetensors: the header does not start with {"


def _read_entry(path: Path, name: str, entry: Any, data: int) -> Stored:
    def wrong(expected: str) -> CheckpointError:
        return CheckpointError(f"{path}: {name}: {expected} expected, found {reprlib.repr(entry)}")

    if not isinstance(entry, dict) or entry.keys() != ENTRY:
        raise wrong("dtype, shape and data_offsets")
    shape, offsets, dtype = entry["shape"], entry["data_offsets"], None
    if isinstance(entry["dtype"], str):
        dtype = DTYPES.get(entry["dtype"])
    if dtype is None:
        raise wrong(f"a dtype among {', '.join(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > 8 or not all(map(_whole, shape)):
        raise wrong("a shape of whole numbers")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_whole, offsets)):
        raise wrong("two offsets")
    size = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != size:
        raise wrong(f"offsets {size} bytes apart")
    return Stored(path, dtype, tuple(shape), data + offsets[0], size)


def _whole(value: Any) -> bool:
    return type(value) is int and value >= 0             # a bool is an int to isinstance


def read_folder(folder: Path) -> dict[str, Stored]:
    """All tensors of the model in `folder`. Raises CheckpointError if there is no model, or not all of one."""
    return read_shards(folder, SINGLE, INDEX, read_header, ".safetensors")


def read_shards(folder: Path, single: str, index: str, read: Callable[[Path], dict[str, Stored]],
                suffix: str) -> dict[str, Stored]:
    """All tensors of the file `single`, or of the shards that the file `index` names; `read` gives those of a file."""
    if os.path.lexists(folder / single):
        return read(inside(folder, single, single, suffix))
    if not os.path.lexists(folder / index):
        raise CheckpointError(f"{folder}: {_why_no_weights(folder)}")
    places = shard_names(folder / index)
    stored: dict[str, Stored] = {}
    for shard in dict.fromkeys(places.values()):
        found = read(inside(folder, shard, index, suffix))
        _same_in_both(folder, stored, found)
        stored |= {name: one for name, one in found.items() if name not in stored or places.get(name) == shard}
    lost = [name for name, shard in places.items() if name not in stored or stored[name].file.name != shard]
    if lost:
        first = f"{lost[0]}, in {places[lost[0]]}"
        raise CheckpointError(f"{folder / index}: not in the shard it names: {counted(len(lost), 'tensor')}; "
                              f"the first is {first}")
    return stored


def shard_names(index: Path) -> dict[str, str]:
    """The file of each tensor, as an index says, unchecked. Raises CheckpointError."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index}: weight_map should give a file for each tensor")
    return {name: str(shard) for name, shard in places.items()}


def _same_in_both(folder: Path, stored: dict[str, Stored], found: dict[str, Stored]) -> None:
    """Tensors of a shard that an earlier one has too: copies are passed over with a warning, others are an error."""
    twice = [name for name in found if name in stored]
    for name in twice:
        one, other = stored[name], found[name]
        if not equal_bytes(one, other):
            raise CheckpointError(f"{folder}: {name} is in two shards, {one.file.name} and {other.file.name}, "
                                  "with other values in each; delete the shard that does not belong here")
    if twice:
        files = f"{stored[twice[0]].file.name} and {found[twice[0]].file.name}"
        warnings.warn(f"{folder}: in two shards with the same bytes: {counted(len(twice), 'tensor')} ({twice[0]}, "
                      f"in {files}); one copy is read", stacklevel=2)


def inside(folder: Path, name: str, said_by: str, suffix: str = ".safetensors") -> Path:
    """A weights file of `folder`, or where a link of that name leads. Raises CheckpointError for any other name."""
    if not re.fullmatch(r"[\w.-]{1,200}" + re.escape(suffix), name, re.ASCII):
        raise CheckpointError(f"{folder}: {said_by} names {name!r}; a plain file name ending in {suffix} expected")
    need_file(folder / name, f"; {said_by} needs it")
    return folder / name


def _why_no_weights(folder: Path) -> str:
    shards = sorted(path.name for path in folder.iterdir() if SHARD.fullmatch(path.name))
    if shards:
        index = INDEX if shards[0].endswith(".safetensors") else "pytorch_model.bin.index.json"
        return (f"{shards[0]}{f' … {shards[-1]} are shards' if len(shards) > 1 else ' is a shard'} of a model, and "
                f"{index}, which says what is in each, is missing; it lies in the repository that they came from: "
                "download it into the folder")
    suffixes = (".bin", ".pt", ".pth", ".gguf", ".safetensors")
    others = sorted(path.name for path in folder.iterdir() if path.suffix in suffixes)
    return f"neither {SINGLE} nor {INDEX}" + (f"; {', '.join(others)} follow another layout" if others else "")


def equal_bytes(a: Stored, b: Stored, most: int = 1 << 20) -> bool:
    """Whether two stored tensors are the same, bit for bit, without reading either whole: `most` elements at a time."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    count = math.prod(a.shape)
    memory = [torch.empty(min(most, count), dtype=a.dtype) for _ in (a, b)]
    for first in range(0, count, most):
        runs = [whole[: count - first] for whole in memory]
        for one, run in zip((a, b), runs, strict=True):
            one.read_run(first, run)
        if not same_bits(*runs):
            return False
    return True


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two contiguous tensors on the CPU have the same bits. For a few megabytes numpy's way is the fastest."""
    return np.array_equal(as_bytes(a), as_bytes(b))
