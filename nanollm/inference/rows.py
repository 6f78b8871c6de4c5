"""One cache for many sequences that come and go: each has a row, which is read, copied, rewound and cleared by itself.

    row    0     1     2     3       read(2, ids)                 the next tokens of one row, as a batch of one
           abc   de    fghi  ·       read_together(0, [ids, …])   those of neighbours, as a ragged batch
           └─ together ───┘  free    exchange(1, 2)               so the rows that go on can be the first ones

Both run the model over a view of some rows (`View`), so no other row is touched; where neighbours read parts of several
lengths, the shorter ones have padding behind them. Keys and values are written in place; what a layer replaces instead
(the state of a scan, the window of a convolution) is copied back.

**Rewinding.** Keys and values of a layer that keeps all of them can be cut off behind any token: what lies behind it
has later positions than any query, until it is overwritten. A ring has overwritten the older ones, and a scan has only
its last state: there a row can go back only to a length at which `mark` has copied what they held. A row keeps its last
MARKS marks.

**Angles that follow the length** (dynamic NTK, LongRoPE; `Cache.advance`): where new tokens change them for the tokens
before, all of the row is read again, by itself.

Shapes: n rows of a view, T new tokens, V vocabulary.
"""

from collections.abc import Iterable, Iterator, Sequence
from copy import copy

import torch
from torch import Tensor

from nanollm.cache import Cache
from nanollm.config import ModelConfig
from nanollm.inference.generation import new_cache
from nanollm.inference.static import replaced, tensors
from nanollm.layers.scaling import length_key
from nanollm.layers.state import KVCache, NoState, State
from nanollm.model import Decoder

MARKS = 2


class View(Cache):
    """Some rows of a cache, next to each other, as a cache of their own; `store` brings back what was replaced."""

    def __init__(self, whole: Cache, rows: slice, lengths: Sequence[int]) -> None:
        """lengths: tokens of these rows."""
        vars(self).update(vars(whole))
        self.whole, self.rows, self.batch, self.longest = whole, rows, len(lengths), max(lengths)
        self.ragged = len(lengths) > 1                  # one row needs no mask where a batch of one needs none
        self.ropes = []                                 # `RowCache` sees to them, row by row
        self.lengths = whole.lengths[rows]
        self.held = {size: held[rows] for size, held in whole.held.items()}
        self.states = [narrowed(state, rows) for state in whole.states]

    def store(self) -> None:
        """After a forward pass."""
        self.whole.lengths[self.rows] = self.lengths
        for state, mine in zip(self.whole.states, self.states, strict=True):
            for name in replaced(mine):
                new = tensors(mine, name)
                if getattr(state, name) is None:        # it is made at the first call, of the width that it turns out
                    setattr(state, name, [x.new_zeros(self.whole.batch, *x.shape[1:]) for x in new])
                for old, x in zip(tensors(state, name), new, strict=True):
                    old[self.rows] = x


def narrowed(state: State, rows: slice) -> State:
    """The same state of some rows; it shares the memory."""
    view = copy(state)
    for name, value in vars(state).items():
        if found := [x[rows] for x in tensors(state, name)]:
            setattr(view, name, found if isinstance(value, list) else found[0])
    return view


EVEN = 16       # parts of prompts are padded to a multiple of it, as oneDNN keeps code for every number of rows


class RowCache:
    """The rows of the head of the file, and the tokens that each has read."""

    def __init__(self, model: Decoder, rows: int, length: int) -> None:
        """length: the most tokens of a row."""
        self.model, self.length = model, length
        self.cache = new_cache(model, rows, length)
        self.tokens: list[list[int]] = [[] for _ in range(rows)]
        self.marks: list[dict[int, list[Tensor]]] = [{} for _ in range(rows)]  # length → what a row held there
        for state in self.cache.states:
            if isinstance(state, KVCache):
                shape = rows, state.size + 1
                self.cache.held.setdefault(state.size, torch.full(shape, -1, device=self.cache.device))
        self.rewinds = all(isinstance(state, NoState) or type(state) is KVCache and not state.ring
                           for state in self.cache.states)

    # ---- reading

    @torch.inference_mode()
    def read(self, row: int, new: Sequence[int], last: int = 1) -> Tensor:
        """The next T tokens of one row; logits of the last, (1, V), or of the last few. Where it fails, the row is to
        be cleared."""
        known = self.tokens[row]
        if known and self.turns(len(known), len(known) + len(new)):
            new = [*known, *new]
            self.clear(row)
        hidden = self._feed(slice(row, row + 1), [new], None)
        self.tokens[row] += new
        return self.model.head(hidden[0, -last:])

    @torch.inference_mode()
    def read_together(self, first: int, new: Sequence[Sequence[int]], wanted: Sequence[bool] | None = None) -> Tensor:
        """The next tokens of each of the rows from `first` on, none of which `turns`; of some of them none. Logits of
        the last token of the rows that are wanted, else of all that read, (n, V). Where it fails with one token a row
        it can be tried again."""
        wanted = [len(each) > 0 for each in new] if wanted is None else wanted
        if len(new) == 1:
            return self.read(first, new[0])[: sum(wanted)]
        rows, counts = slice(first, first + len(new)), [len(each) for each in new]
        longest = max(counts) if max(counts) == 1 else -(-max(counts) // EVEN) * EVEN
        padded = [[*each, *[0] * (longest - len(each))] for each in new]
        places = [[*range(len(known), len(known) + count), *[-1] * (longest - count)]
                  for known, count in zip(self.tokens[rows], counts, strict=True)]
        hidden = self._feed(rows, padded, places)
        for known, each in zip(self.tokens[rows], new, strict=True):
            known += each
        last = [(at, count - 1) for at, count in enumerate(counts) if wanted[at]]
        if not last:
            return hidden.new_zeros(0, self.model.config.vocab)
        return self.model.head(hidden[tuple(zip(*last, strict=True))])

    def _feed(self, rows: slice, new: Sequence[Sequence[int]], places: Sequence[Sequence[int]] | None) -> Tensor:
        device = self.cache.device
        view = View(self.cache, rows, [len(tokens) for tokens in self.tokens[rows]])
        positions = None if places is None else torch.tensor(places, device=device)
        hidden = self.model.hidden(torch.tensor(new, device=device), positions, view)   # (n, T, D)
        view.store()
        return hidden

    def turns(self, before: int, after: int) -> bool:
        """Whether a row that grows (or shrinks) so needs other angles for the tokens that it has."""
        def keys(n: int) -> list[float]:
            found = (length_key(rope, torch.tensor(n)) for rope in self.cache.ropes)
            return [key.item() for key in found if key is not None]

        return keys(before) != keys(after)

    # ---- what a row remembers

    def usable(self, row: int, prompt: Sequence[int]) -> int:
        """How many tokens of a prompt need not be read, if it takes over what this row remembers. Never the last one,
        whose logits are wanted."""
        known = self.tokens[row]
        same = self._same(known, prompt, self.marks[row])
        return 0 if self.turns(same, len(known)) else same

    def usable_after(self, read: Sequence[int], prompt: Sequence[int]) -> int:
        """The same of a row that has read these tokens, with a mark before the last one."""
        return self._same(read, prompt, [len(read) - 1])

    def _same(self, known: Sequence[int], prompt: Sequence[int], marks: Iterable[int]) -> int:
        most = min(len(known), len(prompt) - 1)
        same = next((at for at in range(most) if known[at] != prompt[at]), most)
        if self.rewinds:
            return same
        return max((n for n in [*marks, len(known)] if n <= same), default=0)

    @torch.inference_mode()
    def take(self, row: int, source: int, length: int) -> None:
        """Make a row hold the first `length` tokens of another, or of itself; a length that `usable` gave."""
        if length == 0:
            return self.clear(row)
        marks = self.marks[source]
        if row != source:
            for mine, its in zip(memory(self.cache, row, length), memory(self.cache, source, length), strict=True):
                mine.copy_(its)
        if length in marks:                             # else it is all that the other has, or keys and values alone
            for mine, kept in zip(memory(self.cache, row, length, kept=True), marks[length], strict=True):
                mine.copy_(kept)
        self.tokens[row] = self.tokens[source][:length]
        self.marks[row] = {n: mark for n, mark in marks.items() if n <= length}
        self.cache.lengths[row] = length

    def mark(self, row: int) -> None:
        """Let this row come back to where it is now."""
        if self.rewinds or not self.tokens[row]:
            return
        marks = self.marks[row]
        marks[len(self.tokens[row])] = [x.clone() for x in memory(self.cache, row, len(self.tokens[row]), kept=True)]
        while len(marks) > MARKS:
            del marks[min(marks)]

    @torch.inference_mode()
    def exchange(self, one: int, other: int) -> None:
        """Let two rows change places."""
        if one == other:
            return
        lengths = len(self.tokens[one]), len(self.tokens[other])
        aside = [x.clone() for x in memory(self.cache, one, lengths[0])]
        for mine, its in zip(memory(self.cache, one, lengths[1]), memory(self.cache, other, lengths[1]), strict=True):
            mine.copy_(its)
        for mine, its in zip(memory(self.cache, other, lengths[0]), aside, strict=True):
            mine.copy_(its)
        self.tokens[one], self.tokens[other] = self.tokens[other], self.tokens[one]
        self.marks[one], self.marks[other] = self.marks[other], self.marks[one]
        self.cache.lengths[one], self.cache.lengths[other] = lengths[1], lengths[0]

    @torch.inference_mode()
    def clear(self, row: int, wipe: bool = False) -> None:
        """Forget all of a row. wipe: keys and values too, which nothing reads but 0 · NaN: after a failure."""
        for x in memory(self.cache, row, self.length, kept=not wipe):
            x.zero_()
        for held in self.cache.held.values():
            held[row] = -1
        self.cache.lengths[row] = 0
        self.tokens[row], self.marks[row] = [], {}


def memory(cache: Cache, row: int, length: int, kept: bool = False) -> Iterator[Tensor]:
    """All that a row of so many tokens remembers, as views. kept: only what cannot be rewound."""
    for state in cache.states:
        for name in vars(state):
            for x in tensors(state, name):
                if not (isinstance(state, KVCache) and name in ("k", "v")):
                    yield x[row]
                elif state.ring or not kept:
                    yield x[row, :, :length]            # of a ring all of it, where the row is longer
    for size, held in cache.held.items():
        if size < cache.length or not kept:
            yield held[row]


def mark_bytes(config: ModelConfig, length: int, dtype: torch.dtype) -> int:
    """The memory of a mark; nothing is allocated."""
    cache = Cache(config, 1, length, dtype, "meta")
    return sum(x.numel() * x.element_size() for x in memory(cache, 0, length, kept=True))
