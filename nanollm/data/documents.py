"""Documents: what a file, a folder or Python's standard library holds as text, and which part of it is held out.

A .jsonl file has a document a line, in "text"; any other file is one. The part that is held out is made of whole
documents, chosen by a hash of their names, so it is the same on every machine, and grows when the text does.
"""

import json
import math
import os
import sysconfig
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from nanollm.errors import DataError

HELD_OUT = 0.05                 # share of the text that training never sees
FEW = 20                        # fewer documents than this, and the end of each is held out instead of whole ones
NOT_TEXT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data", "lib2to3",
            "__pycache__"}


class Document(NamedTuple):
    """One text of a corpus."""
    name: str                   # the split depends on it, and, where documents are few, on their lengths
    text: str


def read(source: Path | None) -> list[Document]:
    """The documents of a file or a folder, in the order of their names. None: the source of Python's standard library.

    In a folder, files that are not text and hidden files are passed over. Raises DataError, which names the file, and
    the line of a .jsonl.
    """
    if source is None:
        return standard_library()
    if not source.exists():
        raise DataError(f"{source}: no such file or folder")
    if source.is_file():
        documents = read_file(source, source.name)
    else:
        inside = [path for path in sorted(source.rglob("*")) if path.is_file()]
        shown = [(path, path.relative_to(source)) for path in inside]
        shown = [(path, name) for path, name in shown if not any(part.startswith(".") for part in name.parts)]
        documents = [d for path, name in shown if is_text(path) for d in read_file(path, name.as_posix())]
    documents = [document for document in documents if document.text.strip()]
    if not documents:
        raise DataError(f"{source}: no text in it")
    return documents


def standard_library() -> list[Document]:
    """The .py files of this Python's standard library, without its tests and its tables of data."""
    folder, paths = Path(sysconfig.get_paths()["stdlib"]), []
    for place, inside, files in os.walk(folder):
        inside[:] = set(inside) - NOT_TEXT              # what is taken out is not walked through
        paths += [Path(place, name) for name in files if name.endswith(".py") and not name.startswith("_sysconfigdata")]
    if not paths:
        raise DataError(f"{folder}: this Python has no source of its standard library; give text of your own")
    documents = [d for path in sorted(paths) for d in read_file(path, path.relative_to(folder).as_posix())]
    return [document for document in documents if document.text.strip()]


def is_text(path: Path) -> bool:
    """Whether a file has no zero byte among its first 8,192."""
    with path.open("rb") as file:
        return b"\0" not in file.read(8192)


def read_file(path: Path, name: str) -> list[Document]:
    """The documents of one file. Bytes that are not UTF-8 become U+FFFD."""
    try:
        if not is_text(path):
            raise DataError(f"{path}: not a text file (it holds zero bytes)")
        text = path.read_bytes().decode("utf-8-sig", errors="replace").replace("\r\n", "\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    if path.suffix != ".jsonl":
        return [Document(name, text)]
    lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    return [Document(f"{name}:{n}", json_text(line, f"{path}, line {n}")) for n, line in lines]


def json_text(line: str, where: str) -> str:
    """The document in one line of jsonl. Raises DataError that begins with `where`, the file and the line."""
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error}") from None
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        found = f"the keys {', '.join(value)}" if isinstance(value, dict) else f"a {type(value).__name__}"
        raise DataError(f'{where}: expected an object with the document in "text", found {found}')
    # JSON can spell half a surrogate pair
    return value["text"].encode("utf-16", "surrogatepass").decode("utf-16", "replace")


# ---- what is held out

def split(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """(training, held out), the same on every machine. A text that occurs twice counts once: none is on both sides."""
    unique = list({document.text: document for document in reversed(documents)}.values())[::-1]
    if len(unique) < FEW:
        cuts = [d.text.rfind("\n", 0, math.ceil(len(d.text) * (1 - HELD_OUT))) + 1 or len(d.text) for d in unique]
        ends = [Document(d.name, d.text[cut:]) for d, cut in zip(unique, cuts, strict=True) if d.text[cut:].strip()]
        return [Document(d.name, d.text[:cut]) for d, cut in zip(unique, cuts, strict=True)], ends
    share, held = HELD_OUT * sum(len(d.text) for d in unique), set()
    room = share
    for document in sorted(unique, key=lambda d: zlib.crc32(d.name.encode(errors="replace"))):
        if room < share / 4:                            # to fill the rest would mean to look for ever smaller ones
            break
        if len(document.text) <= room:
            room -= len(document.text)
            held.add(document.name)
    return [d for d in unique if d.name not in held], [d for d in unique if d.name in held]
