"""Chats: a list of messages, written out by the model's own template (render.py), then encoded.

    messages ──render──▶ text ──encode(special=True, bos=False)──▶ ids
             template           the template writes BOS itself, or wants none

A user who types "<|im_end|>" must not end the turn. `Conversation.prompt_ids` therefore puts special tokens inside the
messages between two Unicode noncharacters, OPEN and CLOSE, which survive the template; the tokenizer encodes what they
enclose as plain text.

A chat that outgrows the model's context loses its oldest turns. A turn is a question and all that follows it up to the
next; what stands before the first one, the system message, stays:

    system   question answer   question answer   question          three turns, of which the last wants its answer
    system                     question answer   question          left_out = 1: what `prompt_ids` writes
"""

import bisect
import contextlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanollm.errors import InputError, TokenizerError
from nanollm.text.render import render_cuts
from nanollm.text.templates import no_template
from nanollm.text.tokenizer import CLOSE, OPEN, Tokenizer


@dataclass
class Conversation:
    """The messages so far, {"role": …, "content": …}. `tools` are JSON schemas, for templates that show them.

    Raises TokenizerError where the tokenizer has no template for such a chat.
    """
    tokenizer: Tokenizer
    messages: list[dict[str, Any]] = field(default_factory=list)
    tools: list[dict[str, Any]] | None = None
    left_out: int = 0             # turns, the oldest ones, that are kept here and no longer written

    def __post_init__(self) -> None:
        if self.tokenizer.template_for(self.tools) is None:
            raise TokenizerError(f"{no_template(self.tokenizer)}; or put a chat_template.jinja into the folder, "
                                 "or give --prompt, which is continued as it stands")

    def add(self, role: str, content: str) -> None:
        """Append a message."""
        self.messages.append({"role": role, "content": content})

    def try_out(self) -> None:
        """Raises TokenizerError where the template cannot write the first question, before anybody asks one."""
        self.add("user", "Hi")
        try:
            self.prompt_ids()
        finally:
            self.undo()

    @property
    def turns(self) -> list[int]:
        """The index of each question, which is where a turn begins."""
        return [index for index, message in enumerate(self.messages) if message["role"] == "user"]

    def undo(self) -> str | None:
        """Take the last turn back; return its question, or None where there is none."""
        if not self.turns:
            return None
        last = self.turns[-1]
        question = self.messages[last]["content"]
        del self.messages[last:]
        self.left_out = 0                                  # there may be room again
        return question

    def set_system(self, text: str) -> None:
        """The system message, in place of the one there is; "" for none."""
        self.messages = [message for message in self.messages if message["role"] != "system"]
        if text:
            self.messages.insert(0, {"role": "system", "content": text})

    def fitted_ids(self, context: int, room: int) -> list[int]:
        """`prompt_ids`, and with them `room` tokens for the answer, in a context of so many tokens.

        As few of the oldest turns as possible are left out, never the last. Where that one leaves less room than was
        asked for, the answer gets what there is. Raises InputError where it leaves none.
        """
        def fits(left_out: int) -> bool:
            self.left_out = left_out
            return len(self.prompt_ids()) + room <= context

        last = max(0, len(self.turns) - 1)
        choices = range(min(self.left_out, last), last)
        self.left_out = choices.start + bisect.bisect_left(choices, True, key=fits)
        ids = self.prompt_ids()
        if len(ids) >= context:
            raise InputError(f"the last message and what stands before the first are {len(ids):,} tokens, and the "
                             f"context holds {context:,} with the answer")
        return ids

    def prompt_ids(self, **extra: Any) -> list[int]:
        """The ids that ask for the next message of the assistant. `extra` are further variables of the template."""
        turns, written = self.turns, self.messages
        if self.left_out:
            written = self.messages[: turns[0]] + self.messages[turns[self.left_out] :]
        whole = (len(written), extra.pop("add_generation_prompt", True))
        text, = texts(self.tokenizer, written, self.tools, [whole], **extra)
        return ids(self.tokenizer, text)


def texts(tokenizer: Tokenizer, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None,
          cuts: Sequence[tuple[int, bool]], **extra: Any) -> list[str]:
    """What the template makes of the first n messages, for each (n, whether it asks for an answer) of `cuts`.

    Special tokens inside the messages stand between OPEN and CLOSE. Raises TokenizerError.
    """
    template = tokenizer.template_for(tools)
    assert template is not None, "Conversation refuses a tokenizer without one"
    pattern = tokenizer.special_pattern
    try:
        return render_cuts(template, mark(messages, pattern), cuts, tools=mark(tools, pattern),
                           **(tokenizer.named_tokens | extra))
    except TokenizerError as error:
        file = tokenizer.template_files.get(tokenizer.template_name(tools))
        raise TokenizerError(f"{file}: {error}" if file else str(error)) from None


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text of `texts`."""
    found = tokenizer.encode(text, bos=False, special=True)
    return [*tokenizer.prefix, *found] if tokenizer.chat_begins else found


def mark(value: Any, pattern: re.Pattern[str]) -> Any:
    """The same messages, with each special token in their texts between OPEN and CLOSE; their own marks are dropped."""
    if isinstance(value, str):
        return pattern.sub(lambda match: OPEN + match[0] + CLOSE, re.sub(f"[{OPEN}{CLOSE}]", "", value))
    if isinstance(value, dict):
        return {key: mark(item, pattern) for key, item in value.items()}
    return [mark(item, pattern) for item in value] if isinstance(value, (list, tuple)) else value


# ---- chats as files: {"messages": [{"role": "user", "content": "Hi"}, …]}, as train.py --chat reads them

def read_chat(path: Path) -> list[dict[str, Any]]:
    """The messages of a file that `write_chat` wrote, or of any one chat in JSON. Raises InputError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: no chat: found what is not JSON ({error!s:.80})") from None
    return messages_of(value, str(path))


def write_chat(path: Path, messages: list[dict[str, Any]], ours: bool = False) -> None:
    """As one line of JSON, whole or not at all. Raises InputError.

    ours: the file may be there, with an earlier state of this chat, which is replaced; its other keys are kept.
    """
    value: dict[str, Any] = {}
    if path.exists():
        if not ours:
            raise InputError(f"{path}: it exists, and this chat was neither saved there nor loaded from it; "
                             "give another name")
        try:
            read_chat(path)
        except InputError:
            raise InputError(f"{path}: it exists and is no chat; give another name") from None
        there = json.loads(path.read_text(encoding="utf-8"))
        value = there if isinstance(there, dict) else {}
    draft = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        draft.write_text(json.dumps(value | {"messages": messages}) + "\n", encoding="utf-8")
        os.replace(draft, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise InputError(f"{path}: {error.strerror}") from None


def messages_of(value: Any, where: str) -> list[dict[str, Any]]:
    """The messages of a chat in JSON: {"messages": […]} or the list alone. Raises InputError, which begins with
    `where`."""
    messages = value.get("messages") if isinstance(value, dict) else value
    if not isinstance(messages, list):
        raise InputError(f'{where}: found {str(value)[:80]}, expected {{"messages": [{{"role": …, "content": …}}, …]}}')
    for number, message in enumerate(messages, 1):
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str) or not isinstance(message.get("content", ""), (str, list, type(None))):
            raise InputError(f"{where}: message {number}: found {str(message)[:80]}, "
                             'expected {"role": "user", "content": "…"} or the like')
    return messages
