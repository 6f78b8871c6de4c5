"""Chats to fine-tune on, packed into rows, a loss on the answers only.

    file ──read──▶ chats ──Writer──▶ examples ──Chats──▶ rows
         chat_files.py   chat_fields.py      here
         chat_formats.py chat_writing.py

    rows of T = 12:    a a a a a a a b b b · ·      two examples, and padding
    positions          0 1 2 3 4 5 6 0 1 2 −1 −1    each begins at 0, and sees no other

Examples longer than T, by `--long`:

    drop        are left out (the default), and it is said how many, with what share of the learnt tokens
    truncate    keep their first turns, as many as fit whole; one whose first turn does not fit is left out
    error       are an error

Shapes: T tokens of the context, n tokens of one example.
"""

import json
import unicodedata
import zlib
from collections.abc import Sequence

import numpy as np

from nanollm.data.chat_files import read
from nanollm.data.chat_formats import Chat
from nanollm.data.chat_writing import IGNORED, Example, Writer, examples
from nanollm.data.stream import stack
from nanollm.errors import DataError
from nanollm.text.tokenizer import Tokenizer

__all__ = ["Chat", "Chats", "Example", "Writer", "examples", "pack", "picture", "read", "split"]
HELD_OUT = 0.05                 # share of the chats that training never sees
FEW = 20                        # of fewer chats none is held out: one or two would measure nothing
LONG = ("drop", "truncate", "error")


def split(chats: Sequence[Chat], share: float = HELD_OUT) -> tuple[list[Chat], list[Chat]]:
    """(training, held out) by a hash of what is said: the same on every machine, equal chats on one side."""
    contents = [content(chat) for chat in chats]
    unique = sorted({*contents}, key=lambda content: (zlib.crc32(content.encode()), content))
    held = {*unique[: round(share * len(unique))]} if len(unique) >= FEW else set()
    pairs = list(zip(chats, contents, strict=True))
    return [c for c, content in pairs if content not in held], [c for c, content in pairs if content in held]


def few(held: Sequence[object]) -> list[str]:
    """What a person is told where nothing is held out."""
    return [] if held else [f"nothing is held out to measure on: of fewer than {FEW} chats or prompts none is; "
                            "--held-out FILE names some"]


def content(chat: Chat) -> str:
    """What is said in a chat, as one text: two chats with the same are one."""
    return json.dumps([chat.messages, chat.tools], sort_keys=True)


def picture(tokenizer: Tokenizer, example: Example, colour: bool) -> str:
    """An example as text, special tokens included; answers in green, or between ⟦ and ⟧; no control characters.

    A stop id that is learnt and does not stand there, since another token follows, is shown behind an arrow.
    """
    begin, end = ("\x1b[32m", "\x1b[0m") if colour else ("⟦", "⟧")
    stream, text, inside = tokenizer.stream(skip_special=False), "", False
    for id, answer, stop in zip(example.tokens, example.answer, example.stops, strict=True):
        if answer != inside:
            text, inside = text + (begin if answer else end), answer
        text += _safe(stream.push(id))
        if stop >= 0:
            text += f"→{_safe(tokenizer.decode([stop], skip_special=False))}"
    return text + _safe(stream.finish()) + end * bool(inside)


def _safe(text: str) -> str:
    """With control characters, those that turn the direction of text or break lines, and the marks of `picture` spelled
    out, as \\x1b or \\u202e."""
    def drives(c: str) -> bool:
        return c in "⟦⟧" or (unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp") and c not in "\n\t")

    return "".join(c.encode("unicode_escape").decode() if drives(c) else c for c in text)


# ---- rows

def pack(lengths: Sequence[int], context: int) -> list[list[int]]:
    """Which examples share a row, by first-fit decreasing: the longest first, each into the first row that has room.

    The long ones leave gaps that the short ones fill: at most 11/9 of the fewest possible rows, and one (Dósa 2007).
    Nothing but the lengths plays a part, so the rows are the same on every machine.
    """
    space = np.full(len(lengths), context)
    rows: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):    # a stable sort: equal lengths keep their order
        row = int((space[: len(rows) + 1] >= lengths[i]).argmax())      # the row after the last is empty, so one fits
        if row == len(rows):
            rows.append([])
        rows[row].append(i)
        space[row] -= lengths[i]
    return rows


def shortened(example: Example, context: int) -> Example | None:
    """The turns of an example that fit whole, from the first on; None where the first does not."""
    learnt = example.targets >= 0
    ends = np.flatnonzero(learnt & ~np.append(learnt[1:], False)) + 1           # behind the last target of each answer
    fitting = ends[ends <= context]
    if not len(fitting):
        return None
    return Example(example.tokens[: fitting[-1]], example.targets[: fitting[-1]])


class Chats:
    """Examples in rows of T tokens, a `stream.Source` for the trainer. Each begins at position 0 and sees no other.

    dropped   how many examples are longer than T, and left out       cut   how many of them keep their first turns
    lost      the share of the tokens to learn that goes with them
    pad       any id of the model: what fills a row up has position −1, which nothing sees (layers/mask.py)
    """
    stack = staticmethod(stack)

    def __init__(self, name: str, examples: Sequence[Example], context: int, pad: int, long: str = "drop") -> None:
        self.name, self.context, self.pad = name, context, pad
        longest = max((len(example.tokens) for example in examples), default=0)
        if long == "error" and longest > context:
            raise DataError(f"{name}: an example of {longest} tokens is longer than --context {context}: give a larger "
                            "--context, or --long drop or truncate")
        whole = [example for example in examples if len(example.tokens) <= context]
        self.examples = whole
        if long == "truncate":
            fitted = [e if len(e.tokens) <= context else shortened(e, context) for e in examples]
            self.examples = [example for example in fitted if example is not None]
        self.dropped, self.cut = len(examples) - len(self.examples), len(self.examples) - len(whole)
        if not self.examples:
            raise DataError(f"{name}: none of {len(examples)} examples fits --context {context}; "
                            f"the longest has {longest} tokens: give a larger --context")
        kept, all = (sum(int((example.targets >= 0).sum()) for example in some) for some in (self.examples, examples))
        self.lost = 1 - kept / max(all, 1)
        self._rows = pack([len(example.tokens) for example in self.examples], context)
        self.rows = len(self._rows)
        self.fingerprint = zlib.crc32(b"%d" % context)
        for example in self.examples:
            held = example.tokens.astype("<i8").tobytes() + example.answer.tobytes()
            if (example.stops >= 0).any():
                held += example.stops.astype("<i8").tobytes()
            self.fingerprint = zlib.crc32(held, self.fingerprint)

    @property
    def note(self) -> str | None:
        """What is lost to the context, for a person; None where nothing is."""
        if not self.dropped and not self.cut:
            return None
        what = f"{self.dropped} examples are longer than --context {self.context} and are left out"
        if self.cut:
            what = (f"{self.cut} examples are longer than --context {self.context} and keep their first turns"
                    + (f", {self.dropped} more are left out" if self.dropped else ""))
        advice = "" if self.cut else "; --long truncate keeps their first turns"
        return f"{what}: {self.lost:.1%} of the tokens to learn{advice}"

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """tokens, targets (−100: nothing to predict), positions (−1: padding), each (T,) int64."""
        tokens, targets, positions = (np.full(self.context, fill, np.int64) for fill in (self.pad, IGNORED, -1))
        at = 0
        for i in self._rows[index]:
            n = len(self.examples[i].tokens)
            tokens[at : at + n], targets[at : at + n], positions[at : at + n] = *self.examples[i], np.arange(n)
            at += n
        return tokens, targets, positions

    @property
    def largest(self) -> int:
        """The largest id in use."""
        return max(self.pad, *(int(max(e.tokens.max(), e.targets.max())) for e in self.examples))

    def verify(self, vocab: int) -> None:
        """Raises DataError if a token is not below `vocab`."""
        if self.largest >= vocab:
            raise DataError(f"{self.name}: token id {self.largest}, expected ids below {vocab}; "
                            "use the tokenizer that the model was trained with")

    def unchanged(self) -> None:
        """Held in memory: nothing can change under the run."""
