"""Preferences as batches: two sequences a row, the better answer and the worse one, each behind the same prompt.

    row            prompt 1 │ chosen 1        prompt 1 │ rejected 1      of one item of preference_formats.py
    batch of B     prompt 1 │ chosen 1   · ·                             2B sequences, padded at their ends to the
                   prompt 2 │ chosen 2 ─────                             longest of them: the better answers first,
                   prompt 1 │ rejected 1 ───                             then the worse ones
                   prompt 2 │ rejected 2 ·
    targets        −100 on the prompt and the padding, so a sum over targets is log p(answer | prompt)

Padding at the end needs no mask: nothing that is real stands behind it. Ids and targets are those of chat_writing.py,
so the answer ends as inference ends it.

**Labels.** An item with one answer and a label (KTO) has a second sequence too: the same prompt with the answer to
another one, of the next item that has another prompt. KTO measures with it how far the model has moved on answers that
nobody judged. Of pairs KTO makes two items, one a label.

    what is passed over     pairs whose answers are equal; pairs of which one answer is longer than the context
    what is held out        5 % of the prompts, by a hash of what they say: all answers to one prompt stay together

Shapes: B rows, T tokens of the longest sequence.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanollm.data import chat_store
from nanollm.data.chat_files import read
from nanollm.data.chat_writing import IGNORED, Example
from nanollm.data.preference_formats import PREFERENCES, Preference
from nanollm.data.sft import content, few, picture, split
from nanollm.errors import DataError, counted
from nanollm.text.tokenizer import Tokenizer


class PairBatch(NamedTuple):
    """B rows of two sequences each. First come the B better answers, or those with a label, then the B others."""
    tokens: Tensor              # (2B, T) int64
    targets: Tensor             # (2B, T) int64, −100 where nothing is judged
    lengths: Tensor             # (2B,) int64, without padding
    labels: Tensor              # (B,) bool: whether the first answer is a good one; of pairs it is
    margins: Tensor             # (B,) float32
    reference: Tensor           # (2B,) float32: log p of each answer under the reference model; NaN: not measured

    @property
    def real(self) -> Tensor:
        """(2B, T) bool, False where a sequence is padded."""
        return torch.arange(self.tokens.shape[1], device=self.tokens.device) < self.lengths[:, None]

    @property
    def divisor(self) -> int:
        """What the sums of a loss are divided by: rows."""
        return len(self.labels)

    @property
    def seen(self) -> int:
        """Tokens that are no padding."""
        return int(self.lengths.sum())

    def to(self, device: torch.device) -> "PairBatch":
        """The same batch on a device."""
        return PairBatch(*(part.to(device) for part in self))


class Pair(NamedTuple):
    """One row."""
    first: Example
    second: Example
    label: bool
    margin: float
    reference: Tensor           # (2,)


def stack(pairs: Sequence[Pair]) -> PairBatch:
    """The collator: B rows → a batch."""
    sequences = [pair.first for pair in pairs] + [pair.second for pair in pairs]
    lengths = torch.tensor([len(one.tokens) for one in sequences])
    tokens = torch.zeros(len(sequences), int(lengths.max()), dtype=torch.int64)
    targets = torch.full_like(tokens, IGNORED)
    for row, one in enumerate(sequences):
        tokens[row, : len(one.tokens)] = torch.from_numpy(one.tokens.astype(np.int64))
        targets[row, : len(one.tokens)] = torch.from_numpy(one.targets.astype(np.int64))
    return PairBatch(tokens, targets, lengths, torch.tensor([pair.label for pair in pairs]),
                     torch.tensor([pair.margin for pair in pairs], dtype=torch.float32),
                     torch.stack([pair.reference for pair in pairs], 1).flatten())


@dataclass(frozen=True)
class Written:
    """An item in ids."""
    examples: tuple[Example, Example]
    label: bool
    margin: float


class Pairs:
    """Items in ids, a `stream.Source` for the trainer.

    reference   (rows, 2) float32: log p of each answer under the reference model, which training/reference.py measures
    """
    stack = staticmethod(stack)

    def __init__(self, name: str, items: Sequence[Written], context: int) -> None:
        self.name, self.items, self.rows, self.context = name, items, len(items), context
        self.reference = torch.full((len(items), 2), torch.nan)
        self.fingerprint = zlib.crc32(b"pairs")
        for item in items:
            for one in item.examples:
                self.fingerprint = zlib.crc32(one.tokens.astype("<i8").tobytes(), self.fingerprint)
                self.fingerprint = zlib.crc32(one.targets.astype("<i8").tobytes(), self.fingerprint)
            self.fingerprint = zlib.crc32(repr((item.label, item.margin)).encode(), self.fingerprint)

    def row(self, index: int) -> Pair:
        """One item."""
        item = self.items[index]
        return Pair(*item.examples, item.label, item.margin, self.reference[index])

    @property
    def largest(self) -> int:
        """The largest id in use."""
        return max(int(max(one.tokens.max(), one.targets.max())) for item in self.items for one in item.examples)

    def verify(self, vocab: int) -> None:
        """Raises DataError if a token is not below `vocab`."""
        if self.largest >= vocab:
            raise DataError(f"{self.name}: token id {self.largest}, expected ids below {vocab}; "
                            "use the tokenizer that the model was trained with")

    def unchanged(self) -> None:
        """Held in memory: nothing can change under the run."""


# ---- items → rows

def labelled(items: Sequence[Preference]) -> list[Preference]:
    """For KTO: items with one answer and a label, and behind it the answer to another prompt. Raises DataError where
    all prompts are the same."""
    single = [Preference(item.where, (answer,), label) for item in items
              for answer, label in zip(item.answers, (item.label, False), strict=False)]
    prompts, found = [content(item.prompt) for item in single], []
    for i, item in enumerate(single):
        others = (j % len(single) for j in range(i + 1, i + len(single)))
        other = next((j for j in others if prompts[j] != prompts[i]), None)
        if other is None:
            raise DataError(f"{item.where}: all prompts are the same one; KTO compares with answers to other prompts")
        own, theirs = item.answers[0], single[other].answers[0]
        strange = replace(own, messages=own.messages[: own.first] + theirs.messages[theirs.first :], unlearnt=())
        found.append(replace(item, answers=(own, strange)))
    return found


class Sets:
    """The preferences of some sources, and of one that is measured on. Raises DataError where one cannot be read."""

    def __init__(self, sources: Sequence[Path], held_out: Path | None, dataset_dir: Path | None = None,
                 columns: dict[str, str] | None = None, labels: bool = False) -> None:
        """labels: each item has one answer and a label, as KTO wants it; else two answers."""
        self.sources, self.held_out, self.notes = [*sources], held_out, list[str]()
        self.items: list[list[Preference]] = []
        for source in (*sources, *([held_out] if held_out else [])):
            read_here: list[Preference] = read(source, dataset_dir, columns, self.notes.append, PREFERENCES)
            single = next((item for item in read_here if len(item.answers) == 1), None)
            if single and not labels:
                raise DataError(f"{single.where}: an answer with a label, expected a chosen and a rejected one; "
                                "--preference with --loss kto learns from labels")
            items = [item for item in read_here if not item.tied]
            if tied := len(read_here) - len(items):
                self.notes.append(f"{source}: {counted(tied, 'pair')} passed over, as both answers are the same")
            if not items:
                raise DataError(f"{source}: in all {counted(tied, 'pair')} both answers are the same")
            self.items.append(labelled(items) if labels else items)
        self.chats = [answer for item in chain.from_iterable(self.items) for answer in item.answers]

    def rows(self, folder: Path, tokenizer: Tokenizer, context: int, long: str,
             colour: bool) -> tuple[list[Pairs], Pairs | None, list[str]]:
        """(a source for each set, one of what is held out, notes for a person), from the examples in `folder`.

        long: "drop" or "error", for what does not fit the context. Raises DataError."""
        written, said = chat_store.load(folder)
        each = iter(written)
        notes, train, held = [*self.notes], list[Pairs](), list[Written]()
        for number, items in enumerate(self.items):
            every = [as_written(item, next(each), next(each)) for item in items]
            name = str([*self.sources, self.held_out][number])
            fits = [max(len(one.tokens) for one in made.examples) <= context for made in every]
            if dropped := fits.count(False):
                where = items[fits.index(False)].where
                if long == "error":
                    raise DataError(f"{where}: longer than --context {context}: give a larger one, or --long drop")
                notes.append(f"{name}: {counted(dropped, 'item')} longer than --context {context} left out, the first "
                             f"at {where}")
            kept = [(item, made) for item, made, fit in zip(items, every, fits, strict=True) if fit]
            if not kept:
                raise DataError(f"{name}: no item fits --context {context}; give a larger one")
            if number == len(self.sources):
                held += [made for _, made in kept]
                break
            prompts = [] if self.held_out else [item.prompt for item, _ in kept]
            beside = {prompt.where for prompt in split(prompts)[1]}
            held += [made for item, made in kept if item.where in beside]
            train.append(Pairs(name, [made for item, made in kept if item.where not in beside], context))
            notes.append(f"{name}: {counted(train[-1].rows, 'row')} of two answers, {len(kept) - train[-1].rows} held "
                         "out")
        notes += few(held)
        notes += [f"{what}, {counted(count, 'message')}" for what, count in said.items()]
        measured = Pairs(f"{self.held_out or (self.sources[0] if len(train) == 1 else 'the pairs')}, held out", held,
                         context) if held else None
        for what, example in zip(("first", "second"), train[0].items[0].examples, strict=True):
            notes += [f"one row, its {what} answer:", picture(tokenizer, example, colour)]
        return train, measured, notes


def as_written(item: Preference, first: Sequence[Example], second: Sequence[Example]) -> Written:
    """An item and what its answers became. Raises DataError where they are no two answers to one prompt."""
    for one in (first, second):
        if len(one) != 1:
            raise DataError(f"{item.where}: the chat template writes the answers of one chat as {len(one)} texts; "
                            "leave the last answer of each to be compared")
    a, b = first[0], second[0]
    begin = min(int((one.targets >= 0).argmax()) for one in (a, b))         # BPE may merge on from here
    if not np.array_equal(a.tokens[:begin], b.tokens[:begin]):
        raise DataError(f"{item.where}: the chat template writes the prompt in another way for each of the two "
                        "answers; choose another with --template")
    return Written((a, b), item.label, item.margin)
