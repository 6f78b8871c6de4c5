"""Bytes → text: a file unpacked and decoded, a block at a time, so that memory does not depend on its size.

    notes.txt.gz   →  unpack   .gz .bz2 .xz .zst        →  decode   UTF-8, UTF-16 …   →  "\\n" for "\\r\\n"

Encodings. A byte order mark decides, where there is one. Else a file is UTF-8, if all of it is. Else its bytes above
127 tell, after all of it has been read:

    most of them form characters of UTF-8             UTF-8 that is damaged: U+FFFD for the bytes that are not, counted
    three in four have neither neighbour above 127    cp1252, which is latin-1 and more: accented letters among others
    anything else                                     not text that we can read

What is not plain UTF-8 is said. A file with a zero byte among its first 8,192 is not text, unless a mark says UTF-16.
"""

import bz2
import codecs
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nanollm.errors import DataError

BLOCK = 1 << 20                 # bytes, and so at most as many characters
PACKED = (".gz", ".bz2", ".xz", ".zst")
MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
         codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}          # UTF-32's begin with those of UTF-16
NOT_CP1252 = np.array([0x81, 0x8D, 0x8F, 0x90, 0x9D], np.uint8)


class Encoding(NamedTuple):
    """How a file is decoded."""
    name: str                   # of Python's codecs
    damaged: int = 0            # U+FFFD that stand for bytes which are not UTF-8

    @property
    def note(self) -> str:
        """What a person should know of it; "" where there is nothing."""
        if self.damaged:
            return "not all UTF-8: U+FFFD for the rest"
        return "not UTF-8, read as cp1252 (Western European)" if self.name == "cp1252" else ""


def kind(path: Path) -> str:
    """The suffix in small letters, without that of a container: notes.JSONL.gz → .jsonl."""
    inner = path.with_suffix("") if path.suffix.lower() in PACKED else path
    return inner.suffix.lower()


def blocks(path: Path) -> Iterator[bytes]:
    """The bytes of a file, unpacked. Raises DataError where it cannot be read, or was cut off."""
    packed = path.suffix.lower()
    try:
        if packed == ".zst":
            yield from zst_blocks(path)
            return
        openers: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
        with openers.get(packed, lambda path: path.open("rb"))(path) as file:
            while block := file.read(BLOCK):
                yield block
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: cannot be unpacked: {error}; it is damaged, or no {packed} file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def zst_blocks(path: Path) -> Iterator[bytes]:
    """A .zst frame by frame. zstandard's own reader takes a file that was cut off for a shorter one."""
    try:
        import zstandard
    except ImportError:
        raise DataError(f'{path}: a .zst needs zstandard: pip install -e ".[data]"') from None
    frame = None
    with path.open("rb") as file:
        while packed := file.read(1 << 14):
            while packed:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                try:
                    block = frame.decompress(packed)
                except zstandard.ZstdError as error:
                    raise DataError(f"{path}: cannot be unpacked: {error}; it is damaged, or no .zst file") from None
                if block:
                    yield block
                packed = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    if frame is not None:
        raise DataError(f"{path}: cannot be unpacked: it ends within a frame; it is damaged: fetch it again")


def encoding(path: Path) -> Encoding | None:
    """How the file is decoded, by the rule at the head; None where it is not text. Reads all of it."""
    if kind(path) == ".parquet":                        # its texts are UTF-8 inside of what is none
        return Encoding("utf-8")
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for number, block in enumerate(blocks(path)):
            if number == 0:
                for mark, name in MARKS.items():
                    if block.startswith(mark):
                        return Encoding(name)
                if b"\0" in block[:8192]:
                    return None
            decoder.decode(block)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return other_than_utf8(path)
    return Encoding("utf-8")


def no_text(path: Path) -> DataError:
    """The error where `encoding` finds no text in a file that was named."""
    return DataError(f"{path}: not a text file (it holds zero bytes, or bytes of no encoding that is read); "
                     "convert it to UTF-8: iconv -f ENCODING -t UTF-8")


def other_than_utf8(path: Path) -> Encoding | None:
    """The rest of the rule, for a file that is not all UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    valid = damaged = high = alone = undefined = 0
    last = np.zeros(2, bool)                            # whether the last two bytes are above 127
    for block in blocks(path):
        text, bytes_ = decoder.decode(block), np.frombuffer(block, np.uint8)
        damaged += text.count("\ufffd") - block.count("\ufffd".encode())
        valid += len(text) - int((bytes_ < 128).sum())
        undefined += int(np.isin(bytes_, NOT_CP1252).sum())
        above = np.concatenate([last, bytes_ > 127])
        high += int(above[1:-1].sum())                  # all but the last byte, whose right neighbour is still to come
        alone += int((above[1:-1] & ~above[:-2] & ~above[2:]).sum())
        last = above[-2:]
    valid -= damaged
    if valid > damaged:
        return Encoding("utf-8", damaged + (decoder.decode(b"", final=True) != ""))
    high, alone = high + int(last[1]), alone + int(last[1] and not last[0])
    return Encoding("cp1252") if 4 * alone >= 3 * high and not undefined else None


def text_blocks(path: Path, how: Encoding) -> Iterator[str]:
    """The text of the file in blocks, none of which parts "\\r\\n"."""
    strict = "replace" if how.damaged else "strict"
    decoder, held = codecs.getincrementaldecoder(how.name)(strict), ""
    try:
        for block in chain(blocks(path), [b""]):
            text = held + decoder.decode(block, final=not block)
            held = "\r" if text.endswith("\r") and block else ""
            if text := text[: len(text) - len(held)]:
                yield text.replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: found bytes that are not {how.name.upper()}, as its byte order mark says "
                        f"({error.reason}); it is damaged: fetch it again") from None


def lines(parts: Iterable[str]) -> Iterator[str]:
    """Blocks of text → its lines, with their "\\n". Other separators of Unicode are text."""
    begun: list[str] = []
    for part in parts:
        *whole, rest = part.split("\n")
        for line in whole:
            yield "".join([*begun, line, "\n"])
            begun = []
        begun.append(rest)
    if last := "".join(begun):
        yield last
