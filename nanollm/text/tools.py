"""Calls of tools in an answer, in the forms that chat templates teach.

    Hermes, Qwen    <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>         one or more, text before them
    Mistral         [TOOL_CALLS][{"name": "add", "arguments": {"a": 1}}]                  a list
                    [TOOL_CALLS]add[ARGS]{"a": 1}                                         one or more; in newer ones
    Llama 3         {"name": "add", "parameters": {"a": 1}}                               the whole answer

Which of them a model writes, its template says: one that shows tools has the form in its source. What begins like a
call and is none stays text. Published by NousResearch (Hermes-Function-Calling), Mistral (mistral-common), Meta
(Llama 3.1's model card).
"""

import json
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from nanollm.text.tokenizer import Tokenizer

PYTHON = "<|python_tag|>"                               # a Llama may begin a call with it


class Call(NamedTuple):
    """Of a function, by name."""
    name: str
    arguments: dict[str, Any]

    def told(self) -> dict[str, Any]:
        """In the form of OpenAI's API, where arguments are JSON inside JSON."""
        return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function",
                "function": {"name": self.name, "arguments": json.dumps(self.arguments, ensure_ascii=False)}}


@dataclass(frozen=True)
class Format:
    """One of the forms above."""
    marker: str | None                                  # what a call begins with, anywhere; None: the answer is one
    read: Callable[[str], list[Call]]                   # the calls in a text from there on; raises ValueError

    def certain(self, text: str) -> int:
        """How many characters of an answer that goes on are text, whatever comes: where a call begins, or may begin."""
        if self.marker is None:
            begun = text.lstrip()
            may_be = begun.startswith(("{", PYTHON)) or PYTHON.startswith(begun)
            return 0 if may_be else len(text)
        at = text.find(self.marker)
        if at >= 0:
            return at
        return len(text) - max((n for n in range(1, len(self.marker)) if text.endswith(self.marker[:n])), default=0)

    def split(self, text: str) -> tuple[str, list[Call]]:
        """A whole answer: its text, and the calls behind it."""
        at = self.certain(text)
        try:
            calls = self.read(text[at:])
        except (ValueError, RecursionError):
            return text, []
        return (text[:at].rstrip(), calls) if calls else (text, [])


def _call(value: Any) -> Call:
    """Of {"name": …, "arguments": {…}}. Raises ValueError for anything else."""
    if isinstance(value, dict) and isinstance(value.get("name"), str):
        arguments = value.get("arguments", value.get("parameters"))
        if isinstance(arguments, dict):
            return Call(value["name"], arguments)
    raise ValueError("no call")


def _hermes(text: str) -> list[Call]:
    found = re.findall(r"<tool_call>(.*?)(?:</tool_call>|\Z)", text, re.DOTALL)
    return [_call(json.loads(each)) for each in found]


def _mistral(text: str) -> list[Call]:
    calls = []
    for each in text.split("[TOOL_CALLS]")[1:]:
        name, newer, arguments = each.partition("[ARGS]")
        if newer:                                       # between the two may stand [CALL_ID] and an id
            calls.append(_call({"name": name.partition("[CALL_ID]")[0].strip(), "arguments": json.loads(arguments)}))
        else:
            calls += [_call(value) for value in json.loads(each)]
    return calls


def _llama(text: str) -> list[Call]:
    text = text.strip().removeprefix(PYTHON)
    return [_call(json.loads(text))] if text else []


def format_of(tokenizer: Tokenizer) -> Format | None:
    """The form of the template that writes chats with tools; None where it shows none of these."""
    template = tokenizer.template_for([]) or ""
    if "<tool_call>" in template:
        return Format("<tool_call>", _hermes)
    if "[TOOL_CALLS]" in template:
        return Format("[TOOL_CALLS]", _mistral)
    if '"parameters": ' in template and "ipython" in template:
        return Format(None, _llama)
    return None
