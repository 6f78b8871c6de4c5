"""GGUF: the one file in which llama.cpp keeps a model, what it is, and its tokenizer. Little-endian throughout.

    4 bytes     "GGUF"
    header      version u32 (2 or 3), tensors u64, keys u64
    keys        name, type u32, value         "llama.block_count" 4 (u32) 32
                                              a text is its length u64, then UTF-8
                                              an array is its type u32, count u64, elements
    tensors     name, dimensions u32, sizes u64 …, type u32, offset u64      sizes the innermost first: (in, out)
    the rest    from the next multiple of general.alignment (32) on: the tensors in that order, each padded to one

    type      elements a block    bytes    an element of the block
    F32                1            4      itself
    F16 BF16           1            2      itself
    Q8_0              32           34      d q            d float16, q 8 bits
    Q4_0              32           18      d (q − 8)      q 4 bits
    Q4_1              32           20      d q + m        q 4 bits; d, m float16
    Q4_K             256          144      d s q − e m    q 4 bits; d, e float16; s, m 6 bits, for each 32
    Q6_K             256          210      d s (q − 32)   q 6 bits; s 8 bits, for each 16
    and all others that the `gguf` package unpacks: Q5_0, Q5_1, Q2_K, Q3_K, Q5_K, IQ…, TQ…, MXFP4

The gguf package knows the sizes of the blocks, and unpacks them. A model with a quantised tensor is read as bfloat16.
The header is read here, as in files.py: the package's GGUFReader makes an object of every token (19 s and 1.5 GB for
the 262,144 of Gemma 3 and their merges, measured), and trusts the counts that it finds. Here no memory is taken for
what the file does not have, tokens and merges stay in the file until someone wants them (`read_list`), and a whole
model is checked before a byte of its weights is read.

Format: https://github.com/ggml-org/ggml/blob/9d325133eed396b7bf005a53a83d9747cbd8bde1/docs/gguf.md
What keys and tensors mean: layouts/gguf_names.py
"""

import functools
import math
import mmap
import reprlib
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from checkpoints.storage import files
from checkpoints.storage.files import Stored
from nanollm.errors import CheckpointError

MAGIC = b"GGUF"
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
FLOAT32, TEXT, ARRAY = 6, 8, 9
# far beyond any model's, and yet read in a second
MOST_KEYS, MOST_TENSORS = 10_000, 100_000
MOST_TEXTS = 1 << 21                             # in arrays, all together: tokens and merges
LONGEST_NAME = (1 << 16) - 1                     # bytes
LONGEST_TEXT = 1 << 24                           # bytes of a value: chat templates
LONGEST_LIST = 10_000                            # numbers of an array that are kept; layers have arrays, tokens too


@dataclass(frozen=True)
class LazyArray:
    """An array that stays in the file: texts, or more numbers than LONGEST_LIST. `read_list` has its values."""
    kind: int                                    # type of an element
    count: int
    at: int                                      # byte where the elements start


@dataclass(frozen=True)
class Entry:
    """A tensor as the header has it."""
    name: str
    shape: tuple[int, ...]                       # (out, in), as everywhere else
    kind: int                                    # its type
    offset: int                                  # from the start of the data


@dataclass(frozen=True)
class Header:
    """What a file says before its data."""
    metadata: dict[str, Any]
    entries: list[Entry]
    data: int                                    # byte where the tensors start


@dataclass(frozen=True)
class Blocked(Stored):
    """A tensor in blocks. dtype is what it reads as unless something else is wanted."""
    raw: Stored                                  # bytes (blocks, bytes of a block)
    kind: int                                    # as in Entry
    elements: int                                # of a block
    added: float                                 # what was added to every element when it was stored

    def run_dtype(self, wanted: torch.dtype) -> torch.dtype:
        return wanted                            # rounded once, to what is wanted

    def read_run(self, first: int, run: Tensor) -> None:
        """The blocks that the run touches are read and unpacked, in float32."""
        from gguf import GGMLQuantizationType, quants
        top, end = first // self.elements, -(-(first + run.numel()) // self.elements)
        blocks = torch.empty((end - top) * self.raw.shape[1], dtype=torch.uint8)
        self.raw.read_run(top * self.raw.shape[1], blocks)
        with np.errstate(all="ignore"):          # a scale that is not finite is an error with a name, in stream.py
            # as one row: the package takes sixteen at a time, in a loop
            whole = torch.from_numpy(quants.dequantize(blocks.numpy()[None], GGMLQuantizationType(self.kind)))[0]
        part = whole[first - top * self.elements :][: run.numel()]
        run.copy_((part - self.added if self.added else part).view(run.shape))


def package(path: Path) -> ModuleType:
    """The gguf package. Raises CheckpointError, which says how to install it, where it is missing."""
    try:
        import gguf
    except ImportError:
        raise CheckpointError(f"{path}: GGUF is read with a package that is not installed: "
                              "pip install -e \".[gguf]\"") from None
    return gguf


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF does, whatever it is called."""
    try:
        with open(path, "rb") as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


@functools.cache
def dequantizable() -> dict[int, str]:
    """Number and name of each type that the package can dequantise."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
    found = {}
    for kind in GGMLQuantizationType:
        with np.errstate(all="ignore"):
            try:
                quants.dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
            except (NotImplementedError, KeyError):
                continue
        found[int(kind)] = kind.name
    return found


def dtype_of(entries: Iterable[Entry]) -> torch.dtype:
    """What a model with these tensors reads as: float32 or float16 if it is stored so, else bfloat16."""
    found = {dequantizable().get(entry.kind) for entry in entries}
    return torch.float32 if found == {"F32"} else torch.float16 if found <= {"F32", "F16"} else torch.bfloat16


def places(path: Path, header: Header, dtype: torch.dtype, norm_offset: float) -> dict[str, Stored]:
    """Where each tensor of a file lies. Raises CheckpointError unless they follow one another to its end."""
    quants, kinds, data = package(path), dequantizable(), header.data
    alignment = header.metadata.get("general.alignment", 32)
    stored: dict[str, Stored] = {}
    end, size = 0, path.stat().st_size
    for entry in header.entries:
        if entry.kind not in kinds:
            named = {int(kind): kind.name for kind in quants.GGMLQuantizationType}
            kind = named.get(entry.kind, f"of type {entry.kind}")
            raise CheckpointError(f"{path}: {entry.name} is {kind}, which the installed gguf package does not unpack; "
                                  f"it does {', '.join(kinds.values())}")
        elements, nbytes = quants.GGML_QUANT_SIZES[quants.GGMLQuantizationType(entry.kind)]
        if entry.shape[-1] % elements:
            raise CheckpointError(f"{path}: {entry.name} {entry.shape} is {kinds[entry.kind]}; "
                                  f"expected rows of whole blocks of {elements}")
        if entry.offset != end:
            raise CheckpointError(f"{path}: {entry.name} has offset {entry.offset}; "
                                  f"expected {end}, after the one before")
        length = math.prod(entry.shape) // elements * nbytes
        if data + end + length > size:
            raise CheckpointError(f"{path}: truncated: {entry.name} ends at byte {data + end + length}, "
                                  f"the file at {size}{files.AGAIN}")
        if entry.name in stored:
            raise CheckpointError(f"{path}: {entry.name} appears twice")
        added = norm_offset if entry.name.endswith("norm.weight") else 0.0
        raw = Stored(path, torch.uint8, (length // nbytes, nbytes), data + end, length)
        stored[entry.name] = Blocked(path, dtype, entry.shape, data + end, length, raw, entry.kind, elements, added)
        end = -(-(end + length) // alignment) * alignment
    return stored


def shortest(value: float) -> float:
    """The number that was written: the shortest one that is this float32. 9.99999974737875e-06 is 1e-05."""
    return float(str(np.float32(value)))


# ---- the header

class Cursor:
    """What comes next in a file. Raises CheckpointError where that would be beyond its end."""

    def __init__(self, data: mmap.mmap, where: str) -> None:
        self.data, self.where, self.at, self.texts = data, where, 0, 0

    def skip(self, count: int) -> int:
        """Move on by so many bytes. Returns the place before."""
        if count > len(self.data) - self.at:
            raise CheckpointError(f"{self.where}: truncated in the header: "
                                  f"{count} bytes expected at byte {self.at}, "
                                  f"the file has {len(self.data)}{files.AGAIN}")
        self.at += count
        return self.at - count

    def take(self, form: str) -> tuple[Any, ...]:
        """The next values, of this form of the struct module."""
        return struct.unpack_from(form, self.data, self.skip(struct.calcsize(form)))

    def text(self, most: int = LONGEST_NAME) -> str:
        """The next text. Raises CheckpointError if it is longer than `most` bytes."""
        length, = self.take("<Q")
        start = self.skip(length)
        if length > most:
            raise CheckpointError(f"{self.where}: a text of {length} bytes at byte {start}; at most {most} expected")
        try:
            return self.data[start : start + length].decode()
        except UnicodeDecodeError:
            raise CheckpointError(f"{self.where}: the text at byte {start} is not UTF-8") from None

    def skip_texts(self, count: int) -> None:
        """Move on over so many texts. A header has many, so only their lengths are read."""
        at, end, length = self.at, len(self.data), struct.Struct("<Q").unpack_from
        for _ in range(count):
            if at + 8 > end:
                break
            at += 8 + length(self.data, at)[0]
        else:
            self.skip(at - self.at)
            return
        self.skip(at + 8 - self.at)              # refuses

    def value(self, key: str, kind: int) -> Any:
        """The value of a key; a LazyArray for arrays of text and long ones."""
        if kind == TEXT:
            return self.text(LONGEST_TEXT)
        if kind == ARRAY:
            return self.array(key, *self.take("<IQ"))
        if kind not in SCALARS:
            raise CheckpointError(f"{self.where}: {key} has a value of type {kind}; the format knows 0 to 12")
        value, = self.take(SCALARS[kind])
        return shortest(value) if kind == FLOAT32 else value

    def array(self, key: str, kind: int, count: int) -> list[Any] | LazyArray:
        """The numbers of an array, up to LONGEST_LIST of them; else where it is.

        Raises CheckpointError for arrays of arrays, and too many texts."""
        if kind == TEXT:
            self.texts += count
            if self.texts > MOST_TEXTS:
                raise CheckpointError(f"{self.where}: {key} brings the texts in arrays to {self.texts}; "
                                      f"at most {MOST_TEXTS} expected")
            start = self.at
            self.skip_texts(count)
            return LazyArray(kind, count, start)
        if kind not in SCALARS:
            raise CheckpointError(f"{self.where}: {key} is an array of type {kind}; numbers or text expected")
        form = SCALARS[kind][1]
        start = self.skip(count * struct.calcsize(f"<{form}"))
        if count > LONGEST_LIST:
            return LazyArray(kind, count, start)
        return list(struct.unpack_from(f"<{count}{form}", self.data, start))


def read_list(path: Path, values: list[Any] | LazyArray) -> list[Any]:
    """The values of an array, as the header of this file has it. Raises CheckpointError for text that is not UTF-8."""
    if isinstance(values, list):
        return values
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = Cursor(data, str(path))
        cursor.at = values.at
        if values.kind == TEXT:
            return [cursor.text(LONGEST_TEXT) for _ in range(values.count)]
        return list(cursor.take(f"<{values.count}{SCALARS[values.kind][1]}"))


def read_header(path: Path) -> Header:
    """Keys and tensors. Raises CheckpointError, naming the cause, on a damaged file."""
    try:
        with open(path, "rb") as file:
            head = file.read(256)
            if not head:
                raise CheckpointError(f"{path}: empty{files.AGAIN}")
            if head[:4] != MAGIC:
                kind = files.what_it_is(head) or f"a file that starts with {head[:4]!r}"
                raise CheckpointError(f"{path}: not GGUF, but {kind}")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _walk(Cursor(data, str(path)))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def _walk(cursor: Cursor) -> Header:
    _, version = cursor.take("<4sI")
    if version not in (2, 3):
        big = " (big-endian)" if version >= 1 << 24 else ""
        raise CheckpointError(f"{cursor.where}: version {version}{big}; expected 2 or 3, little-endian")
    tensors, keys = cursor.take("<QQ")
    if tensors > MOST_TENSORS or keys > MOST_KEYS:
        raise CheckpointError(f"{cursor.where}: {tensors} tensors and {keys} keys; "
                              f"at most {MOST_TENSORS} and {MOST_KEYS} expected")
    metadata: dict[str, Any] = {}
    for _ in range(keys):
        key = cursor.text()
        if key in metadata:
            raise CheckpointError(f"{cursor.where}: {key!r} appears twice")
        metadata[key] = cursor.value(key, *cursor.take("<I"))
    entries = [_entry(cursor) for _ in range(tensors)]
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
        raise CheckpointError(f"{cursor.where}: general.alignment is {reprlib.repr(alignment)}; "
                              f"expected a power of two up to {1 << 20}")
    return Header(metadata, entries, -(-cursor.at // alignment) * alignment)


def _entry(cursor: Cursor) -> Entry:
    name, (dimensions,) = cursor.text(), cursor.take("<I")
    if not 1 <= dimensions <= 4:
        raise CheckpointError(f"{cursor.where}: {name!r} has {dimensions} dimensions; 1 to 4 expected")
    sizes = cursor.take(f"<{dimensions}Q")
    if min(sizes) < 1:
        raise CheckpointError(f"{cursor.where}: {name!r} has sizes {sizes}; numbers above 0 expected")
    kind, offset = cursor.take("<IQ")
    return Entry(name, sizes[::-1], kind, offset)
