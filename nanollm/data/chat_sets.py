"""The sets of chats that a run trains on, as sources of rows: read, written with a template, held out, packed.

    --chat a.jsonl b.jsonl      a source each, to be mixed by weight; 5 % of each are held out and measured together
    --held-out c.jsonl          measured on instead, and nothing of the others is held out

What fits no row plays no part before anything is held out, so a held-out part is never only of chats that are too long.
"""

import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from nanollm.data import chat_store
from nanollm.data.chat_formats import Chat
from nanollm.data.chat_writing import Example
from nanollm.data.sft import Chats, few, picture, read, shortened, split
from nanollm.errors import counted
from nanollm.text.tokenizer import Tokenizer


class Sets:
    """The chats of some sources, and of one that is measured on. Raises DataError where one cannot be read."""

    def __init__(self, sources: Sequence[Path], held_out: Path | None, dataset_dir: Path | None = None,
                 columns: dict[str, str] | None = None) -> None:
        self.sources, self.held_out = [*sources], held_out
        self.notes: list[str] = []                      # of files that are not plain UTF-8, and of keys passed over
        self.chats = [read(source, dataset_dir, columns, self.notes.append)
                      for source in (*sources, *([held_out] if held_out else []))]
        self.every = [*chain.from_iterable(self.chats)]

    def rows(self, folder: Path, tokenizer: Tokenizer, context: int,
             long: str) -> tuple[list[Chats], Chats | None, list[str]]:
        """(a source of rows for each set, one of what is held out, notes for a person), from the examples in `folder`.

        Raises DataError where no example of a set fits a row.
        """
        every, said = chat_store.load(folder)
        each = iter(every)
        pairs = [[(chat, next(each)) for chat in some] for some in self.chats]      # (chat, its examples), set by set
        pad = tokenizer.eos_id if tokenizer.eos_id is not None else 0
        train: list[Chats] = []
        notes = [*self.notes]
        held = [example for some in pairs[len(self.sources) :] for _, written in some for example in written]
        for source, some in zip(self.sources, pairs, strict=False):
            fitting = [chat for chat, written in some if _fits(written, context, long)]
            beside = {chat.where for chat in split(fitting)[1]} if self.held_out is None else set()
            held += [example for chat, written in some if chat.where in beside for example in written]
            kept = [example for chat, written in some if chat.where not in beside for example in written]
            train.append(rows := Chats(str(source), kept, context, pad, long))
            notes.append(f"{source}: {counted(len(some) - len(beside), 'chat')} in {counted(rows.rows, 'row')} of "
                         f"{context} tokens, {len(beside)} held out")
            notes += [f"{source}: {rows.note}"] if rows.note else []
            notes += passed_over([chat for chat, _ in some])
        notes += few(held)
        notes += [f"{what}, {counted(count, 'message')}" for what, count in said.items()]
        name = self.held_out or (self.sources[0] if len(train) == 1 else "the chats")
        measured = Chats(f"{name}, held out", held, context, pad, "drop" if long == "error" else long) if held else None
        notes += [f"{measured.name}: {measured.note}"] if measured and measured.note else []
        colour = sys.stdout.isatty()
        first = next(example for _, written in pairs[0] for example in written)
        notes += [f"one of them, what is learnt in {'green' if colour else '⟦ ⟧'}:", picture(tokenizer, first, colour)]
        return train, measured, notes


def _fits(examples: Sequence[Example], context: int, long: str) -> bool:
    """Whether a row can hold one of them."""
    return any(len(example.tokens) <= context or (long == "truncate" and shortened(example, context) is not None)
               for example in examples)


def passed_over(chats: Sequence[Chat]) -> list[str]:
    """What of the chats is not learnt, for a person."""
    silent = sum(not (chat.messages[i]["content"].strip() or chat.messages[i].get("tool_calls"))
                 for chat in chats for i in chat.unlearnt if chat.messages[i]["role"] == "assistant")
    others = sum(chat.messages[i]["role"] == "assistant" for chat in chats for i in chat.unlearnt) - silent
    nothing = sum(not chat.answers for chat in chats)
    counts = ((silent, "answer", "empty, not learnt"), (others, "answer", "not learnt, as the weight says"),
              (nothing, "chat", "passed over, with no answer to learn"))
    return [f"{counted(count, noun)}: {what}" for count, noun, what in counts if count]
