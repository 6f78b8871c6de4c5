"""Records of files and of data sets of the hub: documents, each in a field of one, or chats (chat_files.py).

    .jsonl .ndjson      a JSON object a line                        {"text": "One document.", "id": 7}
    .json               a list of objects, or objects one after the other
    .csv .tsv           columns, named in the first line; .csv may be parted by , ; or tabs
    .parquet            columns; read a batch of rows at a time     (pip install -e ".[data]")
    hf:owner/name[:config][:split]   a data set of the hub, streamed; the split is train if none is named

The field of a document is that of --text-field, else "text", else the one of KNOWN that the first record has. The
first record decides for all. An empty document, or null in its place, is passed over.
"""

import contextlib
import csv
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nanollm.data import files
from nanollm.errors import DataError

KNOWN = ("content", "document", "raw_content", "body", "article")   # what others call "text"
HUB = "hf:"
ROWS = 256                      # of a parquet file at once


class Record(NamedTuple):
    """One record: its place, for messages, and its fields."""
    where: str
    fields: Any


class NoField(DataError):
    """The first record shows that the file holds no documents, or does not say in which field."""


def choose(first: Record, asked: str | None) -> str:
    """The field with the documents, by the rule at the head. Raises NoField."""
    where, fields = first
    if not isinstance(fields, dict):
        raise NoField(f'{where}: expected an object with the document in "text", found a {type(fields).__name__}')
    held = [name for name, value in fields.items() if isinstance(value, str | None)]
    if asked:
        known = [asked]
    else:
        known = ["text"] if "text" in held else [name for name in KNOWN if name in held]
    if len(known) != 1 or known[0] not in held:
        keys = ", ".join(map(str, fields)) or "none"
        raise NoField(f'{where}: expected an object with the document in "{asked or "text"}", found the keys {keys}; '
                      "--text-field NAME says which holds the documents")
    return known[0]


def texts(records: Iterable[Record], asked: str | None) -> Iterator[tuple[str, str]]:
    """(field, document) of each record. Raises DataError, which begins with the record's place."""
    field = None
    for record in records:
        field = field or choose(record, asked)
        where, fields = record
        if not isinstance(fields, dict) or not isinstance(fields.get(field, 0), str | None):
            found = f"the keys {', '.join(fields)}" if isinstance(fields, dict) else f"a {type(fields).__name__}"
            raise DataError(f'{where}: expected an object with the document in "{field}", found {found}')
        # JSON can spell half a surrogate pair
        yield field, (fields[field] or "").encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def documents(path: Path, how: files.Encoding, asked: str | None) -> Iterator[tuple[str, str]]:
    """(field, document) of each record of a file."""
    columns = [choose(schema(path), asked)] if files.kind(path) == ".parquet" else None
    return texts(records(path, how, columns), asked)


def records(path: Path, how: files.Encoding, columns: Sequence[str] | None = None) -> Iterator[Record]:
    """The records of a file, by its suffix. columns: of a .parquet, those that are read; None: all."""
    kind = files.kind(path)
    if kind == ".parquet":
        return parquet(path, columns)
    text = files.text_blocks(path, how)
    if kind in (".jsonl", ".ndjson"):
        return jsonl(path, text)
    return json_values(path, text) if kind == ".json" else table(path, text, kind)


SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")


def parsed(text: str, where: str) -> Any:
    """One JSON value. Raises DataError that begins with `where`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON: {error}") from None


def jsonl(path: Path, text: Iterator[str]) -> Iterator[Record]:
    """A JSON value a line; blank lines are passed over."""
    for number, line in enumerate(files.lines(text), 1):
        if line.strip():
            where = f"{path}, line {number}"
            yield Record(where, parsed(line, where))


def json_values(path: Path, text: Iterator[str]) -> Iterator[Record]:
    """The items of a JSON list, or values one after the other. What is kept in memory is one of them, not the file."""
    decoder, held, at, number, more = json.JSONDecoder(), next(text, "").lstrip(), 0, 0, True
    inside = held[:1] == "["
    at = int(inside)
    while True:
        while at < len(held) and (held[at].isspace() or inside and held[at] == ","):
            at += 1
        if inside and held[at: at + 1] == "]":
            return
        try:
            value, at = decoder.raw_decode(held, at)
        except (ValueError, RecursionError) as error:
            if not more and at == len(held) and not inside:
                return
            if not more or isinstance(error, RecursionError):
                raise DataError(f"{path}, item {number + 1}: not JSON: {error}") from None
            held, at, wanted = held[at:], 0, 2 * (len(held) - at)   # at least twice as much: an item is read once more
            while len(held) <= wanted and more:                     # or twice, however long it is
                block = next(text, None)
                more = block is not None
                held += block or ""
            continue
        number += 1
        yield Record(f"{path}, item {number}", value)


def table(path: Path, text: Iterator[str], kind: str) -> Iterator[Record]:
    """The rows of a table, whose first line has the names of the columns."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))               # a document may be longer than csv's 131,072
    lines = files.lines(text)
    head = next(lines, "")
    parted = "\t" if kind == ".tsv" else max(",;\t", key=head.count)
    rows = csv.reader(_then(head, lines), delimiter=parted, strict=True)
    names, place = None, f"{path}, line 1"
    try:
        for row in rows:
            place = f"{path}, line {rows.line_num}"
            if names is None:
                names = row
            elif row:
                if len(row) != len(names):
                    raise DataError(f"{place}: found {len(row)} columns, expected {len(names)} as in line 1")
                yield Record(place, dict(zip(names, row, strict=True)))
    except csv.Error as error:
        raise DataError(f"{path}, line {rows.line_num}: not a table: {error}") from None


def _then(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def parquet(path: Path, columns: Sequence[str] | None = None) -> Iterator[Record]:
    """The rows of a parquet file, of these columns or of all."""
    with opened(path) as file:
        number = 0
        for batch in file.iter_batches(ROWS, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield Record(f"{path}, row {number}", row)


def schema(path: Path) -> Record:
    """What a row of a parquet file may be, as `choose` reads it: "" in the columns of text, 0 in others."""
    with opened(path) as file:
        return Record(str(path), {column.name: "" if str(column.type) in ("string", "large_string") else 0
                                  for column in file.schema_arrow})


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A parquet file. Raises DataError where it cannot be opened, or read in the block."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise DataError(f'{path}: a .parquet needs pyarrow: pip install -e ".[data]"') from None
    try:
        with ParquetFile(path) as file:
            yield file
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def hub(source: str) -> Iterator[Record]:
    """The rows of hf:owner/name[:config][:split], streamed. Raises DataError."""
    try:
        import datasets
    except ImportError:
        raise DataError(f'{source}: a data set of the hub needs datasets: pip install -e ".[data]"') from None
    name, config, split, *more = [*source.removeprefix(HUB).split(":"), "", ""]
    if not name or any(more):
        raise DataError(f"{source}: expected hf:owner/name, hf:owner/name:config or hf:owner/name:config:split")
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        for number, row in enumerate(rows, 1):
            yield Record(f"{source}, row {number}", row)
    except Exception as error:      # of the hub, the network, a builder: datasets has no base class for them
        raise DataError(f"{source}: cannot be read: {type(error).__name__}: {error}") from None
