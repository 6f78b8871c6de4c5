"""Weights as torch.save writes them: a zip archive of one pickle, which says what there is, and the bytes of each storage.

    pytorch_model.bin, or shards and pytorch_model.bin.index.json      consolidated.00.pth …                .pt

    archive/data.pkl      {"w": _rebuild_tensor_v2(storage "0", offset, shape, strides), …}       names and shapes
    archive/data/0        the bytes, as they are: not compressed, little-endian                   read later, from the file

A pickle is a program, and can be one that does anything. So these files are read only where the caller allows it, and even then by
torch's restricted reader, after a look at which functions the program names: tensors are built from five, and any other is refused
with its name. torch reads data.pkl alone, in its FakeTensorMode: that gives for each tensor where its bytes are, and takes no memory.
From there on the tensors are read like those of a safetensors file.

Format: https://docs.pytorch.org/docs/2.10/notes/serialization.html. Files of before torch 1.6 (2020) are another format and refused.
"""

import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.serialization import skip_data

from checkpoints import files
from checkpoints.files import LARGEST_HEADER, Stored
from nanollm.errors import CheckpointError

SINGLE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"
RANK = re.compile(r"consolidated\.(\d\d)\.pth", re.ASCII)
STORAGES = frozenset(f"torch {kind}Storage" for kind in "Float Double Half BFloat16 Byte Char Short Int Long Bool".split())
HARMLESS = STORAGES | {
    "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", "torch.nn.parameter Parameter", "collections OrderedDict",
    "torch.storage UntypedStorage", "torch FloatTensor", "torch HalfTensor", "torch BFloat16Tensor",
}
HOW = "they can run code when they are read. If you trust where they come from, convert them once: python -m checkpoints.convert SRC DST --allow-pickle"


def there(folder: Path) -> bool:
    """Whether a Hugging Face folder has its weights as pickles."""
    return any((folder / name).exists() for name in (SINGLE, INDEX))


def read_folder(folder: Path, allowed: bool) -> dict[str, Stored]:
    """All tensors of pytorch_model.bin, or of the shards that its index names. Raises CheckpointError."""
    if not allowed:
        raise CheckpointError(f"{folder}: only pickled weights ({SINGLE if (folder / SINGLE).exists() else INDEX}); {HOW}")
    return files.read_shards(folder, SINGLE, INDEX, read_header, ".bin")


def read_ranks(folder: Path, allowed: bool) -> list[dict[str, Stored]]:
    """The tensors of consolidated.00.pth, consolidated.01.pth and so on, each file by itself. Raises CheckpointError."""
    names = sorted(path.name for path in folder.iterdir() if RANK.fullmatch(path.name))
    if not names:
        raise CheckpointError(f"{folder}: params.json, but neither consolidated.safetensors nor consolidated.00.pth")
    if [int(RANK.fullmatch(name)[1]) for name in names] != list(range(len(names))):
        raise CheckpointError(f"{folder}: {', '.join(names)}: one of the ranks' files is missing")
    if not allowed:
        raise CheckpointError(f"{folder}: only pickled weights ({names[0]}); {HOW}")
    return [read_header(files.inside(folder, name, "params.json", ".pth")) for name in names]


def read_header(path: Path) -> dict[str, Stored]:
    """Names, shapes and places of the tensors in one file. Raises CheckpointError on what is no such file, or would run code."""
    named = functions(path)
    harmful = sorted(named - HARMLESS)
    if harmful:
        raise CheckpointError(f"{path}: the pickle calls {', '.join(one.replace(' ', '.') for one in harmful[:5])}, which is not how tensors are stored; not read")
    try:
        with FakeTensorMode():
            found = torch.load(path, weights_only=True)
    except Exception as error:                   # a damaged pickle ends in whatever its bytes lead to
        raise CheckpointError(f"{path}: not readable as tensors by name: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from None
    if isinstance(found, dict) and found.keys() <= {"model", "state_dict", "module"} and len(found) == 1:
        found = next(iter(found.values()))       # one level around it, as trainers have
    if not isinstance(found, dict) or not found:
        raise CheckpointError(f"{path}: tensors by name expected, found {type(found).__name__}")
    return {name: _place(path, name, tensor) for name, tensor in found.items()}


def functions(path: Path) -> set[str]:
    """What the pickle of a file names, as "module name", without running it. Raises CheckpointError if there is no sound archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
            if "data.pkl" not in entries or entries["data.pkl"].file_size > LARGEST_HEADER:
                raise CheckpointError(f"{path}: {'no' if 'data.pkl' not in entries else 'too large a'} data.pkl in the archive; not as torch.save writes it")
            packed = [name for name, entry in entries.items() if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size]
            if packed or len(entries) > 400_000:
                raise CheckpointError(f"{path}: {packed[0] if packed else len(entries)}: compressed, or too many; not as torch.save writes it")
            if "byteorder" in entries and archive.read(entries["byteorder"]) != b"little":
                raise CheckpointError(f"{path}: written on a big-endian machine")
            program = archive.read(entries["data.pkl"])
    except (zipfile.BadZipFile, NotImplementedError, EOFError, OSError, ValueError, RuntimeError) as error:
        with open(path, "rb") as file:
            head = file.read(256)
        raise CheckpointError(f"{path}: not tensors as torch.save writes them since 1.6: {files.what_it_is(head) or error}") from None
    try:
        return {argument if code.name == "GLOBAL" else f"{code.name}" for code, argument, _ in pickletools.genops(program)
                if code.name in ("GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4")}
    except Exception as error:                   # as above
        raise CheckpointError(f"{path}: data.pkl is damaged: {error}") from None


def _place(path: Path, name: Any, tensor: Any) -> Stored:
    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
        raise CheckpointError(f"{path}: {name!r}: a tensor expected, found {type(tensor).__name__}")
    if not tensor.is_contiguous():
        raise CheckpointError(f"{path}: {name}: stored with strides {tensor.stride()}, not row by row; write it again with .contiguous()")
    storage = tensor.untyped_storage()
    start = getattr(storage, "_checkpoint_offset", None)
    size, inside = tensor.numel() * tensor.dtype.itemsize, tensor.storage_offset() * tensor.dtype.itemsize
    if start is None or inside < 0 or inside + size > storage.nbytes() or start + inside + size > path.stat().st_size:
        raise CheckpointError(f"{path}: {name}: its {size} bytes are not all in the file")
    return Stored(path, tensor.dtype, tuple(tensor.shape), start + inside, size)


def lay_out(path: Path, tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> dict[str, Stored]:
    """Write a file whose tensors have their names, shapes and places, and as yet no values. They are filled by whoever calls this.

    No memory is taken: what torch.empty gives is not touched. The checksums in the archive are not those of the values; torch ignores them."""
    with skip_data():
        torch.save({name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in tensors.items()}, path)
    return read_header(path)
