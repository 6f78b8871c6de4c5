"""A shard: a file of tokens, written whole or not at all, and read only if it is what was written.

The format is llm.c's (`dev/data/data_common.py`): 256 little-endian 32-bit integers, then N < 2³¹ tokens. What llm.c
leaves 0 holds facts of ours, so each program reads the other's files:

    integer   0          1         2   3      4       5            6         7 … 14                      15 … 255
              magic      version   N   OURS   crc32   largest id   end + 1   sha256 of the tokenizer     0
              20240520   1         uint16 tokens                   0: not known
              20240801   7         uint32 tokens

The crc is that of the whole file with a 0 in its own place. A raw .bin (nanoGPT) is tokens and nothing else: uint16,
unless {"dtype": "uint32"} stands in a meta.json beside it.

**Read once, not at each start.** `verify` reads every byte, and notes in .verified.json beside the shard what it found:
size, time of writing, crc, largest id. A file that still has that size and that time is not read again, by any rank of
any run. What was written less than two seconds before is not noted: another write could leave the same time. A folder
that cannot be written to is read each time. Rows are read through a memory map, a page at a time, whatever the size of
the file.

Shapes: N tokens of a file.
"""

import contextlib
import functools
import json
import os
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from nanollm.errors import DataError

HEADER = 1024                   # bytes
FORMATS: dict[int, tuple[int, np.dtype]] = {        # magic: version, dtype
    20240520: (1, np.dtype("<u2")),
    20240801: (7, np.dtype("<u4")),
}
OURS = 0x6E616E6F               # the integers 4 … 14 mean what is drawn above
AGAIN = "damaged or something else: make or fetch it again"
DRAFT = ".draft"                # a folder in the one that it is to become
VERIFIED = ".verified.json"
LIMIT = 2**31                   # tokens in a file are fewer: llm.c counts them with 32 bits and a sign


def id_dtype(vocab: int) -> np.dtype:
    """The narrower of the two dtypes that holds the ids 0 … vocab − 1."""
    return np.dtype("<u2") if vocab <= 2**16 else np.dtype("<u4")


def write_file(path: Path, *parts: bytes | np.ndarray) -> None:
    """Write beside, then rename: the file is there whole or not at all. Raises DataError where the disk refuses."""
    draft = path.with_name(path.name + ".draft")
    try:
        with draft.open("wb") as file:
            for part in parts:
                file.write(part if isinstance(part, bytes) else part.data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise DataError(f"{path}: cannot be written: {error.strerror}") from None


def write_shard(path: Path, tokens: np.ndarray, *, end: int | None, digest: str | None) -> None:
    """tokens (N,) of `id_dtype`; `end` the mark between documents, `digest` the sha256 of the tokenizer, in hex."""
    if not 0 < len(tokens) < LIMIT:
        raise DataError(f"{path}: {len(tokens)} tokens for one shard, expected 1 to {LIMIT - 1}; write several shards")
    magic = {dtype: magic for magic, (_, dtype) in FORMATS.items()}[tokens.dtype.newbyteorder("<")]
    tokens = np.ascontiguousarray(tokens, FORMATS[magic][1])
    header = np.zeros(HEADER // 4, "<u4")
    header[:7] = magic, FORMATS[magic][0], len(tokens), OURS, 0, tokens.max(), 0 if end is None else end + 1
    header[7:15] = np.frombuffer(bytes.fromhex(digest or "00" * 32), "<u4")
    header[4] = zlib.crc32(tokens.data, zlib.crc32(header.data))
    write_file(path, header, tokens)


class Writing:
    """A stream of ids, written as shards of `size` tokens: name-00000.bin, name-00001.bin … The ids wait in a file."""

    def __init__(self, folder: Path, name: str, size: int, vocab: int, end: int, digest: str) -> None:
        self.folder, self.name, self.size, self.end, self.digest = folder, name, size, end, digest
        self.dtype, self.counts = id_dtype(vocab), np.zeros(vocab, np.int64)        # counts: how often each id stands
        self.waiting, self.number, self._path = 0, 0, folder / f"{name}.draft"
        self._file = self._path.open("wb")

    def add(self, ids: np.ndarray) -> None:
        """ids (n,) of int64. Raises DataError where the disk refuses."""
        self.counts += np.bincount(ids, minlength=len(self.counts))
        ids = ids.astype(self.dtype)
        while len(ids):
            now, ids = ids[: self.size - self.waiting], ids[self.size - self.waiting:]
            try:
                self._file.write(now.data)
            except OSError as error:
                raise DataError(f"{self._path}: cannot be written: {error.strerror}") from None
            self.waiting += len(now)
            if self.waiting == self.size:
                self._shard()

    def _shard(self) -> None:
        self._file.flush()
        tokens = np.memmap(self._path, self.dtype, "r", 0, (self.waiting,))
        write_shard(self.folder / f"{self.name}-{self.number:05}.bin", tokens, end=self.end, digest=self.digest)
        self._file.seek(0)
        self._file.truncate()
        self.number, self.waiting = self.number + 1, 0

    def close(self) -> None:
        """Write what waits as the last shard."""
        if self.waiting:
            self._shard()
        self._file.close()
        self._path.unlink()


def read_meta(folder: Path) -> dict[str, Any]:
    """The object in the folder's meta.json; {} where there is none."""
    try:
        value = json.loads((folder / "meta.json").read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / 'meta.json'}: cannot be read: {error}; repair or remove it") from None
    if not isinstance(value, dict):
        raise DataError(f"{folder / 'meta.json'}: found a {type(value).__name__}, expected a JSON object")
    return value


def _verified(folder: Path) -> dict[str, Any]:
    try:
        value = json.loads((folder / VERIFIED).read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


class Shard:
    """One file. Opening checks the header and the size; `verify` reads every byte.

    path, dtype, count    largest: its largest id    end: the mark between documents    digest: sha256 of the tokenizer
    The last three are None where the file does not say. Each use maps the file anew: a thousand shards are no thousand
    open files, and a file that was cut off meanwhile is an error, not a bus error.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                head, stat = file.read(HEADER), os.fstat(file.fileno())
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from None
        self._state, size = (stat.st_size, stat.st_mtime_ns), stat.st_size
        ints = np.frombuffer(head.ljust(HEADER, b"\0"), "<u4").copy()
        magic, version, count = ints[:3].tolist()
        self._given, self.largest, self.end, self.digest = None, None, None, None
        if magic not in FORMATS:
            if size >= HEADER and not ints[15:].any():                          # in a raw file, 482 times id 0
                raise DataError(f"{path}: found a header with magic {magic}, "
                                f"expected {' or '.join(map(str, FORMATS))}; {AGAIN}")
            self._start, self._header, self.dtype = 0, b"", self._raw_dtype()
            self.count, odd = divmod(size, self.dtype.itemsize)
            if odd or not size:
                raise DataError(f"{path}: found {size} bytes, expected {self.dtype.itemsize} for each token "
                                f"of a raw {self.dtype.name} file; {AGAIN}")
            return
        expected, self.dtype = FORMATS[magic]
        if size < HEADER:
            raise DataError(f"{path}: truncated: found {size} bytes, expected {HEADER} for the header alone; {AGAIN}")
        if version != expected:
            raise DataError(f"{path}: found version {version}, expected {expected} with magic {magic}")
        if ints[3] != OURS and ints[3:].any():
            raise DataError(f"{path}: found {ints[3]} as integer 3 of the header or numbers behind it, "
                            f"expected llm.c's zeros or {OURS}; {AGAIN}")
        self._start, self.count, whole = HEADER, count, HEADER + count * self.dtype.itemsize
        if not 0 < count < LIMIT or size != whole:
            kind = "truncated" if size < whole else "wrong size"
            raise DataError(f"{path}: {kind}: found {size} bytes, "
                            f"expected {whole} for the {count} tokens of its header; {AGAIN}")
        if ints[3] == OURS:
            self._given, self.largest = int(ints[4]), int(ints[5])
            self.end = int(ints[6]) - 1 if ints[6] else None
            self.digest = ints[7:15].tobytes().hex() if ints[7:15].any() else None
        ints[4] = 0
        self._header = ints.tobytes()

    def _raw_dtype(self) -> np.dtype:
        name = read_meta(self.path.parent).get("dtype", "uint16")
        if name not in ("uint16", "uint32"):
            raise DataError(f"{self.path.parent / 'meta.json'}: dtype: found {name!r}, expected uint16 or uint32")
        return np.dtype(name).newbyteorder("<")

    @property
    def tokens(self) -> np.memmap:                              # (count,)
        try:
            return np.memmap(self.path, self.dtype, "r", self._start, (self.count,))
        except (OSError, ValueError):
            self.unchanged()
            raise

    @functools.cached_property
    def crc32(self) -> int:
        """As the header says, or counted where it says nothing."""
        if self._given is not None:
            return self._given
        known = self._noted()
        return known[0] if known else self._read(LIMIT)[0]

    def _read(self, vocab: int) -> tuple[int, tuple[int, int] | None]:
        """One pass over the file: its crc, and (place, id) of the first token that is not below `vocab`."""
        self.unchanged()
        crc, first, largest, tokens = zlib.crc32(self._header), None, 0, self.tokens
        for at in range(0, self.count, 1 << 22):
            block = tokens[at : at + (1 << 22)]
            crc, highest = zlib.crc32(block.data, crc), int(block.max())
            if first is None and highest >= vocab:
                place = int((block >= vocab).argmax())
                first = at + place, int(block[place])
            largest = max(largest, highest)
        self._note(crc, largest)
        return crc, first

    def verify(self, vocab: int) -> None:
        """Raises DataError unless the bytes are those that were written and all ids are below `vocab`."""
        self.unchanged()
        known = self._noted()
        if known and known[1] < vocab and self._given in (None, known[0]):
            self.crc32 = known[0]
            return
        crc, first = self._read(vocab)
        if self._given not in (None, crc):
            raise DataError(f"{self.path}: damaged: found crc32 {crc:08x}, "
                            f"expected {self._given:08x} as in its header; {AGAIN}")
        if first is not None:
            raise DataError(f"{self.path}: found id {first[1]} at token {first[0]}, expected ids below {vocab}; "
                            "it was made with another tokenizer")
        self.crc32 = crc

    def _noted(self) -> tuple[int, int] | None:
        """(crc, largest id) as .verified.json has them for a file of this size and time; None where it has not."""
        try:
            size, written, crc, largest = map(int, _verified(self.path.parent).get(self.path.name, ()))
        except (TypeError, ValueError):                         # no entry, or not one of ours
            return None
        return (crc, largest) if (size, written) == self._state else None

    def _note(self, crc: int, largest: int) -> None:
        if time.time_ns() - self._state[1] < 2 * 10**9:
            return
        file = self.path.with_name(VERIFIED)
        draft = file.with_name(f"{VERIFIED}.{os.getpid()}.draft")
        noted = _verified(self.path.parent) | {self.path.name: [*self._state, crc, largest]}
        with contextlib.suppress(OSError):                      # a folder that is not ours to write to
            draft.write_text(json.dumps(noted))
            os.replace(draft, file)

    def unchanged(self) -> None:
        """Raises DataError if the file is not the one that was opened, by its size and the time it was written."""
        try:
            stat = self.path.stat()
        except OSError as error:
            raise DataError(f"{self.path}: changed since the run began: {error.strerror}; put it back") from None
        state = stat.st_size, stat.st_mtime_ns
        if state != self._state:
            found, expected = (f"{size} bytes written at {time} ns" for size, time in (state, self._state))
            raise DataError(f"{self.path}: changed since the run began: found {found}, expected {expected}; "
                            "put it back")


class InMemory:
    """Tokens that a run made of text by itself, in the place of a Shard. Nothing can change them."""
    digest = None

    def __init__(self, tokens: np.ndarray, end: int) -> None:
        self.tokens, self.count, self.dtype, self.end = tokens, len(tokens), tokens.dtype, end
        self.crc32 = zlib.crc32(tokens.data)

    def verify(self, vocab: int) -> None:
        """Raises DataError unless all ids are below `vocab`."""
        if self.tokens.max() >= vocab:
            raise DataError(f"found id {self.tokens.max()}, expected ids below {vocab}")

    def unchanged(self) -> None:
        """As of a Shard."""
