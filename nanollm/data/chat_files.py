"""Files of chats, and what a person says about them: a folder, a name in LLaMA-Factory's dataset_info.json, columns.

    chats.jsonl                                        an item a line; .ndjson is the same
    chats.json                                         one list of items
    chats.csv   chats.parquet                          an item a row (parquet needs the package pyarrow)
    chats.jsonl.gz   chats.jsonl.zst                   any of the first four, compressed (.zst needs zstandard)
    folder/                                            all .jsonl, .ndjson and .parquet in it, in the order of names;
                                                       where there is none, all .json and .csv
    data/dataset_info.json:NAME                        the set of that name; or NAME with --dataset-dir data

dataset_info.json (LLaMA-Factory, data/README.md) says which file a set is in and what its columns and roles are called:

    "NAME": {"file_name": "x.json", "formatting": "alpaca" | "sharegpt" | "openai",
             "columns": {"prompt", "query", "response", "history", "system", "tools"}, or of the other two
                        {"messages", "system", "tools"},
             "tags": {"role_tag", "content_tag", "user_tag", "assistant_tag", "observation_tag", "function_tag",
                      "system_tag"}}

A set with "columns" has these columns and no others. For files that no dataset_info.json describes,
`--columns prompt=question response=answer` does the same (the format's name = the file's); other keys stay.
"""

import csv
import gzip
import importlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nanollm.data.chat_formats import EXPECTED, FORMATS, Chat, chat, need
from nanollm.errors import DataError

LINES, OTHERS = (".jsonl", ".ndjson", ".parquet"), (".json", ".csv")
READABLE = ", ".join((*LINES, *OTHERS))
Change = Callable[[Any, str], Any]                 # an item and where it stands → an item of a format


def read(source: Path | str, dataset_dir: Path | None = None, columns: dict[str, str] | None = None) -> list[Chat]:
    """The chats of a source, as at the head of the file. Raises DataError, with the file and line, item or row."""
    path, change = resolve(str(source), dataset_dir)
    if columns:
        change = _renamed(columns)
    chats = [chat(change(item, where), where) for file in _files(path) for item, where in records(file)]
    if not chats:
        what = f"{', '.join(LINES)} files with " * path.is_dir()
        raise DataError(f"{path}: no chats in it; expected {what}objects of one of the formats {EXPECTED}")
    return chats


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    inside = [(file, file.relative_to(path).parts) for file in sorted(path.rglob("*")) if file.is_file()]
    shown = [file for file, parts in inside if not any(part.startswith(".") for part in parts)]
    lines = [file for file in shown if _kind(file) in LINES]
    return lines or [file for file in shown if _kind(file) in OTHERS and file.name != "dataset_info.json"]


def _kind(path: Path) -> str:
    """The suffix that says what is in a file, without that of its compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return next((suffix for suffix in reversed(suffixes) if suffix not in (".gz", ".zst")), "")


# ---- records

def records(path: Path) -> Iterator[tuple[Any, str]]:
    """(item, "file, line 7") of a file. Raises DataError."""
    kind = _kind(path)
    if kind not in (*LINES, *OTHERS) and path.exists():
        raise DataError(f"{path}: expected a .jsonl with a chat a line, a .json with a list of chats, another of "
                        f"{READABLE} (also .gz, .zst), or a folder of them")
    if kind == ".parquet":
        yield from _rows(path)
        return
    data = _bytes(path)
    if kind in (".jsonl", ".ndjson"):
        for n, line in enumerate(data.split(b"\n"), 1):
            if line.strip():
                yield _json(line, f"{path}, line {n}"), f"{path}, line {n}"
    elif kind == ".csv":
        try:
            rows = csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
            for n, row in enumerate(rows, 1):
                need(None not in row and None not in row.values(), f"{path}, row {n}",
                     f"the {len(rows.fieldnames or [])} columns of the first line", [*row.values()])
                yield row, f"{path}, row {n}"
        except (ValueError, csv.Error) as error:
            raise DataError(f"{path}: not CSV in UTF-8: {error}") from None
    else:
        items = _json(data, f"{path}")
        need(isinstance(items, list), f"{path}", "one list of chats (a chat a line belongs into a .jsonl)", items)
        yield from ((item, f"{path}, item {n}") for n, item in enumerate(items, 1))


def _bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        if path.suffix.lower() == ".gz":
            return gzip.decompress(data)
        if path.suffix.lower() == ".zst":
            return _package("zstandard", path).ZstdDecompressor().stream_reader(io.BytesIO(data)).read()
        return data
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    except Exception as error:                                  # EOFError, zlib.error, ZstdError: damaged
        raise DataError(f"{path}: cannot be decompressed: {error}") from None


def _package(name: str, path: Path) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise DataError(f"{path}: needs the package {package}: pip install {package}") from None


def _rows(path: Path) -> Iterator[tuple[Any, str]]:
    parquet = _package("pyarrow.parquet", path)
    try:
        with parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches(1024) for row in batch.to_pylist())
            yield from ((row, f"{path}, row {n}") for n, row in enumerate(rows, 1))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    except Exception as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: not parquet: {error}") from None


def _json(data: bytes, where: str) -> Any:
    try:
        value = json.loads(data.decode("utf-8-sig"))
        json.dumps(value, ensure_ascii=False).encode()          # "\ud800" is JSON, but no text
        return value
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON in UTF-8: {error}") from None


# ---- what a person says about a set

KEYS = {key for format in FORMATS for part in format for key in part}


def resolve(source: str, dataset_dir: Path | None) -> tuple[Path, Change]:
    """Where the items of a source are, and what makes them items of a format. Raises DataError."""
    folder, colon, name = source.rpartition(":")
    if colon and Path(folder).name == "dataset_info.json":
        return _described(Path(folder), name)
    if dataset_dir is not None and not Path(source).exists():
        return _described(dataset_dir / "dataset_info.json", source)
    return Path(source), lambda item, where: item


def _renamed(columns: dict[str, str]) -> Change:
    if unknown := sorted(columns.keys() - KEYS):
        raise DataError(f"--columns {unknown[0]}={columns[unknown[0]]}: no format has {unknown[0]}; expected "
                        f"one of {', '.join(sorted(KEYS))}")

    def change(item: Any, where: str) -> Any:
        need(isinstance(item, dict), where, "an object", item)
        missing = sorted(set(columns.values()) - item.keys())
        need(not missing, where, f"the columns that --columns names; {', '.join(missing)} is not one", [*item])
        others = {key: value for key, value in item.items() if key not in columns.values() and key not in columns}
        return others | {key: item[column] for key, column in columns.items()}
    return change


COLUMNS = {"alpaca": {"prompt": "instruction", "query": "input", "response": "output"},
           "sharegpt": {"messages": "conversations"}, "openai": {"messages": "messages"}}
ALPACA = {"prompt": "instruction", "query": "input", "response": "output", "history": "history", "system": "system",
          "tools": "tools"}
SHAREGPT = {"messages": "conversations", "system": "system", "tools": "tools"}
TAGS = {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt",
        "observation_tag": "observation", "function_tag": "function_call", "system_tag": "system"}
OPENAI_TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant",
               "observation_tag": "tool", "function_tag": "function_call", "system_tag": "system"}
SPEAKERS = {"user_tag": "human", "assistant_tag": "gpt", "observation_tag": "observation",
            "function_tag": "function_call", "system_tag": "system"}
UNDERSTOOD = {"file_name", "formatting", "columns", "tags", "ranking", "split"}


def _described(file: Path, name: str) -> tuple[Path, Change]:
    try:
        info = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise DataError(f"{file}: not JSON: {error}") from None
    need(isinstance(info, dict), str(file), "an object of sets", info)
    if name not in info:
        raise DataError(f"{file}: no set {name!r}, and no such file or folder; expected one of {', '.join(info)}")
    entry, where = info[name], f"{file}, {name}"
    need(isinstance(entry, dict), where, "an object", entry)
    formatting = entry.get("formatting", "alpaca")
    need(formatting in COLUMNS, where, "'formatting' to be alpaca, sharegpt or openai", formatting)
    columns = entry.get("columns", COLUMNS[formatting])
    need(isinstance(columns, dict), where, "'columns' to be an object", columns)
    if entry.get("ranking") or {"chosen", "rejected", "kto_tag"} & {*columns}:
        raise DataError(f"{where}: preference data, which is for a later method; expected chats to learn from")
    need("file_name" in entry, where, "a 'file_name'; download a set of a hub, and name its file here", sorted(entry))
    known = ALPACA if formatting == "alpaca" else SHAREGPT
    strange = sorted((entry.keys() - UNDERSTOOD) | (columns.keys() - known.keys()))
    need(not strange, where, f"{', '.join(sorted(UNDERSTOOD))} and the columns {', '.join(known)}, no more", strange)
    tags = (OPENAI_TAGS if formatting == "openai" else TAGS) | entry.get("tags", {})
    need(tags.keys() <= TAGS.keys(), where, f"the tags {', '.join(TAGS)}", sorted(tags.keys() - TAGS.keys()))
    roles = {tags[tag]: speaker for tag, speaker in SPEAKERS.items()}

    def change(item: Any, at: str) -> Any:
        need(isinstance(item, dict), at, "an object", item)
        made = {known[column]: item[key] for column, key in columns.items() if item.get(key) is not None}
        if isinstance(turns := made.get("conversations"), list):
            made["conversations"] = [_turn(turn, f"{at}, message {n}", tags, roles) for n, turn in enumerate(turns, 1)]
        return made
    return file.parent / entry["file_name"], change


def _turn(turn: Any, where: str, tags: dict[str, str], roles: dict[str, str]) -> dict[str, Any]:
    """A message with its role under "from", its text under "value"."""
    need(isinstance(turn, dict), where, "an object", turn)
    role, others = turn.get(tags["role_tag"]), {key: value for key, value in turn.items()
                                                if key not in (tags["role_tag"], tags["content_tag"])}
    need(isinstance(role, str) and role in roles, where, f"{tags['role_tag']!r} to be one of {', '.join(roles)}", role)
    return others | {"from": roles[str(role)], "value": turn.get(tags["content_tag"])}
