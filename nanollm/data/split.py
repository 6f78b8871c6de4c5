"""What is held out: about 5 % of the text, of documents of every size, by their contents only.

    short documents   sorted by size; of each GROUP of 20 neighbours one is held out whole: the one with the least hash
    long documents    each of more than LONG = 2 % of all text gives its end, the last 5 %
    few documents     where fewer than 20 are short, those give their ends too

A whole document is the better test: nothing of it was trained on. But one of 2 % or more would weigh too much, and
where documents are few, one of them may be all there is of its kind. Held out are 5 % of the short text, give or take
its largest document (the others of a group are no larger than the smallest of the next), and so 3 to 7 % of all.

The end of a document begins behind the last line end, or else the last space, of the 5 % before the last 5 %, or of
WINDOW characters where that is less; or else just there. Its length counts up to its last character that is no white
space.

Where text of its own is given to measure on (documents.Apart), that is held out, and nothing of the other.

The rule asks for no names, so the same text is parted alike on every machine, wherever it lies. A text that occurs
twice counts once, so none is on both sides.

Shapes: N documents.
"""

import hashlib
import re
from array import array
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from nanollm.data.documents import Apart, Part
from nanollm.errors import DataError, counted

HELD_OUT, GROUP, LONG, WINDOW = 0.05, 20, 0.02, 1 << 16
WHOLE, DROPPED = np.iinfo(np.int64).max, -1
SPACE = re.compile(r"\s")


class Index(NamedTuple):
    """All documents, in two numbers each, and a hash of all."""
    hashes: np.ndarray          # (N,) uint64
    sizes: np.ndarray           # (N,) int64, in characters, without white space at the end
    texts: str                  # blake2b of the texts in their order, in hex
    own: int | None = None      # documents at the end that were given to measure on; None: none were, see `plan`

    @classmethod
    def of(cls, parts: Iterable[Part]) -> "Index":
        """Read all documents through, once. 16 bytes of memory a document, whatever its length."""
        if isinstance(parts, Apart):
            train, held_out = cls.of(parts.train), cls.of(parts.held_out or ())
            return cls(np.concatenate([train.hashes, held_out.hashes]), np.concatenate([train.sizes, held_out.sizes]),
                       f"{train.texts} {held_out.texts}", len(held_out.sizes))
        hashes, sizes, everything = array("Q"), array("q"), hashlib.blake2b(digest_size=16)
        one, at, size = hashlib.blake2b(digest_size=16), 0, 0
        for part in tqdm(parts, desc="reading", unit="part", leave=False):
            one.update(part.text.encode(errors="replace"))
            if solid := len(part.text.rstrip()):
                size = at + solid
            at += len(part.text)
            if part.ends:
                everything.update(one.digest())
                hashes.append(int.from_bytes(one.digest()[:8], "little"))
                sizes.append(size)
                one, at, size = hashlib.blake2b(digest_size=16), 0, 0
        return cls(np.array(hashes, np.uint64), np.array(sizes, np.int64), everything.hexdigest())


def plan(index: Index) -> np.ndarray:
    """(N,) int64: how many characters of each document are trained on, at most. WHOLE: all. 0: none, it is held out.
    DROPPED: it is empty, or the same as an earlier one. Raises DataError where nothing can be held out."""
    hashes, sizes, _, own = index
    keep, train = np.full(len(sizes), DROPPED), len(sizes) - (own or 0)
    keep[np.unique(hashes[:train], return_index=True)[1]] = WHOLE
    keep[train:] = 0
    keep[sizes == 0] = DROPPED
    if own is not None:
        return keep
    unique = np.flatnonzero(keep == WHOLE)
    short = unique[sizes[unique] <= LONG * sizes[unique].sum()]
    if len(short) < GROUP:
        short = short[:0]
    long = np.setdiff1d(unique, short)
    ends = np.floor((1 - HELD_OUT) * sizes[long]).astype(np.int64)
    keep[long] = np.where(ends > 0, ends, WHOLE)
    by_size = short[np.lexsort((hashes[short], sizes[short]))][::-1]            # from the largest on
    groups = by_size[: len(by_size) // GROUP * GROUP].reshape(-1, GROUP)
    keep[groups[np.arange(len(groups)), hashes[groups].argmin(1)]] = 0
    if (keep[unique] == WHOLE).all():
        raise DataError(f"{counted(len(unique), 'document')} of {counted(int(sizes[unique].sum()), 'character')}: "
                        "too little text to hold out a part of it")
    return keep


def sides(parts: Iterable[Part], keep: np.ndarray) -> Iterator[tuple[int, Part]]:
    """(0, part) to train on and (1, part) held out, as `plan` says; the two sides of a document are two documents."""
    number, at, window = 0, 0, ""               # of the document; where this part begins in it; what may hold the cut
    for part in parts:
        limit, text = int(keep[number]), part.text
        if limit in (0, WHOLE):
            yield int(limit == 0), part
        elif limit != DROPPED:
            start = limit - min(WINDOW, limit // 19)            # limit / 19 is 5 % of the document
            if at <= limit:                                     # not cut yet
                before = max(0, start - at)
                if before:
                    yield 0, Part(part.name, text[:before], ends=False)
                window += text[before:]
                if at + len(text) > limit:
                    cut = boundary(window[: limit - start])
                    yield 0, Part(part.name, window[:cut])
                    yield 1, Part(part.name, window[cut:], part.ends)
                    window = ""
            else:
                yield 1, part
        at += len(text)
        if part.ends:
            number, at = number + 1, 0


def boundary(text: str) -> int:
    """Where to cut: behind the last line end, or else behind the last white space, or else at the end."""
    if at := text.rfind("\n") + 1:
        return at
    spaces = [match.end() for match in SPACE.finditer(text)]
    return spaces[-1] if spaces else len(text)
