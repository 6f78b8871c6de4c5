"""What a template writes of a message, found by trying: a field is written where another value gives another text.

    {"role": "assistant", "content": "", "thinking": "hm"}        the message
    {"role": "assistant", "content": "", "thinking": "hm⟨mark⟩"}  the same text from both: `thinking` would vanish

A field that would vanish is an error that names it: a chat without it teaches something else (a tool call, under a
template without tools, an empty answer). Before that, other spellings of the same thing are tried, and the first under
which nothing vanishes is taken:

    thoughts     reasoning_content, reasoning and thinking are three names of one thing; templates read one of them, or
                 none and <think>…</think> in the content
    arguments    of a tool call: an object, or its JSON as text. What the template writes must be JSON once: tojson
                 would quote a text twice, and an object written as it stands would be Python's 'repr'
    content      null or "", beside a tool call

Templates decide by what is there (a call *or* a content, thoughts in the last answer only), so each kind of message is
tried once: its role, its fields, how many calls it has, whether it is the last.

What is spelled in another way, and what says who or when and is not written (NEUTRAL), is counted in `Fields.notes`.
"""

import itertools
import json
from collections import Counter
from typing import Any, NamedTuple

from nanollm.data.chat_formats import THOUGHTS, Chat
from nanollm.errors import DataError, TokenizerError
from nanollm.text.chat import texts
from nanollm.text.tokenizer import Tokenizer

Message = dict[str, Any]
MARK = "qzmarkqz"                                       # what no template writes by itself
OPENS, CLOSES = "<think>", "</think>"
# What says who, when or where, and is of no text. A template may write it (the name of a tool); most do not.
NEUTRAL = {
    "id", "name", "tool_call_id", "index", "timestamp", "time", "date", "created", "created_at", "create_time",
    "updated_at", "update_time", "source", "model", "author", "metadata", "meta", "score", "rating", "rank", "language",
    "lang", "url", "message_id", "conversation_id", "parent_id", "turn_identifier", "turn", "finish_reason",
    "stop_reason", "usage", "logprobs", "token_count", "num_tokens", "toxic", "redacted", "country", "hashed_ip",
    "header", "state", "openai_id", "temperature", "top_p", "status", "end_turn", "recipient", "channel",
}


class Spelling(NamedTuple):
    """How messages are spelled for a template."""
    thoughts: str                                       # the name of the field; OPENS: in the content
    arguments: type                                     # dict or str
    empty: str | None                                   # the content beside a tool call, where there is none


class Fields:
    """Spells the messages of chats so that one tokenizer's template writes all of each.

    notes    of how many messages a person should know something, by what it is
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.notes: Counter[str] = Counter()
        self.found: dict[tuple[Any, ...], Spelling] = {}        # for kinds of answers, the spelling that serves
        self.tried: dict[tuple[Any, ...], str] = {}     # kinds of which nothing vanishes: neutral fields not written

    def spelled(self, chat: Chat) -> list[Message]:
        """The messages up to the last answer that is learnt. Raises DataError for a field that would vanish."""
        messages, answers = list(chat.messages[: max(chat.answers) + 1]), chat.answers
        for at, message in enumerate(messages):
            if message["role"] == "assistant":
                messages[at] = self._spell(chat, messages, at)
        for at, message in enumerate(messages):         # the others, as the next answer's prompt shows them
            if message["role"] != "assistant":
                upto = next(i for i in answers if i > at)
                kind: tuple[Any, ...] = (self._kind(chat, message), at == 0, upto - at)
                if kind not in self.tried:
                    if lost := self._lost(chat, messages[: upto + 1], at):
                        raise self._vanishes(chat, at, lost)
                    self.tried[kind] = self._passed_over(chat, messages[: upto + 1], at)
                self._note(self.tried[kind])
        kind = ("tools", len(chat.tools or ()), messages[0]["role"])
        if chat.tools and kind not in self.tried:
            cut = messages[: answers[0] + 1]
            if self._text(cut, _marked(chat.tools)) == self._text(cut, chat.tools):
                raise DataError(f"{chat.where}: the chat template does not write the tools, and the chat has "
                                f"{len(chat.tools)}; choose a template that does with --template, or remove them")
            self.tried[kind] = ""
        return messages

    def _note(self, *lines: str) -> None:
        self.notes.update(line for line in lines if line)

    def _kind(self, chat: Chat, message: Message) -> tuple[Any, ...]:
        calls = message.get("tool_calls")
        return (chat.tools is None, message["role"], tuple(sorted(message)), bool(message["content"]),
                len(calls) if isinstance(calls, list) else -1, CLOSES in (message["content"] or ""))

    def _spell(self, chat: Chat, messages: list[Message], at: int) -> Message:
        """Answer `at`, spelled as the template reads it when it is the last message."""
        message = messages[at]
        kind = self._kind(chat, message)
        if spelling := self.found.get(kind):
            self._note(self.tried[kind], *other_spellings(message, spelling))
            return spell(message, spelling)
        failed: list[tuple[str, ...]] = []
        for spelling in self._spellings(message):
            try:
                made = spell(message, spelling)
                lost = self._lost(chat, [*messages[:at], made], at)
            except ValueError as error:                 # arguments that are no JSON
                lost = (str(error),)
            if not lost:
                self.found[kind] = spelling
                self.tried[kind] = self._passed_over(chat, [*messages[:at], made], at)
                self._note(self.tried[kind], *other_spellings(message, spelling))
                return made
            failed.append(lost)
        named = [lost for lost in failed if not any(" " in field for field in lost)]     # fields, and no further words
        raise self._vanishes(chat, at, (named or failed)[0])

    def _spellings(self, message: Message) -> list[Spelling]:
        given = next((name for name in THOUGHTS if name in message), None)
        names = [given, *(name for name in THOUGHTS if name != given)] if given else [""]
        template = self.tokenizer.template_for(None) or ""
        if given and CLOSES in template:
            names.append(OPENS)
        calls, empty = message.get("tool_calls"), not message["content"]
        return [Spelling(*each) for each in itertools.product(
            names, (dict, str) if calls else (dict,), (None, "") if calls and empty else ("",))]

    def _text(self, messages: list[Message], tools: list[Message] | None) -> str:
        """What the template writes; an error of it in words, which are another text than any other."""
        try:
            return texts(self.tokenizer, messages, tools, [(len(messages), False)])[0]
        except TokenizerError as error:
            return f"{MARK} {error}"

    def _lost(self, chat: Chat, messages: list[Message], at: int) -> tuple[str, ...]:
        """The fields of message `at` that the template would not write; an error of the template is its own."""
        plain = self._text(messages, chat.tools)
        if plain.startswith(MARK):
            return (plain.removeprefix(MARK).strip(),) if "tool_calls" in messages[at] else ()

        def text(changed: Message) -> str:
            return self._text([*messages[:at], changed, *messages[at + 1 :]], chat.tools)

        message, lost = messages[at], []
        content = message["content"]
        if message["role"] == "assistant" and content and CLOSES in content:
            inside = f" {MARK}{CLOSES}".join(content.rsplit(CLOSES, 1))
            if text(message | {"content": inside}) == plain and not self._opened(chat, messages, at):
                return (f"the thoughts before {CLOSES} in content",)
        if content is None and text(message | {"content": ""}).count("None") < plain.count("None"):
            return ("content, which it writes as None",)
        for field, value in message.items():
            if field == "role" or field in NEUTRAL or value in (None, "", [], {}):
                continue
            if field == "tool_calls":
                lost += self._calls_lost(message, text)
            elif (not isinstance(value, str) or value.strip()) and text(message | {field: _marked(value)}) == plain:
                lost.append(field)
        return tuple(lost)

    def _passed_over(self, chat: Chat, messages: list[Message], at: int) -> str:
        """A note with the neutral fields of message `at` that the template does not write; "" where it has none."""
        message, plain = messages[at], self._text(messages, chat.tools)
        names = [field for field in message if field in NEUTRAL and plain == self._text(
            [*messages[:at], message | {field: _marked(message[field])}, *messages[at + 1 :]], chat.tools)]
        return f"{', '.join(names)} not written by the template" if names else ""

    def _calls_lost(self, message: Message, text: Any) -> list[str]:
        """What the template would not write of the calls, once and as JSON."""
        calls = message["tool_calls"]
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            return ["tool_calls, which is no list of objects"]
        marked = []
        for n, call in enumerate(calls):
            inner = call.get("function", call)
            arguments: Any = {f"{MARK}k{n}": f"{MARK}v{n}"}
            if isinstance(inner.get("arguments"), str):
                arguments = json.dumps(arguments)
            inner = inner | {"name": f"{inner.get('name', '')}{MARK}n{n}", "arguments": arguments}
            marked.append(call | {"function": inner} if "function" in call else inner)
        found, lost = text(message | {"tool_calls": marked}), []
        if found.startswith(MARK + " "):
            return [found.removeprefix(MARK).strip()]
        for n in range(len(calls)):
            lost += [f"tool_calls[{n}].function.{name}" for name, mark in (("name", "n"), ("arguments", "v"))
                     if f"{MARK}{mark}{n}" not in found]
            if f'\\"{MARK}v{n}' in found:
                lost.append(f"tool_calls[{n}].function.arguments, which it writes as JSON in JSON")
            if f"'{MARK}v{n}" in found or f"'{MARK}k{n}" in found:
                lost.append(f"tool_calls[{n}].function.arguments, which it writes as Python and not as JSON")
        return lost

    def _opened(self, chat: Chat, messages: list[Message], at: int) -> bool:
        """Whether the prompt for answer `at` opens thoughts, which are then written by chat_writing.py itself."""
        try:
            asked, = texts(self.tokenizer, messages[:at], chat.tools, [(at, True)])
        except TokenizerError:
            return False
        return asked.rstrip().endswith(OPENS)

    def _vanishes(self, chat: Chat, at: int, lost: tuple[str, ...]) -> DataError:
        return DataError(f"{chat.where}, message {at + 1}, of the {chat.messages[at]['role']}: the chat template does "
                         f"not write {'; '.join(lost)}; choose a template that does with --template, or remove it from "
                         "the data")


def spell(message: Message, spelling: Spelling) -> Message:
    """The message under a spelling. Raises ValueError where arguments are no JSON of an object."""
    made = dict(message)
    if given := next((name for name in THOUGHTS if name in made), None):
        thoughts = made.pop(given)
        if spelling.thoughts == OPENS:
            made["content"] = f"{OPENS}\n{str(thoughts).strip()}\n{CLOSES}\n\n{made['content']}"
        else:
            made[spelling.thoughts] = thoughts
    if isinstance(calls := made.get("tool_calls"), list):
        made["tool_calls"] = [_call(call, spelling.arguments) for call in calls]
        made["content"] = made["content"] or spelling.empty
    return made


def other_spellings(message: Message, spelling: Spelling) -> list[str]:
    """Notes of what is written in another way than it is given."""
    given = next((name for name in THOUGHTS if name in message), spelling.thoughts)
    written = f"{OPENS}…{CLOSES} in the content" if spelling.thoughts == OPENS else spelling.thoughts
    notes = [f"{given} written as {written}"] if given != spelling.thoughts else []
    calls = message.get("tool_calls")
    kinds = {type(call.get("function", call).get("arguments")) for call in calls} if isinstance(calls, list) else set()
    if spelling.arguments is dict and str in kinds:
        notes.append("arguments of tool calls, which are text, written as an object")
    if spelling.arguments is str and dict in kinds:
        notes.append("arguments of tool calls, which are an object, written as text")
    return notes


def _call(call: Any, kind: type) -> Any:
    inner = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(inner, dict) or "arguments" not in inner:
        return call
    arguments = inner["arguments"]
    if kind is str and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    elif kind is dict and isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError:
            raise ValueError("tool_calls, whose arguments are no JSON") from None
    inner = inner | {"arguments": arguments}
    return call | {"function": inner} if "function" in call else inner


def _marked(value: Any) -> Any:
    """Another value of the same kind: a mark around each text in it."""
    if isinstance(value, str):
        return f"{MARK} {value} {MARK}"
    if isinstance(value, dict):
        return {key: _marked(item) for key, item in value.items()} or MARK
    if isinstance(value, list):
        return [_marked(item) for item in value] or MARK
    return MARK
