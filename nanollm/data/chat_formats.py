"""One item of a data set → a chat: a list of messages, and which of its answers are learnt.

    {"messages": [{"role", "content"}, …], ["tools"]}                                             OpenAI
    {"instruction", "output", ["input"], ["history": [[question, answer], …]]}                    Alpaca
    {"conversations": [{"from": "human" | "gpt" | a role, "value"}, …], ["tools"]}                ShareGPT
    {"prompt", "completion"}: two texts, or two lists of messages, of which the second is learnt  TRL
    {"prompt", "response", ["query"], ["history"]}: Alpaca by other names                         LLaMA-Factory

Keys in brackets may be absent or null. Each format but TRL's may have a "system" (or "system_prompt"), which becomes
the first message. Keys that no format has, an id say, are passed over. A message may have more than a role and a
content: that is for the template, and chat_fields.py refuses what it does not write.

Which answers are learnt: all, those of "history" too, but not

    the first message of a chat                          nothing stands before it
    one with "weight": 0, "train": false, "loss": false  OpenAI's and axolotl's; other weights are refused
    one that says nothing                                an empty text and no tool call
    those of a "prompt" that is a list                   they are context
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from nanollm.errors import DataError, did_you_mean

ROLES = {"system": "system", "developer": "developer", "user": "user", "assistant": "assistant", "tool": "tool",
         "human": "user", "gpt": "assistant", "observation": "tool", "function": "tool", "function_call": "assistant"}
SYSTEM = {"system": str, "system_prompt": str}
FORMATS: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (      # the keys that each needs, and that it may have
    ({"messages": list}, {"tools": (str, list), **SYSTEM}),
    ({"instruction": str, "output": str}, {"input": str, "history": list, "tools": (str, list), **SYSTEM}),
    ({"conversations": list}, {"tools": (str, list), **SYSTEM}),
    ({"prompt": (str, list), "completion": (str, list)}, {"tools": (str, list)}),
    ({"prompt": str, "response": str}, {"query": str, "history": list, "tools": (str, list), **SYSTEM}),
)
PREFERENCES = {"chosen", "rejected", "kto_tag"}
KINDS = {str: "text", list: "a list", (str, list): "text or a list"}
EXPECTED = "; or ".join(", ".join([*needed, *(f"[{key}]" for key in more if key != "system_prompt")])
                        for needed, more in FORMATS)
THOUGHTS = ("reasoning_content", "reasoning", "thinking")           # three names of one thing


@dataclass(frozen=True)
class Chat:
    """One item of the data, as messages."""
    where: str                                  # "file, line 7", for errors
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    first: int = 0                              # the answers before this message are context, not to be learnt
    plain: bool = False                         # a prompt and a completion, given as text: can do without a template
    unlearnt: tuple[int, ...] = ()              # messages that are context by their weight, or because they say nothing

    @property
    def answers(self) -> list[int]:
        """The indices of the messages to learn."""
        return [i for i, message in enumerate(self.messages)
                if message["role"] == "assistant" and i >= max(self.first, 1) and i not in self.unlearnt]


def need(condition: Any, where: str, expected: str, found: Any, hint: str = "") -> None:
    """`found` is shown as JSON in ASCII, so that the data cannot drive a terminal from an error either."""
    if not condition:
        text = json.dumps(found)
        raise DataError(f"{where}: expected {expected}, found {text if len(text) <= 100 else text[:100] + '…'}{hint}")


def misspelt(keys: Iterable[str], known: Iterable[str]) -> str:
    """The end of a message on keys of which one may be meant as another that is known; "" where none is like one."""
    names = [*known]
    return next((hint for key in keys if key not in names and (hint := did_you_mean(key, names))), "")


def chat(item: Any, where: str) -> Chat:
    """The chat of an item in any format. Raises DataError, which begins with `where`."""
    need(isinstance(item, dict), where, f"an object with the keys {EXPECTED}", item)
    item = {key: value for key, value in item.items() if value is not None}
    needed, more = _format(item, where)
    for key, kinds in (needed | more).items():
        need(key not in item or isinstance(item[key], kinds), where, f"{key!r} to be {KINDS[kinds]}", item.get(key))

    names, first = ("role", "content"), 0
    if "messages" in needed:
        turns = item["messages"]
    elif "conversations" in needed:
        turns, names = item["conversations"], ("from", "value")
    elif "completion" in needed:
        prompt, said = item["prompt"], item["completion"]
        alike = type(prompt) is type(said)
        need(alike, where, "prompt and completion to be both text or both lists of messages", [prompt, said])
        if isinstance(prompt, str):
            prompt, said = [{"role": "user", "content": prompt}], [{"role": "assistant", "content": said}]
        turns, first = prompt + said, len(prompt)
    else:
        ask, more_of_it, answer = ("instruction", "input", "output") if "output" in needed else (
            "prompt", "query", "response")
        question = "\n".join(filter(None, (item[ask], item.get(more_of_it))))
        pairs = [*item.get("history", []), [question, item[answer]]]
        even = all(isinstance(pair, list) and len(pair) == 2 for pair in pairs)
        need(even, where, "'history' to hold pairs of question and answer", item.get("history"))
        roles = ("user", "assistant")
        turns = [{"role": role, "content": text} for pair in pairs for role, text in zip(roles, pair, strict=True)]
    read = [_message(turn, f"{where}, message {n}", *names) for n, turn in enumerate(turns, 1)]
    if system := _system(item, where):
        need(not read or read[0][0]["role"] != "system", where, "one system message, in the messages or beside them",
             system)
        read, first = [({"role": "system", "content": system}, True), *read], first + (first > 0)
    messages = [message for message, _ in read]
    unlearnt = tuple(i for i, (message, learn) in enumerate(read) if not (learn and _says_something(message)))
    plain = isinstance(item.get("completion"), str)
    made = Chat(where, messages, _tools(item.get("tools"), where), first, plain, unlearnt)
    answers = any(m["role"] == "assistant" and i >= max(first, 1) for i, m in enumerate(messages))
    need(answers, where, "an answer of the assistant to learn from, and something before it",
         [message["role"] for message in messages])
    return made


def _format(item: dict[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of the format of an item: the keys that it needs, and those it may have."""
    if found := sorted(PREFERENCES & {*item}):
        raise DataError(f"{where}: found {', '.join(found)}: preference data, which --preference and --reward read; "
                        f"expected chats to learn from, with the keys {EXPECTED}")
    needed, more = next((format for format in FORMATS if format[0].keys() <= item.keys()), ({}, {}))
    known = dict.fromkeys(key for format in FORMATS for part in format for key in part)
    need(needed, where, f"the keys {EXPECTED}", [*item], misspelt(item, known))
    others = {*known} - {*needed, *more}
    strays, format = sorted(others & {*item}), " + ".join(needed)
    if strays == ["prompt"] and isinstance(item["prompt"], str):        # UltraChat, no_robots: the first question again
        texts = [turn.get("content", turn.get("value")) for part in needed for turn in item[part]
                 if isinstance(item[part], list) and isinstance(turn, dict)]
        if any(isinstance(text, str) and text.strip() == item["prompt"].strip() for text in texts):
            strays = []
    need(not strays, where, f"a chat of one format, {format}; remove what is not meant", strays)
    need(item.get("weight", 1) in (0, 1) and item.get("weight", 1), where,
         "no 'weight' of a whole chat: leave chats out that are not to be learnt, weigh whole sets with --mix",
         item.get("weight"))
    return needed, more


def _system(item: dict[str, Any], where: str) -> str | None:
    given = {item[key] for key in SYSTEM if item.get(key)}
    need(len(given) < 2, where, "one of 'system' and 'system_prompt'", sorted(given))
    return given.pop() if given else None


def _tools(value: Any, where: str) -> list[dict[str, Any]] | None:
    """A list of tools, or its JSON, each as OpenAI writes it: {"type": "function", "function": {"name", …}}."""
    if isinstance(value, str):
        if not value.strip():
            return None
        try:
            value = json.loads(value)
        except ValueError:
            need(False, where, "'tools' to be a list, or its JSON", value)
    need(value is None or (isinstance(value, list) and all(isinstance(tool, dict) for tool in value)), where,
         "'tools' to be a list of objects, or its JSON", value)
    return [{"type": "function", "function": tool} if "name" in tool and "function" not in tool else tool
            for tool in value] if value else None


def _message(value: Any, where: str, role_key: str, content_key: str) -> tuple[dict[str, Any], bool]:
    """A message with text for content, and whether it may be learnt. What else it has is for the template."""
    need(isinstance(value, dict), where, "an object", value)
    message = {key: part for key, part in value.items() if part is not None}
    role = message.pop(role_key, None)
    need(isinstance(role, str) and role in ROLES, where, f"{role_key!r} to be one of {', '.join(ROLES)}", role)
    learn = _weight(message, where, ROLES[role] == "assistant")
    if "function_call" in message and "tool_calls" not in message:     # OpenAI's older name
        message["tool_calls"] = [{"type": "function", "function": message.pop("function_call")}]
    content = message.pop(content_key, "" if {"tool_calls", *THOUGHTS} & {*message} else None)
    if role == "function_call":                                        # ShareGPT's: the content is the call, as JSON
        message["tool_calls"], content = _calls(content, where, content_key), ""
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        if len(texts) == len(content) > 0 and all(isinstance(text, str) for text in texts):
            content = "".join(map(str, texts))
    need(isinstance(content, str), where, f"{content_key!r} to be text, or parts of type text", content)
    given = [key for key in THOUGHTS if message.get(key) not in (None, "")]
    for key in [key for key in THOUGHTS if key in message and key not in given[:1]]:
        need(not given or message[key] in ("", message[given[0]]), where, f"one of {', '.join(given)}", message[key])
        del message[key]
    return message | {"role": ROLES[role], "content": content}, learn


def _weight(message: dict[str, Any], where: str, answer: bool) -> bool:
    """Whether a message is learnt, by the keys that say so, which are taken out."""
    said = {}
    for key, values in (("weight", (0, 1)), ("train", (False, True)), ("loss", (False, True))):
        if key in message:
            value = message.pop(key)
            kind = bool if key != "weight" else (int, float)
            need(isinstance(value, kind) and value in values, where, f"{key!r} to be {values[0]} or {values[1]}", value)
            need(answer or key == "weight" or not value, where, f"{key!r} true on answers alone", value)
            said[key] = bool(value)
    need(len({*said.values()}) < 2, where, "keys that agree on whether the answer is learnt", said)
    return all(said.values())


def _calls(content: Any, where: str, key: str) -> list[dict[str, Any]]:
    try:
        calls = json.loads(content)
        calls = calls if isinstance(calls, list) else [calls]
    except (TypeError, ValueError):
        calls = []
    sound = calls and all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls)
    need(sound, where, f'{key!r} to be the JSON of {{"name", "arguments"}}, or of a list of them', content)
    return [{"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}
            for call in calls]


def _says_something(message: dict[str, Any]) -> bool:
    return bool(message["role"] != "assistant" or message["content"].strip() or message.get("tool_calls"))
