"""Text → ids, in memory that depends neither on the length of a text nor on the size of a file.

    parts of a document → chunks of at most CHUNK characters → batches of chunks, encoded on all cores → ids

**Where a document is cut.** Its ids must be those of the whole text. A tokenizer looks at a stretch of text at a time
(words, for most), so a cut between two stretches changes nothing. Which cuts are such, its own answer tells: with K
characters on either side,

    ids(left + right) = ids(left) + ids(right)          K = 256, and again 129

Places are tried from the end of the chunk backwards over half of it, likely ones first: line ends, then before or
behind a space, then anywhere (Chinese, base64). Where none of some hundred passes, it is cut at the end of the chunk,
and ids there may differ from those of the whole: so it is within one letter that is repeated some ten thousand times.

**Marks around a document.** Where the tokenizer itself puts ids before a text (BOS; its post-processor or add_bos_token
says so) and has an EOS, each document stands between the two, as transformers' tokenizer(text) writes it, and EOS:

    BOS t t t EOS BOS t t EOS …          positions begin anew at BOS; EOS, and BOS after it, are predicted as all tokens

Else one mark, EOS or else BOS, stands before each document and at the very end:

    EOS t t t EOS t t … EOS              it closes one document as a target, and opens the next as an input
"""

import multiprocessing
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

import nanollm.text.tokenizer
from nanollm.data.documents import Part
from nanollm.errors import DataError
from nanollm.text.tokenizer import Tokenizer, Tokenizers
from nanollm.text.tokenizer_files import one_error

CHUNK = 1 << 16                 # characters that are encoded at once
BATCH = 1 << 21                 # characters that all cores together have at hand
NEAR, NEARER, TRIES = 256, 129, 32      # K above; places that are tried of each kind
MANY = 1 << 22                  # characters from which on other processes are worth their start
PROCESSES = 8                   # at most


class Marks(NamedTuple):
    """The ids around documents, see the head of the file."""
    before: tuple[int, ...]     # each of them
    after: tuple[int, ...]
    last: tuple[int, ...]       # at the end of all


def marks(tokenizer: Tokenizer) -> Marks:
    """Raises DataError where the tokenizer has neither EOS nor BOS."""
    end = tokenizer.bos_id if tokenizer.eos_id is None else tokenizer.eos_id
    if end is None:
        raise DataError(f"{tokenizer.folder}: found no eos_token and no bos_token, expected one, "
                        "to stand between documents")
    if tokenizer.prefix and tokenizer.eos_id is not None and tokenizer.prefix != (end,):
        return Marks(tokenizer.prefix, (end,), ())
    return Marks(tokenizer.prefix or (end,), (), (tokenizer.prefix or (end,))[:1])


class Chunk(NamedTuple):
    """A piece of a document of one side (0 to train on, 1 held out)."""
    side: int
    text: str
    first: bool
    last: bool


class Encoder:
    """The ids of many texts at once: on all cores, by tokenizers' own threads or, for sentencepiece, by processes.

    size    characters that are to come, about: few of them are encoded in this process
    """

    def __init__(self, tokenizer: Tokenizer, size: int) -> None:
        self.tokenizer, self.backend, self.pool = tokenizer, tokenizer.backend, None
        if not isinstance(self.backend, Tokenizers) and size > MANY and (os.cpu_count() or 1) > 1:
            self.pool = ProcessPoolExecutor(min(os.cpu_count() or 1, PROCESSES), multiprocessing.get_context("spawn"),
                                            _open, (tokenizer.folder,))
        self.begun = self._fast(["\n"])[0] if isinstance(self.backend, Tokenizers) else []

    def __enter__(self) -> "Encoder":
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def ids(self, texts: list[str], continues: list[bool]) -> list[list[int]]:
        """Of each text, without marks, as Tokenizer.encode(text, bos=False, continues=…)."""
        if isinstance(self.backend, Tokenizers):                # "\n": see Tokenizers.encode
            lead = [more and self.backend.strips for more in continues]
            found = self._fast(["\n" + text if more else text for text, more in zip(texts, lead, strict=True)])
            return [ids[len(self.begun):] if more else ids for ids, more in zip(found, lead, strict=True)]
        if self.pool is not None and len(texts) > 1:
            try:
                return [*self.pool.map(_encode, texts, continues)]
            except BrokenProcessPool:                           # killed, or a script that cannot be started again
                self.pool = None
        return [self.tokenizer.encode(text, bos=False, continues=more)
                for text, more in zip(texts, continues, strict=True)]

    def _fast(self, texts: list[str]) -> list[list[int]]:
        assert isinstance(self.backend, Tokenizers)
        with self.backend.lock, one_error(self.backend.where, "rules that this text can be cut by"):
            self.backend.backend.encode_special_tokens = True   # a text that spells a special token does not become one
            found = self.backend.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in found]

    def chunks(self, parts: Iterable[tuple[int, Part]]) -> Iterator[Chunk]:
        """(side, part) → chunks, cut as the head of the file says."""
        held, first = ["", ""], [True, True]                    # of each side: a document that is cut has both
        for side, part in parts:
            text, at = held[side] + part.text, 0
            while len(text) - at > CHUNK + NEAR:
                length = self.cut(text[at: at + CHUNK + NEAR])
                yield Chunk(side, text[at: at + length], first[side], False)
                at, first[side] = at + length, False
            held[side] = text[at:]
            if part.ends:
                yield Chunk(side, held[side], first[side], True)
                held[side], first[side] = "", True

    def cut(self, text: str) -> int:
        """How many characters of a text of CHUNK + NEAR are the next chunk: at most CHUNK."""
        tried: set[int] = set()
        for places in (line_ends, spaces, range_back):
            for number, at in enumerate(places(text)):
                if number == TRIES:
                    break
                if at in tried:
                    continue
                tried.add(at)
                around = [part for near in (NEAR, NEARER)
                          for part in (text[at - near: at + near], text[at - near: at], text[at: at + near])]
                whole, left, right, again, lefter, righter = self.ids(around, [True] * 6)
                if whole == left + right and again == lefter + righter:
                    return at
        return CHUNK


def line_ends(text: str) -> Iterator[int]:
    """Behind a line end, before what is no white space, from CHUNK backwards over half of a chunk."""
    at = CHUNK
    while (at := text.rfind("\n", CHUNK // 2, at)) > 0:
        if not text[at + 1].isspace():
            yield at + 1


def spaces(text: str) -> Iterator[int]:
    """Before a space and behind it, where it stands alone, from CHUNK backwards."""
    at = CHUNK
    while (at := text.rfind(" ", CHUNK // 2, at)) > 0:
        if not text[at - 1].isspace() and not text[at + 1].isspace():
            yield from (at, at + 1)


def range_back(text: str) -> Iterator[int]:
    """Anywhere, from CHUNK backwards."""
    return iter(range(CHUNK, CHUNK // 2, -1))


def encoded(encoder: Encoder, parts: Iterable[tuple[int, Part]], around: Marks,
            size: int) -> Iterator[list[tuple[Chunk, list[int]]]]:
    """(side, part) → batches of (chunk, its ids with the marks around the document). `size`: characters, for the
    bar."""
    batch: list[Chunk] = []
    held = 0

    def done() -> list[tuple[Chunk, list[int]]]:
        found = encoder.ids([chunk.text for chunk in batch], [not chunk.first for chunk in batch])
        return [(chunk, [*around.before] * chunk.first + ids + [*around.after] * chunk.last)
                for chunk, ids in zip(batch, found, strict=True)]

    with tqdm(total=size, desc="tokens", unit="char", unit_scale=True, leave=False) as bar:
        for chunk in encoder.chunks(parts):
            batch.append(chunk)
            held += len(chunk.text)
            if held >= BATCH or len(batch) == 1 << 14:
                yield done()
                bar.update(held)
                batch, held = [], 0
        if batch:
            yield done()
            bar.update(held)


# ---- in other processes

_TOKENIZER: Tokenizer | None = None


def _open(folder: Path) -> None:
    global _TOKENIZER
    _TOKENIZER = nanollm.text.tokenizer.load(folder)


def _encode(text: str, continues: bool) -> list[int]:
    assert _TOKENIZER is not None
    return _TOKENIZER.encode(text, bos=False, continues=continues)
