"""Weights as torch.save writes them: a zip archive of one pickle, which describes the tensors, and the bytes of each.

    pytorch_model.bin, or shards and pytorch_model.bin.index.json      consolidated.00.pth …

    archive/data.pkl      {"w": _rebuild_tensor_v2(storage "0", offset, shape, strides), …}     names and shapes
    archive/data/0        the bytes, as they are: not compressed, little-endian                 read from the file later

A pickle is a program for a small machine, and what it may call is anything. So these files are read only where the
caller allows it, and then nothing of what they name is called: the program is looked through first, and refused for an
instruction or a function that tensors do not need; then a machine of ours runs it, with stand-ins for the few that they
do, which note shapes and places. From there on the tensors are read like those of a safetensors file.

Why not Python's own machine, with stand-ins alone: BUILD there writes into whatever object it meets, a stand-in too,
and a dict takes any key, so that a tuple of tuples costs as much to hash as it has leaves, which can be 2⁶⁰, or ends
the process if it is deep enough.

Format: https://docs.pytorch.org/docs/2.10/notes/serialization.html, https://docs.python.org/3/library/pickletools.html.
Files of before torch 1.6 (2020) are another format and refused.
"""

import itertools
import math
import pickletools
import re
import reprlib
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.serialization import skip_data

from checkpoints.storage import files, foreign
from checkpoints.storage.files import Stored
from nanollm.errors import CheckpointError

SINGLE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"
LARGEST_PROGRAM = 2_000_000                      # bytes, twice what so many tensors with long names take
LONGEST_PROGRAM = 120_000                        # instructions, 33 a tensor; a rank of Llama-3.1-405B has 1,137 tensors
LARGEST_STACK = 100_000                          # values; pickle leaves at most a thousand names and tensors waiting
RANK = re.compile(r"consolidated\.(\d\d)\.pth", re.ASCII)
HOW = ("they can run code when they are read. If you trust where they come from, convert them once: "
       "python -m checkpoints.convert SRC DST --allow-pickle")
INSTRUCTIONS = frozenset("""
    PROTO STOP MARK EMPTY_DICT EMPTY_LIST EMPTY_TUPLE SETITEM SETITEMS APPEND APPENDS TUPLE TUPLE1 TUPLE2 TUPLE3
    NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE
    BINPUT LONG_BINPUT BINGET LONG_BINGET GLOBAL REDUCE BUILD BINPERSID
""".split())
DTYPES = {
    "Float": torch.float32, "Double": torch.float64, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Byte": torch.uint8, "Char": torch.int8, "Short": torch.int16, "Int": torch.int32, "Long": torch.int64,
    "Bool": torch.bool,
}


# ---- which files

def there(folder: Path) -> bool:
    """Whether a Hugging Face folder has its weights as pickles."""
    return any((folder / name).exists() for name in (SINGLE, INDEX))


def read_folder(folder: Path, allowed: bool) -> dict[str, Stored]:
    """All tensors of pytorch_model.bin, or of the shards that its index names. Raises CheckpointError."""
    need_allowed(folder, SINGLE if (folder / SINGLE).exists() else INDEX, allowed)
    return files.read_shards(folder, SINGLE, INDEX, read_header, ".bin")


def read_file(path: Path, allowed: bool) -> dict[str, Stored]:
    """All tensors of one file, whatever its name. Raises CheckpointError."""
    files.need_file(path)
    if not allowed and (kind := holds(path)):
        raise CheckpointError(f"{path}: {kind}")
    need_allowed(path.parent, path.name, allowed)
    return read_header(path)


def need_allowed(folder: Path | str, name: str, allowed: bool) -> None:
    """Raises CheckpointError, which says how to allow them, unless pickles are allowed."""
    if not allowed:
        raise CheckpointError(f"{folder}: only pickled weights ({name}); {HOW}")


def read_ranks(folder: Path, allowed: bool) -> list[dict[str, Stored]]:
    """The tensors of consolidated.00.pth, consolidated.01.pth …, each file by itself. Raises CheckpointError."""
    found = {match[0]: int(match[1]) for path in folder.iterdir() if (match := RANK.fullmatch(path.name))}
    names = sorted(found)
    if not names:
        raise CheckpointError(f"{folder}: params.json, but neither consolidated.safetensors nor consolidated.00.pth")
    if [found[name] for name in names] != list(range(len(names))):
        raise CheckpointError(f"{folder}: {', '.join(names)}: one of the ranks' files is missing")
    need_allowed(folder, names[0], allowed)
    return [read_header(files.inside(folder, name, "params.json", ".pth")) for name in names]


# ---- one file

def read_header(path: Path) -> dict[str, Stored]:
    """Names, shapes and places of the tensors in one file. Raises CheckpointError for any other, or harmful, file."""
    try:
        return _tensors(path)
    except CheckpointError:
        if kind := holds(path):                  # a sound file of another program's
            raise CheckpointError(f"{path}: {kind}") from None
        raise


def holds(path: Path) -> str | None:
    """What another program's file is, by the words in its pickle, of which nothing is run; None: no idea."""
    try:
        with zipfile.ZipFile(path) as archive:
            entry = next(one for one in archive.infolist() if one.filename.partition("/")[2] == "data.pkl")
            steps = pickletools.genops(archive.read(entry) if entry.file_size <= LARGEST_PROGRAM else b"")
            words = [argument for _, argument, _ in itertools.islice(steps, LONGEST_PROGRAM) if type(argument) is str]
    except Exception:                            # not an archive, or damaged in any way: that is said elsewhere
        return None
    return foreign.pickle(path, words)


@files.uncollected()
def _tensors(path: Path) -> dict[str, Stored]:
    program, places = _open_archive(path)
    if harmful := _foreign(program):
        called = ", ".join(harmful[:5])
        raise CheckpointError(f"{path}: the pickle calls {called}, which is not how tensors are stored; not read")
    try:
        found = _run(program)
    except Exception as error:                   # as below
        raise CheckpointError(f"{path}: data.pkl is damaged: {type(error).__name__}: {error!s:.200}") from None
    if isinstance(found, dict) and len(found) == 1 and isinstance(inner := next(iter(found.values())), dict):
        found = inner                            # one level around it, as trainers have
    if not isinstance(found, dict) or not found:
        raise CheckpointError(f"{path}: tensors by name expected, found {type(found).__name__}")
    return {name: _place(path, name, tensor, places) for name, tensor in found.items()}


def functions(path: Path) -> list[str]:
    """What the pickle of a file calls beside what tensors need, by name. Nothing is run. Raises CheckpointError."""
    return _foreign(_open_archive(path)[0])


def _open_archive(path: Path) -> tuple[list[tuple[str, Any]], dict[str, tuple[int, int]]]:
    """The program, and where in the file the bytes of each storage are: first byte and size."""
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
            if len(entries) < len(archive.infolist()):
                raise CheckpointError(f"{path}: an entry of the archive appears twice; not as torch.save writes it")
            packed = [name for name, entry in entries.items()
                      if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size]
            if packed:
                raise CheckpointError(f"{path}: {packed[0]} is compressed; not as torch.save writes it")
            if "data.pkl" not in entries or entries["data.pkl"].file_size > LARGEST_PROGRAM:
                how = "too large" if "data.pkl" in entries else "missing"
                raise CheckpointError(f"{path}: data.pkl in the archive is {how}; not as torch.save writes it")
            if "byteorder" in entries and archive.read(entries["byteorder"]) != b"little":
                raise CheckpointError(f"{path}: written on a big-endian machine")
            places = {}
            for name, entry in entries.items():
                if name.startswith("data/"):
                    file.seek(entry.header_offset)           # before each entry: 30 bytes, its name, and padding
                    head = file.read(30)
                    start = entry.header_offset + 30 + sum(struct.unpack("<HH", head[26:30]))
                    places[name[5:]] = (start, entry.file_size)
            return _instructions(path, archive.read(entries["data.pkl"])), places
    except (zipfile.BadZipFile, NotImplementedError, EOFError, OSError, ValueError, RuntimeError,
            struct.error) as error:
        with open(path, "rb") as file:
            head = file.read(256)
        if head.startswith(b"PK\x03\x04"):
            raise CheckpointError(f"{path}: a truncated or damaged zip archive; download it again") from None
        kind = files.what_it_is(head)
        raise CheckpointError(f"{path}: not tensors as torch.save writes them since 1.6: {kind or error}") from None


def _instructions(path: Path, pickle: bytes) -> list[tuple[str, Any]]:
    """The program, as names and arguments of instructions. Raises CheckpointError for one that tensors do not need."""
    program: list[tuple[str, Any]] = []
    steps = pickletools.genops(pickle)
    while True:
        try:
            instruction, argument, _ = next(steps)
        except StopIteration:
            return program
        except Exception as error:               # a damaged program ends in whatever its bytes lead to
            raise CheckpointError(f"{path}: data.pkl is damaged: {error}") from None
        if len(program) == LONGEST_PROGRAM:
            raise CheckpointError(f"{path}: data.pkl has more than {LONGEST_PROGRAM} instructions; "
                                  "not as torch.save writes it")
        if instruction.name not in INSTRUCTIONS:
            raise CheckpointError(f"{path}: data.pkl has the instruction {instruction.name}, "
                                  "which is not how tensors are stored; not read")
        program.append((instruction.name, argument))


def _foreign(program: list[tuple[str, Any]]) -> list[str]:
    """What the program names beside what tensors need."""
    named = {argument for name, argument in program if name == "GLOBAL" and argument not in STAND_INS}
    return sorted(argument.replace(" ", ".") for argument in named)


# ---- the machine

class _Storage(NamedTuple):
    dtype: torch.dtype
    key: str


class _Tensor(NamedTuple):
    """What a pickle says of a tensor."""
    storage: _Storage
    first: int                                   # element of the storage
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _rebuild_tensor(storage: Any, first: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
    if not isinstance(storage, _Storage):
        raise TypeError(f"{reprlib.repr(storage)} is no storage")
    return _Tensor(storage, first, shape, strides)


STAND_INS: dict[str, Callable[..., Any] | torch.dtype] = {
    "torch._utils _rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils _rebuild_parameter": lambda tensor, *_: tensor,
    "collections OrderedDict": lambda: {},
    **{f"torch {name}Storage": dtype for name, dtype in DTYPES.items()},
}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


def _run(program: list[tuple[str, Any]]) -> Any:
    """What the program leaves. Raises whatever a damaged one leads to."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    for name, argument in program:
        match name:
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(argument)
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "NONE" | "NEWTRUE" | "NEWFALSE" | "EMPTY_TUPLE":
                stack.append(CONSTANTS[name])
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                width = int(name[-1])
                stack[-width:] = [tuple(stack[-width:])]
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "EMPTY_LIST":
                stack.append([])
            case "APPEND":
                _list(stack, -2).append(stack.pop())
            case "APPENDS":
                items = since_mark()
                _list(stack, -1).extend(items)
            case "EMPTY_DICT":
                stack.append({})
            case "SETITEM":
                items = [stack.pop(), stack.pop()][::-1]
                _set(stack[-1], items)
            case "SETITEMS":
                items = since_mark()
                _set(stack[-1], items)
            case "GLOBAL":
                stack.append(STAND_INS[argument])
            case "REDUCE":
                arguments = stack.pop()
                stack.append(stack.pop()(*arguments))
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "BUILD":
                stack.pop()                      # attributes: torch notes the versions of modules so
            case "STOP":
                return stack.pop()
        if len(stack) + len(marks) > LARGEST_STACK:
            raise MemoryError(f"more than {LARGEST_STACK} values wait on the stack")


def _list(stack: list[Any], place: int) -> list[Any]:
    if not isinstance(stack[place], list):
        raise TypeError(f"appended to {type(stack[place]).__name__}")
    return stack[place]


def _set(target: Any, items: list[Any]) -> None:
    """Names and values, in turn, into a dict. Names are text: any other key would be hashed."""
    names, values = items[::2], items[1::2]
    if not isinstance(target, dict) or not all(isinstance(name, str) for name in names) or len(names) != len(values):
        odd = next((name for name in names if not isinstance(name, str)), target)
        raise TypeError(f"values by name expected, found {reprlib.repr(odd)}")
    before = len(target)
    target.update(zip(names, values, strict=True))
    if len(target) < before + len(names):
        raise ValueError("a name appears twice")


def _storage(saved: Any) -> _Storage:
    kind, dtype, key, *_ = saved
    if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str):
        raise TypeError(f"{reprlib.repr(saved)} is no storage")
    return _Storage(dtype, key)


def _place(path: Path, name: str, tensor: Any, places: dict[str, tuple[int, int]]) -> Stored:
    if not isinstance(tensor, _Tensor):
        raise CheckpointError(f"{path}: {name}: a tensor expected, found {type(tensor).__name__}")
    shape, strides = tensor.shape, tensor.strides
    listed = isinstance(shape, tuple) and isinstance(strides, tuple) and len(shape) == len(strides) <= 8
    if not listed or not all(type(number) is int and number >= 0 for number in (tensor.first, *shape, *strides)):
        raise CheckpointError(f"{path}: {name}: a shape and strides of whole numbers expected, found "
                              f"{reprlib.repr(shape)} and {reprlib.repr(strides)}")
    row_by_row = [*itertools.accumulate(reversed(shape[1:]), lambda step, width: step * width, initial=1)][::-1]
    steps = zip(shape, strides, row_by_row, strict=False)       # row_by_row has one even for a scalar
    if math.prod(shape) and any(width > 1 and step != wanted for width, step, wanted in steps):
        raise CheckpointError(f"{path}: {name}: stored with strides {strides}, not row by row; "
                              "write it again with .contiguous()")
    start, room = places.get(tensor.storage.key, (0, 0))
    dtype = tensor.storage.dtype
    inside, size = tensor.first * dtype.itemsize, math.prod(shape) * dtype.itemsize
    if inside + size > room or start + room > path.stat().st_size:
        raise CheckpointError(f"{path}: {name}: its {size} bytes are not all in the file")
    return Stored(path, dtype, shape, start + inside, size)


def lay_out(path: Path, tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> dict[str, Stored]:
    """Write a file whose tensors have names, shapes and places, and as yet no values; whoever calls this fills them.

    No memory is taken: what torch.empty gives is not touched. The checksums in the archive are not those of the values;
    torch ignores them. Raises OSError if the system does not take the bytes."""
    try:
        with skip_data():
            torch.save({name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in tensors.items()}, path)
    except RuntimeError as error:                # torch's word for a full disk, a quota, or `ulimit -f`
        raise OSError(f"{path.name}: the system takes no more bytes ({str(error).splitlines()[0]})") from error
    return read_header(path)
