"""Documents: what files, folders, data sets of the hub or Python's standard library hold as text, part by part.

    notes/  a.jsonl.gz …        a document a record, in a field of it      (records.py)
            book.txt …          any other text file is one document, or several, where it has marks between them
    →  Part("book.txt", "It was …", ends=False)  Part("book.txt", "… night.", ends=True)  …

A text of any length passes in parts of about a million characters, so it is never in memory as a whole. A record is one
part: it was parsed as a whole.

**Marks.** In a text file <|endoftext|> parts documents, as those who join documents into one file mean it; so does the
text of the tokenizer's EOS and BOS, except <s> and </s>, which HTML writes too, and what its chat template writes, as
<|im_end|>: that parts turns. The newline behind a mark goes with it. In records they are text: a record is a document
already.

**What is not read is said.** In a folder that is: hidden files, what is not text, and tables or .json files whose first
record has no documents. A file that is named itself must be readable. `Texts.notes` has a line for each reason.
"""

import hashlib
import os
import re
import sysconfig
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from nanollm.data import files, records
from nanollm.errors import DataError, counted

END = "<|endoftext|>"
HTML = ("<s>", "</s>")          # marks of tokenizers, and words of HTML
NOT_TEXT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data", "lib2to3",
            "__pycache__"}
HIDDEN, NO_TEXT, NO_FIELD = "hidden: not read", "no text: not read", "no document in the first record: not read"


class Part(NamedTuple):
    """A document, or a part of a long one."""
    name: str                   # for messages
    text: str
    ends: bool = True           # whether the document ends here


class File(NamedTuple):
    """A file of a source, read or not; or a data set of the hub."""
    path: Path
    name: str                   # for messages
    named: bool                 # by itself, not found in a folder
    hidden: bool = False


class Texts:
    """The parts of all documents, in the order of the sources and of the names in each. Iterated over, it reads anew.

    sources   files, folders, hf:…; [] is the source of Python's standard library
    field     of records, see records.py
    marks     what else than <|endoftext|> parts documents in text files
    notes     what was read otherwise than as plain text, and what was not read: of the last time it was read through

    Raises DataError, which names the file, and the line of a record.
    """

    def __init__(self, sources: Sequence[Path], field: str | None = None, marks: Sequence[str] = ()) -> None:
        self.sources, self.field = sources, field
        self.marks = tuple(dict.fromkeys([END, *(mark for mark in marks if mark not in HTML)]))
        self._how: dict[Path, files.Encoding | None] = {}
        self._states: dict[Path, tuple[int, int]] = {}
        self._found: dict[str, dict[str, str]] = {}             # reason → file → how much of it

    def __iter__(self) -> Iterator[Part]:
        self._found, some = {}, False
        for file in self._files():
            for part in self._parts(file):
                some = some or bool(part.text.strip())
                yield part
        if not some:
            what = ", ".join(map(str, self.sources))
            raise DataError(f"{what}: no text in it" + "".join(f"; {note}" for note in self.notes))

    @property
    def notes(self) -> list[str]:
        """A line for each reason, with the number of files and the first names."""
        return [f"{counted(len(names), 'file')} {reason}: "
                f"{', '.join(name + more for name, more in list(names.items())[:4])}{', …' if len(names) > 4 else ''}"
                for reason, names in self._found.items()]

    def listing(self) -> str | None:
        """A hash of which files there are, their sizes and when they were written, and of how they are read: the same
        texts, if it is the same. None where a file was written in the last two seconds, as it may be again in the same
        tick of the clock. A data set of the hub counts as unchanged."""
        listed: list[object] = [self.field, self.marks]
        for file in self._files():
            if str(file.path).startswith(records.HUB):
                listed.append(file.name)
            elif not file.hidden:
                size, written = _state(file.path)
                if written > time.time_ns() - 2 * 10**9:
                    return None
                listed.append((str(file.path.resolve()), size, written))
        return hashlib.blake2b(repr(listed).encode(errors="surrogateescape"), digest_size=16).hexdigest()

    def _note(self, reason: str, name: str, more: str = "") -> None:
        self._found.setdefault(reason, {})[name] = more and f" ({more})"

    def _files(self) -> Iterator[File]:
        if not self.sources:
            yield from standard_library()
        for source in self.sources:
            before = f"{source.as_posix()}/" if len(self.sources) > 1 else ""
            if str(source).startswith(records.HUB):
                yield File(source, str(source), named=True)
            elif source.is_dir():
                for path in sorted(path for path in source.rglob("*") if path.is_file()):
                    name = path.relative_to(source)
                    hidden = any(part.startswith(".") for part in name.parts)
                    yield File(path, before + name.as_posix(), named=False, hidden=hidden)
            elif source.exists():
                yield File(source, before + source.name, named=True)
            else:
                raise DataError(f"{source}: no such file or folder")

    def _parts(self, file: File) -> Iterator[Part]:
        path, name, named, hidden = file
        if str(path).startswith(records.HUB):
            yield from self._records(records.texts(records.hub(str(path)), self.field), name)
            return
        if hidden:
            return self._note(HIDDEN, name)
        state = _state(path)
        if self._states.setdefault(path, state) != state:
            raise DataError(f"{path}: changed while it was read; start again")
        if path not in self._how:
            self._how[path] = files.encoding(path)
        how = self._how[path]
        if how is None:
            if named:
                raise files.no_text(path)
            return self._note(NO_TEXT, name)
        if how.note:
            self._note(how.note, name, counted(how.damaged, "place") if how.damaged else "")
        if files.kind(path) not in records.SUFFIXES:
            yield from self._text(files.text_blocks(path, how), name)
            return
        try:
            yield from self._records(records.documents(path, how, self.field), name)
        except records.NoField:
            if named or files.kind(path) in (".jsonl", ".ndjson"):
                raise
            self._note(NO_FIELD, name)

    def _records(self, found: Iterator[tuple[str, str]], name: str) -> Iterator[Part]:
        for number, (field, text) in enumerate(found, 1):
            if number == 1 and field not in ("text", self.field):
                self._note(f'with its documents in "{field}"', name)
            yield Part(f"{name}:{number}", text)

    def _text(self, blocks: Iterator[str], name: str) -> Iterator[Part]:
        """A text file, parted at the marks. What may be the beginning of a mark waits for the next block."""
        marks = re.compile("(?:" + "|".join(re.escape(mark) for mark in sorted(self.marks, key=len, reverse=True)) +
                           ")\n?")
        longest, held, documents = 1 + max(map(len, self.marks)), "", 1
        for block in blocks:
            text, at = held + block, 0
            for mark in marks.finditer(text):
                if mark.end() == len(text):             # its newline may follow
                    break
                yield Part(name, text[at: mark.start()])
                at, documents = mark.end(), documents + 1
            wait = max(at, len(text) - longest)
            if wait > at:
                yield Part(name, text[at:wait], ends=False)
            held = text[wait:]
        *whole, last = marks.split(held)
        yield from (Part(name, text) for text in whole)
        yield Part(name, last)
        if documents + len(whole) > 1:
            self._note("parted where a mark stands", name, counted(documents + len(whole), "document"))


@dataclass(frozen=True)
class Apart:
    """Text to train on, all of it, and text of its own to measure on, or none. Iterated over: one after the other."""
    train: Texts
    held_out: Texts | None

    def __iter__(self) -> Iterator[Part]:
        for texts in self.both:
            yield from texts

    @property
    def both(self) -> list[Texts]:
        """The two, or the first."""
        return [self.train, self.held_out] if self.held_out else [self.train]

    @property
    def notes(self) -> list[str]:
        """As of Texts."""
        return [note for texts in self.both for note in texts.notes]

    def listing(self) -> str | None:
        """As of Texts."""
        each = [texts.listing() for texts in self.both]
        return None if None in each else " ".join(map(str, ["apart", *each]))


def read(sources: Path | Sequence[Path] | None, field: str | None = None, marks: Sequence[str] = ()) -> Texts:
    """The documents of a source, or of several. None or []: the source of Python's standard library."""
    return Texts([sources] if isinstance(sources, Path) else sources or [], field, marks)


def standard_library() -> list[File]:
    """The .py files of this Python's standard library, without its tests and its tables of data."""
    folder, paths = Path(sysconfig.get_paths()["stdlib"]), []
    for place, inside, names in os.walk(folder):
        inside[:] = set(inside) - NOT_TEXT              # what is taken out is not walked through
        paths += [Path(place, name) for name in names if name.endswith(".py") and not name.startswith("_sysconfigdata")]
    if not paths:
        raise DataError(f"{folder}: this Python has no source of its standard library; give text of your own")
    return [File(path, path.relative_to(folder).as_posix(), named=False) for path in sorted(paths)]


def _state(path: Path) -> tuple[int, int]:
    """The size of a file and when it was written, in ns."""
    try:
        stat = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    return stat.st_size, stat.st_mtime_ns
