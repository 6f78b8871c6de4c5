"""Examples of many chats: written by several processes, once, and kept in the run folder for each later start.

    chats ──Writer, a process each──▶ examples ──▶ chats/HASH/               HASH: of the chats, the template, the ids
                                                     tokens.npy  (N,) int32  all examples, one after the other
                                                     targets.npy (N,) int32
                                                     edges.npy   (E + 1,)    where each begins
                                                     counts.npy  (C,)        how many examples each chat has
                                                     facts.json              checksums, and what a person should know

Rank 0 writes, the others wait and read. Files are mapped into memory, not read. A folder is never changed: other chats,
or another template, make another one, so a start that is refused later has changed nothing of the run. Once a run has
begun, the folders that it does not use are removed.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nanollm.data.chat_formats import Chat
from nanollm.data.chat_writing import Example, Writer
from nanollm.errors import DataError
from nanollm.text.tokenizer import Tokenizer

VERSION = 1                     # of what a Writer makes of a chat: another one, and all are written anew
MANY = 200                      # fewer chats are written here, without further processes
CHUNK = 32                      # chats that a process takes at once
FOLDER = "chats"                # in that of a run
FILES = ("tokens", "targets", "edges", "counts")


def folder_for(run: Path, tokenizer: Tokenizer, chats: Sequence[Chat]) -> Path:
    """Where the examples of these chats are kept, under a hash of all that they are made from."""
    digest = hashlib.blake2b(digest_size=12)
    for path in tokenizer.files:
        digest.update(path.name.encode() + path.read_bytes())
    facts = [VERSION, tokenizer.chat_templates, tokenizer.stop_ids, tokenizer.stop_texts, tokenizer.chat_begins,
             tokenizer.eos_id]
    digest.update(json.dumps(facts, sort_keys=True).encode())
    for chat in chats:
        digest.update(json.dumps([chat.messages, chat.tools, chat.answers, chat.plain], sort_keys=True).encode())
    return run / FOLDER / digest.hexdigest()


def build(folder: Path, tokenizer: Tokenizer, chats: Sequence[Chat]) -> None:
    """Write the examples of the chats, unless they are there. Raises DataError."""
    if folder.exists():
        return
    tokens: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    counts, notes = [], Counter[str]()
    for made, said in _written(tokenizer, chats):
        counts.append(len(made))
        tokens += [example.tokens.astype(np.int32) for example in made]
        targets += [example.targets.astype(np.int32) for example in made]
        notes += said
    draft = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        draft.mkdir(parents=True)
        empty = np.zeros(0, np.int32)
        np.save(draft / "tokens.npy", np.concatenate([empty, *tokens]))
        np.save(draft / "targets.npy", np.concatenate([empty, *targets]))
        np.save(draft / "edges.npy", np.cumsum([0, *map(len, tokens)]))
        np.save(draft / "counts.npy", np.array(counts, np.int64))
        sums = [zlib.crc32((draft / f"{name}.npy").read_bytes()) for name in FILES]
        (draft / "facts.json").write_text(json.dumps({"crc32": sums, "notes": notes}))
        draft.rename(folder)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written: {error.strerror or error}; make room") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def load(folder: Path) -> tuple[list[list[Example]], dict[str, int]]:
    """The examples of each chat, and how often what is noted occurred. Raises DataError."""
    try:
        tokens, targets = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("tokens", "targets"))
        edges, counts = (np.load(folder / f"{name}.npy").tolist() for name in ("edges", "counts"))
        facts = json.loads((folder / "facts.json").read_text())
        if facts["crc32"] != [zlib.crc32((folder / f"{name}.npy").read_bytes()) for name in FILES]:
            raise ValueError("its checksum is another one")
        every = iter([Example(tokens[a:b], targets[a:b]) for a, b in pairwise(edges)])
        return [[next(every) for _ in range(count)] for count in counts], facts["notes"]
    except (OSError, EOFError, ValueError, KeyError) as error:
        raise DataError(f"{folder}: cannot be read: {error}; remove it, and it is made anew") from None


def keep_only(folder: Path) -> None:
    """Remove what lies beside the folder: examples of other chats, and what a killed process left."""
    for path in folder.parent.iterdir():
        if path != folder:
            shutil.rmtree(path, ignore_errors=True)


def _written(tokenizer: Tokenizer, chats: Sequence[Chat]) -> Iterator[tuple[list[Example], Counter[str]]]:
    """The examples and notes of each chat, in order."""
    writer = Writer(tokenizer)
    processes = min(len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1, 16)
    bar = tqdm(total=len(chats), desc="chats to tokens", unit="chat", dynamic_ncols=True, disable=len(chats) < MANY)
    with contextlib.ExitStack() as held:
        held.enter_context(bar)
        results: Any = map(_one, ((writer, chat) for chat in chats))
        if len(chats) >= MANY and processes > 1:
            # a fork has the tokenizer already, which takes seconds to load; each starts its own child for templates
            pool = multiprocessing.get_context("fork").Pool(processes, _begin, (writer,))
            held.callback(pool.terminate)
            results = pool.imap(_forked, chats, CHUNK)
        for result in results:
            bar.update()
            yield result


def _one(work: tuple[Writer, Chat]) -> tuple[list[Example], Counter[str]]:
    writer, chat = work
    writer.notes.clear()
    return writer.examples(chat), writer.notes.copy()


_writer: Writer | None = None                           # of a forked process


def _begin(writer: Writer) -> None:
    global _writer
    _writer = writer


def _forked(chat: Chat) -> tuple[list[Example], Counter[str]]:
    assert _writer is not None, "_begin has run"
    return _one((_writer, chat))
