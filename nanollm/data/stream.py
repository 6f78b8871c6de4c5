"""From shards to batches: one stream of tokens, windows cut from it, in an order that needs no state.

    <|endoftext|> t t t t t <|endoftext|> t t t <|endoftext|> …          the stream: a mark before each document
                  └───────── window of T + 1 ─────────┘
    tokens          t t t t <|endoftext|> t t t                          what the model reads
    targets         t t t <|endoftext|> t t t <|endoftext|>              what it should say: the same, one later
    positions       0 1 2 3 0             1 2 3                          a 0 begins a document

The mark opens a document as its first input and closes the one before as its last target, so a model learns to begin
and to end. Windows start every T tokens: each token but the first is a target once an epoch.

A batch is a pure function of (seed, row number): nothing has to be saved to go on where a run stopped, and any number
of machines can share the rows out. Three maps lead from a row of the run to a window, each in constant time:

    row → source           of a block of 1024 rows, source i has c_i, as its weight says; their order is a permutation
                           keyed by (seed, block). Where that would give a source of any weight no row, a block has
                           twice the rows, or four times …
    row of source → epoch  n → (n div rows, n mod rows)
    place → window         a permutation of the windows keyed by (seed, source, epoch)

Shapes: B batch, T tokens of the context, N tokens in all. data/shards.py has the format of the files; data/prepare.py
makes them.
"""

import functools
import hashlib
import os
import re
import struct
import zlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from nanollm.data.shards import DRAFT, InMemory, Shard, read_meta
from nanollm.errors import DataError

BLOCK, LARGEST = 1 << 10, 1 << 40       # rows in which each source of a mixture has its exact share, at least one
MAKE = "python -m nanollm.data makes them from text"
NAME = re.compile(r"(.*_)?(train|val|held_out)[-_]?(\d*)\.bin")         # train-00000.bin, fineweb_train_000001.bin

Row = tuple[np.ndarray, np.ndarray, np.ndarray]                         # tokens, targets, positions: (T,) int64 each


class Batch(NamedTuple):
    """B rows, as the model reads them and as the loss asks for them."""
    tokens: Tensor              # (B, T) int64
    targets: Tensor             # (B, T) int64, −100 where there is nothing to predict
    positions: Tensor | None    # (B, T) int64, None where no document begins inside a row: attention is then causal

    @property
    def real(self) -> Tensor | None:
        """(B, T) bool, False where a row is padded; None where no position says so, and all tokens are real."""
        return None if self.positions is None else self.positions >= 0

    @property
    def divisor(self) -> int:
        """What the sums of a loss are divided by: targets."""
        return int((self.targets >= 0).sum())

    @property
    def seen(self) -> int:
        """Tokens that are no padding."""
        return self.tokens.numel() if self.real is None else int(self.real.sum())

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        positions = None if self.positions is None else self.positions.to(device)
        return Batch(self.tokens.to(device), self.targets.to(device), positions)


def stack(rows: Sequence[Row]) -> Batch:
    """B rows of one length → a batch."""
    tokens, targets, positions = (np.stack(part) for part in zip(*rows, strict=True))
    plain = (positions == np.arange(positions.shape[1])).all()
    return Batch(torch.from_numpy(tokens), torch.from_numpy(targets), None if plain else torch.from_numpy(positions))


# ---- sources

class Source(Protocol):
    """Where rows come from: files of tokens here, chats elsewhere."""
    name: str
    rows: int

    @property
    def fingerprint(self) -> int:
        """Of all that the rows are made from."""
        ...

    @property
    def stack(self) -> Callable[[Sequence[Any]], Any]:
        """The collator: rows → a batch."""
        ...

    def row(self, index: int) -> Any: ...
    def verify(self, vocab: int) -> None: ...
    def unchanged(self) -> None: ...


class Tokens:
    """Shards taken as one stream, and the stream cut into windows, which may straddle shards.

    end      the mark between documents, for shards that do not say; None: none, so positions never begin again
    short    True: the last window may be short, and is filled up with targets of −100, so that all tokens are predicted
    """
    stack = staticmethod(stack)

    def __init__(self, name: str, shards: Sequence[Shard | InMemory], context: int, end: int | None = None, *,
                 short: bool = False) -> None:
        self.name, self.shards, self.context, self.digest = name, shards, context, shards[0].digest
        self.end = end if shards[0].end is None else shards[0].end
        self._stops = [*accumulate(shard.count for shard in shards)]            # where each shard ends in the stream
        predicted = self._stops[-1] - 1
        self.rows = -(-predicted // context) if short else predicted // context
        if self.rows < 1:
            raise DataError(f"{name}: {predicted + 1} tokens do not fill one context of {context} and a target; "
                            "give more text, or a smaller context")

    @functools.cached_property
    def fingerprint(self) -> int:
        """Of the bytes and how they are read. Shards that are not ours are read through for it."""
        return zlib.crc32(repr([(shard.crc32, shard.dtype.str, shard.count) for shard in self.shards]).encode())

    def row(self, index: int) -> Row:
        """Window `index`: tokens, targets, positions, each (T,) int64."""
        assert 0 <= index < self.rows, (index, self.rows)
        start, count = index * self.context, self.context
        window = self._read(start, min(start + count + 1, self._stops[-1]))
        tokens, targets = np.full(count, self.end or 0, np.int64), np.full(count, -100, np.int64)
        tokens[: len(window)], targets[: len(window) - 1] = window[:count], window[1:]
        columns, mark = np.arange(count), -1 if self.end is None else self.end  # no id is −1
        return tokens, targets, columns - np.maximum.accumulate(np.where(tokens == mark, columns, 0))

    def _read(self, start: int, stop: int) -> np.ndarray:
        parts, number = [], bisect_right(self._stops, start)
        while start < stop:
            shard, first = self.shards[number], self._stops[number] - self.shards[number].count
            parts.append(shard.tokens[start - first : stop - first])
            start, number = self._stops[number], number + 1
        return np.concatenate(parts)

    def verify(self, vocab: int) -> None:                       # raises DataError, as does `unchanged`: see Shard
        for shard in self.shards:
            shard.verify(vocab)

    def unchanged(self) -> None:
        for shard in self.shards:
            shard.unchanged()

    def moved(self, draft: Path) -> None:
        """The files of a draft lie in the folder around it now."""
        for shard in self.shards:
            if isinstance(shard, Shard) and shard.path.parent == draft:
                shard.path = draft.parent / shard.path.name


def is_shard_folder(path: Path) -> bool:
    """Whether it is a folder with shards to train on, by their names."""
    return path.is_dir() and any(match and match[2] == "train" for match in map(NAME.fullmatch, os.listdir(path)))


def open_folder(path: Path, context: int, end: int | None = None) -> tuple[Tokens, Tokens | None]:
    """(training, held out) of a folder of shards, or of one .bin file, which has nothing held out.

    The shards are train-*.bin and held_out-*.bin (data/prepare.py), train.bin and val.bin (nanoGPT), *_train_*.bin and
    *_val_*.bin (llm.c). `end` is the mark between documents where the files do not say. Raises DataError for anything
    else.
    """
    if path.is_file():
        return Tokens(str(path), [Shard(path)], context, end), None
    if not is_shard_folder(path):
        found = sorted(os.listdir(path)) if path.is_dir() else ["no such file or folder"]
        raise DataError(f"{path}: found {', '.join(found[:9]) or 'nothing'}, expected shards named train….bin; {MAKE}")
    named = sorted(filter(None, map(NAME.fullmatch, os.listdir(path))),
                   key=lambda match: (match[1] or "", int(match[3] or 0), match[0]))
    if named[0][1] != named[-1][1]:
        raise DataError(f"{path}: found shards of two sets, {named[0][0]} and {named[-1][0]}, expected one; "
                        "move them apart")
    train = [Shard(path / match[0]) for match in named if match[2] == "train"]
    held_out = [Shard(path / match[0]) for match in named if match[2] != "train"]
    for shard in train + held_out:
        for fact in ("dtype", "end", "digest"):
            found, expected = getattr(shard, fact), getattr(train[0], fact)
            if found != expected:
                raise DataError(f"{shard.path}: {fact}: found {found}, "
                                f"expected {expected} as in {train[0].path.name}; {MAKE}, all with one tokenizer")
    meta, counts = read_meta(path), [sum(shard.count for shard in shards) for shards in (train, held_out)]
    facts = meta["facts"] if isinstance(meta.get("facts"), dict) else {}
    expected = [facts.get("train_tokens"), facts.get("held_out_tokens")]
    if "format" in meta and counts != expected:
        raise DataError(f"{path}: found {counts} tokens to train on and held out, "
                        f"expected {expected} as in meta.json (None: it is unfinished); {MAKE}")
    name = path.parent if path.name == DRAFT else path
    beside = Tokens(f"{name}, held out", held_out, context, end, short=True) if held_out else None
    return Tokens(str(name), train, context, end), beside


# ---- the order of rows

def shuffle(index: int | np.ndarray, count: int, key: tuple[int, ...]) -> int | np.ndarray:
    """Where a permutation of range(count) sends `index`, an int or (n,) uint64: no table, the same on every machine.

    A Feistel network permutes the numbers of 2h bits whatever its round function is (Luby & Rackoff 1988): each of
    6 rounds swaps the halves and adds to one a hash of the other. 4ʰ ≤ 4 count; what leaves range(count) is sent on
    until it is back inside ("cycle walking", Black & Rogaway 2002), which keeps it a permutation.
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask, keys = (1 << half) - 1, struct.unpack("<6Q", hashlib.blake2b(repr(key).encode(), digest_size=48).digest())

    def permute(x: int | np.ndarray) -> int | np.ndarray:       # arrays of uint64 overflow as the masks say for an int
        left, right = x >> half, x & mask
        for round_key in keys:
            hashed = (right ^ round_key) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
            hashed = (hashed ^ hashed >> 32) * 0xD6E8FEB86659FD93 & 0xFFFFFFFFFFFFFFFF
            left, right = right, left ^ (hashed >> 32 & mask)
        return left << half | right

    moved = permute(index)
    if isinstance(moved, int):
        while moved >= count:
            moved = permute(moved)
        return moved
    while (outside := moved >= count).any():
        moved[outside] = permute(moved[outside])
    return moved


class Stream:
    """All rows of a run, without end: row r is the same on every machine, whoever asks for it and whenever.

    weights   the shares of the sources, of any sum; None: in proportion to their rows
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float] | None, seed: int) -> None:
        self.sources, self.seed = sources, seed
        weights = [source.rows for source in sources] if weights is None else weights
        if len(weights) != len(sources) or min(weights) < 0 or not 0 < sum(weights) < float("inf"):
            names = ", ".join(source.name for source in sources)
            raise DataError(f"weights {list(weights)}: expected {len(sources)} numbers, 0 or more, not all 0, "
                            f"for {names}")
        self.block = BLOCK
        while not all(count for count, weight in zip(shares(weights, self.block), weights, strict=True) if weight):
            self.block *= 2
            if self.block > LARGEST:
                weight, source = min((weight, number) for number, weight in enumerate(weights) if weight)
                raise DataError(f"{sources[source].name}: weight {weight:g} of {sum(weights):g} is less than one row "
                                f"in {LARGEST}; expected more, or 0")
        self.counts = shares(weights, self.block)

    @property
    def fingerprint(self) -> int:                               # of everything that decides what a row holds
        held = [(source.fingerprint, source.rows) for source in self.sources]
        return zlib.crc32(repr((self.seed, self.counts, held)).encode())

    def place(self, row: int) -> tuple[int, int, int]:
        """(source, epoch, window) of row `row`."""
        source, n = 0, row
        if len(self.sources) > 1:
            block, at = divmod(row, self.block)
            at, ends = int(shuffle(at, self.block, (self.seed, block))), [*accumulate(self.counts)]
            source = bisect_right(ends, at)
            n = block * self.counts[source] + at - (ends[source] - self.counts[source])
        epoch, n = divmod(n, self.sources[source].rows)
        return source, epoch, int(shuffle(n, self.sources[source].rows, (self.seed, source, epoch)))

    def batch(self, first: int, count: int) -> Any:
        """Rows first … first + count − 1, as the collator of their source lays them out."""
        places = map(self.place, range(first, first + count))
        return self.sources[0].stack([self.sources[source].row(window) for source, _, window in places])


def shares(weights: Sequence[float], block: int) -> list[int]:
    """`block` rows parted by weight: each has its share rounded down, the largest remainders take the rows left
    over."""
    exact = [block * weight / sum(weights) for weight in weights]
    order = sorted(range(len(weights)), key=lambda i: int(exact[i]) - exact[i])
    more = order[: block - sum(map(int, exact))]
    return [int(exact[i]) + (i in more) for i in range(len(weights))]
