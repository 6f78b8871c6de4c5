"""Prompts without answers, for a run that rewards what the model answers by itself.

    {"prompt": text, or a list of messages, …}                      trl
    {"messages": […], …}, {"conversations": […], …}                 ended by a question
    {"instruction", ["input"], ["history"], …}                      Alpaca, LLaMA-Factory

["system"] and ["tools"] may stand beside each. Every other key is a column, which the reward function gets by its name:
the right answer, say. A prompt is written by the model's own template up to where an answer begins.

    what is passed over     prompts that leave less room than --max-new-tokens in the context
    what is held out        5 % of the prompts, by a hash of what they say
"""

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanollm.data.chat_files import CHATS, Kind, read
from nanollm.data.chat_formats import Chat, misspelt, need
from nanollm.data.preference_formats import answered
from nanollm.data.sft import few, split
from nanollm.errors import DataError, counted
from nanollm.text.chat import Conversation
from nanollm.text.tokenizer import Tokenizer

BESIDE = {"system", "system_prompt", "tools"}
ASKED = {"prompt": BESIDE, "messages": BESIDE, "conversations": BESIDE, "instruction": {"input", "history", *BESIDE}}
TAKEN = {"prompts", "completions", "completion_ids"}        # what the reward function gets besides the columns


@dataclass(frozen=True)
class Prompt:
    """One item."""
    chat: Chat                          # the messages up to the answer
    text: str | None                    # the prompt, where it was given as text
    columns: dict[str, Any]

    @property
    def given(self) -> str | list[dict[str, Any]]:
        """As the reward function gets it."""
        return self.chat.messages if self.text is None else self.text

    def answer(self, text: str) -> str | list[dict[str, Any]]:
        """An answer as the reward function gets it: text to text, messages to messages, as in trl."""
        return text if self.text is not None else [{"role": "assistant", "content": text}]


def prompt(item: Any, where: str) -> Prompt:
    """The prompt of an item in any format. Raises DataError, which begins with `where`."""
    need(isinstance(item, dict), where, f"an object with one of the keys {', '.join(ASKED)}", item)
    item = {key: value for key, value in item.items() if value is not None}
    key = next((key for key in ASKED if key in item), "")
    need(key, where, f"one of the keys {', '.join(ASKED)}", [*item], misspelt(item, ASKED))
    own = {name: value for name, value in item.items() if name in {key} | ASKED[key]}
    columns = {name: value for name, value in item.items() if name not in own}
    need(not TAKEN & {*columns}, where, f"columns that are not called {', '.join(sorted(TAKEN))}", [*columns])
    whole = answered(own, "…", where)
    chat = Chat(where, whole.messages[: whole.first], whole.tools)
    need(chat.messages[-1]["role"] != "assistant", where, "a prompt that ends before the answer", chat.messages[-1])
    return Prompt(chat, chat.messages[-1]["content"] if isinstance(item[key], str) else None, columns)


PROMPTS = Kind("prompts", prompt, CHATS.keys, "prompt; messages; conversations; instruction, [input]")


class Row:
    """A prompt, and the ids that ask for its answer."""

    def __init__(self, prompt: Prompt, tokenizer: Tokenizer) -> None:
        self.prompt = prompt
        self.ids = Conversation(tokenizer, prompt.chat.messages, prompt.chat.tools).prompt_ids()


def stack(rows: Sequence[Row]) -> list[Row]:
    """The collator: nothing is laid out before there are answers."""
    return [*rows]


class Prompts:
    """Prompts in ids, a `stream.Source` for the trainer."""
    stack = staticmethod(stack)

    def __init__(self, name: str, items: Sequence[Row]) -> None:
        self.name, self.items, self.rows = name, items, len(items)
        self.fingerprint = zlib.crc32(json.dumps([[row.ids, row.prompt.columns] for row in items]).encode())

    def row(self, index: int) -> Row:
        """One item."""
        return self.items[index]

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(len(row.ids) for row in self.items)

    @property
    def largest(self) -> int:
        """The largest id in use."""
        return max(max(row.ids) for row in self.items)

    def verify(self, vocab: int) -> None:
        """Raises DataError if a token is not below `vocab`."""
        if self.largest >= vocab:
            raise DataError(f"{self.name}: token id {self.largest}, expected ids below {vocab}; "
                            "use the tokenizer that the model was trained with")

    def unchanged(self) -> None:
        """Held in memory: nothing can change under the run."""


def open_sets(sources: Sequence[Path], held_out: Path | None, tokenizer: Tokenizer, context: int, room: int, long: str,
              dataset_dir: Path | None = None,
              columns: dict[str, str] | None = None) -> tuple[list[Prompts], Prompts | None, list[str]]:
    """(a source for each file, one of what is held out, notes for a person).

    room: tokens of an answer; long: "drop" or "error", for prompts that leave less. Raises DataError."""
    notes, train, held, names = list[str](), list[Prompts](), list[Row](), {*TAKEN}
    for source in (*sources, *([held_out] if held_out else [])):
        rows = [Row(item, tokenizer) for item in read(source, dataset_dir, columns, kind=PROMPTS)]
        fits = [row for row in rows if len(row.ids) + room <= context]
        if len(fits) < len(rows):
            first = next(row for row in rows if len(row.ids) + room > context)
            if long == "error" or not fits:
                raise DataError(f"{first.prompt.chat.where}: a prompt of {counted(len(first.ids), 'token')} and "
                                f"an answer of --max-new-tokens {room} are {len(first.ids) + room}, and --context is "
                                f"{context}; give a larger --context, or a smaller --max-new-tokens")
            notes.append(f"{source}: {counted(len(rows) - len(fits), 'prompt')} too long for --context {context} left "
                         f"out, the first at {first.prompt.chat.where}")
        names |= {name for row in fits for name in row.prompt.columns}
        if source is held_out:
            held += fits
            break
        beside = {chat.where for chat in split([row.prompt.chat for row in fits])[1]} if held_out is None else set()
        held += [row for row in fits if row.prompt.chat.where in beside]
        train.append(Prompts(str(source), [row for row in fits if row.prompt.chat.where not in beside]))
        notes.append(f"{source}: {counted(train[-1].rows, 'prompt')}, {len(fits) - train[-1].rows} held out")
    notes += few(held)
    if found := sorted(names - TAKEN):
        notes.append(f"columns for the reward function: {', '.join(map(json.dumps, found))}")
    name = held_out or (sources[0] if len(train) == 1 else "the prompts")
    return train, Prompts(f"{name}, held out", held) if held else None, notes
