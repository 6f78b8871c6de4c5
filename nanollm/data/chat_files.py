"""Files of chats, and what a person says about them: a folder, a name in LLaMA-Factory's dataset_info.json, columns.

    chats.jsonl  chats.parquet  chats.csv.gz …         an item a record; records.py has the formats, files.py how they
                                                       are packed and encoded
    hf:owner/name[:config][:split]                     an item a row of a data set of the hub
    folder/                                            all .jsonl, .ndjson and .parquet in it, in the order of names;
                                                       where there is none, all .json, .csv and .tsv
    data/dataset_info.json:NAME                        the set of that name; or NAME with --dataset-dir data

dataset_info.json (LLaMA-Factory, data/README.md) says where a set is and what its columns and roles are called:

    "NAME": {"file_name": "x.json", or "hf_hub_url": "owner/name", "subset", "split",
             "formatting": "alpaca" | "sharegpt" | "openai",
             "columns": {"prompt", "query", "response", "history", "system", "tools"}, or of the other two
                        {"messages", "system", "tools"}; of preferences also {"chosen", "rejected", "kto_tag"},
             "ranking": true, where "chosen" and "rejected" are columns,
             "tags": {"role_tag", "content_tag", "user_tag", "assistant_tag", "observation_tag", "function_tag",
                      "system_tag"}}

A set with "columns" has these columns and no others. For files that no dataset_info.json describes,
`--columns prompt=question response=answer` does the same (the format's name = the file's); other keys stay.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from nanollm.data import files, records
from nanollm.data.chat_formats import EXPECTED, FORMATS, chat, need
from nanollm.errors import DataError, counted

LINES = (".jsonl", ".ndjson", ".parquet")          # of a folder; what has other suffixes may be settings, not chats
Change = Callable[[Any, str], Any]                 # an item and where it stands → an item of a format


class Kind(NamedTuple):
    """What the items of a source are: chats, or preferences (preference_formats.py)."""
    name: str
    parse: Callable[[Any, str], Any]               # an item of a format, and where it stands → what `read` returns
    keys: frozenset[str]                           # of all formats
    expected: str                                  # the formats, in words


CHATS = Kind("chats", chat, frozenset(key for format in FORMATS for part in format for key in part), EXPECTED)


def read(source: Path | str, dataset_dir: Path | None = None, columns: dict[str, str] | None = None,
         say: Callable[[str], object] = lambda note: None, kind: Kind = CHATS) -> list[Any]:
    """The chats of a source, or what `kind` makes of its items, as at the head of the file. Raises DataError, with the
    file and line, item or row.

    say     gets a line for each file that is not plain UTF-8, and one with the keys that are passed over
    """
    place, change = resolve(str(source), dataset_dir, kind)
    if columns:
        change = _renamed(columns, kind)
    found, unknown = [], Counter[str]()
    for record in _records(place, say):
        item = change(_item(record), record.where)
        found.append(kind.parse(item, record.where))
        unknown.update(key for key, value in item.items() if key not in kind.keys and value is not None)
    if unknown:
        names = [json.dumps(name[:40]) for name, _ in unknown.most_common(8)]   # ASCII: cannot drive a terminal
        say(f"{source}: of no format, passed over: {', '.join(names)}{', …' if len(unknown) > 8 else ''}")
    if not found:
        what = f"{', '.join(LINES)} files with " * Path(place).is_dir()
        raise DataError(f"{place}: no {kind.name} in it; expected {what}objects of one of the formats {kind.expected}")
    return found


def _records(place: str, say: Callable[[str], object]) -> Iterator[records.Record]:
    if place.startswith(records.HUB):
        yield from records.hub(place)
        return
    for path in _files(Path(place)):
        if files.kind(path) not in records.SUFFIXES and path.exists():
            raise DataError(f"{path}: expected a .jsonl with a chat a line, a .json with a list of chats, another of "
                            f"{', '.join(records.SUFFIXES)} (also {', '.join(files.PACKED)}), or a folder of them")
        how = files.encoding(path)
        if how is None:
            raise files.no_text(path)
        if how.note:
            say(f"{path}: {how.note}" + f" ({counted(how.damaged, 'place')})" * bool(how.damaged))
        yield from records.records(path, how)


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    inside = [(file, file.relative_to(path).parts) for file in sorted(path.rglob("*")) if file.is_file()]
    shown = [file for file, parts in inside if not any(part.startswith(".") for part in parts)]
    lines = [file for file in shown if files.kind(file) in LINES]
    return lines or [file for file in shown
                     if files.kind(file) in records.SUFFIXES and file.name != "dataset_info.json"]


def _item(record: records.Record) -> Any:
    """A record as JSON has it: a date, say, is text. Raises DataError for half a surrogate pair, which JSON can spell
    and UTF-8 cannot."""
    try:
        text = json.dumps(record.fields, ensure_ascii=False, default=str)
        text.encode()
        return json.loads(text)
    except (UnicodeEncodeError, RecursionError) as error:
        raise DataError(f"{record.where}: not JSON in UTF-8: {error}") from None


# ---- what a person says about a set

def resolve(source: str, dataset_dir: Path | None, kind: Kind = CHATS) -> tuple[str, Change]:
    """Where the items of a source are, and what makes them items of a format. Raises DataError."""
    folder, colon, name = source.rpartition(":")
    if colon and Path(folder).name == "dataset_info.json":
        return _described(Path(folder), name, kind)
    if dataset_dir is not None and not source.startswith(records.HUB) and not Path(source).exists():
        return _described(dataset_dir / "dataset_info.json", source, kind)
    if Path(source).name == "dataset_info.json":
        names = list(_sets(Path(source)))
        raise DataError(f"{source}: says where sets are; name one of them, as {source}:{names[0]}; "
                        f"there are {', '.join(names)}")
    return source, lambda item, where: item


def _renamed(columns: dict[str, str], kind: Kind) -> Change:
    if unknown := sorted(columns.keys() - kind.keys):
        raise DataError(f"--columns {unknown[0]}={columns[unknown[0]]}: no format has {unknown[0]}; expected "
                        f"one of {', '.join(sorted(kind.keys))}")

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
RANKED = {"chosen": "chosen", "rejected": "rejected", "kto_tag": "kto_tag"}
TAGS = {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt",
        "observation_tag": "observation", "function_tag": "function_call", "system_tag": "system"}
OPENAI_TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant",
               "observation_tag": "tool", "function_tag": "function_call", "system_tag": "system"}
SPEAKERS = {tag: speaker for tag, speaker in TAGS.items() if tag not in ("role_tag", "content_tag")}
HUBS = {"hf_hub_url", "ms_hub_url", "om_hub_url"}  # one set in several places; the first is what we read
UNDERSTOOD = {"file_name", "formatting", "columns", "tags", "ranking", "subset", "split"} | HUBS


def _sets(file: Path) -> dict[str, Any]:
    """What a dataset_info.json says of each set, by name. Raises DataError."""
    try:
        info = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise DataError(f"{file}: not JSON: {error}") from None
    need(isinstance(info, dict) and info, str(file), "an object of sets", info)
    return info


def _described(file: Path, name: str, kind: Kind) -> tuple[str, Change]:
    info = _sets(file)
    if name not in info:
        raise DataError(f"{file}: no set {name!r}, and no such file or folder; expected one of {', '.join(info)}")
    entry, where = info[name], f"{file}, {name}"
    need(isinstance(entry, dict), where, "an object", entry)
    formatting = entry.get("formatting", "alpaca")
    need(formatting in COLUMNS, where, "'formatting' to be alpaca, sharegpt or openai", formatting)
    columns = entry.get("columns", COLUMNS[formatting])
    need(isinstance(columns, dict), where, "'columns' to be an object", columns)
    ranked = bool(entry.get("ranking") or RANKED.keys() & {*columns})
    if ranked and kind is CHATS:
        raise DataError(f"{where}: preference data, which --preference and --reward read; expected chats to learn from")
    need(ranked or kind.name != "preferences", where,
         "'ranking' with the columns chosen and rejected, or the column kto_tag", sorted(columns))
    need({"file_name", "hf_hub_url"} & {*entry}, where, "a 'file_name' or a 'hf_hub_url'", sorted(entry))
    known = (ALPACA if formatting == "alpaca" else SHAREGPT) | (RANKED if ranked else {})
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
        for column in ("chosen", "rejected"):
            if isinstance(answer := made.get(column), dict):
                made[column] = _turn(answer, f"{at}, {column}", tags, roles)
        return made
    if hub := entry.get("hf_hub_url"):                  # goes before a file_name there, too
        return f"{records.HUB}{hub}:{entry.get('subset') or ''}:{entry.get('split') or ''}".rstrip(":"), change
    return str(file.parent / entry["file_name"]), change


def _turn(turn: Any, where: str, tags: dict[str, str], roles: dict[str, str]) -> dict[str, Any]:
    """A message with its role under "from", its text under "value"."""
    need(isinstance(turn, dict), where, "an object", turn)
    role, others = turn.get(tags["role_tag"]), {key: value for key, value in turn.items()
                                                if key not in (tags["role_tag"], tags["content_tag"])}
    need(isinstance(role, str) and role in roles, where, f"{tags['role_tag']!r} to be one of {', '.join(roles)}", role)
    return others | {"from": roles[str(role)], "value": turn.get(tags["content_tag"])}
