"""One item of preference data → a prompt and its answers: a better and a worse one, or one with a label.

    {"prompt", "chosen", "rejected"}: texts, or lists of messages; prompt may be absent               TRL
    {"instruction", "chosen", "rejected", ["input"], ["history"], ["system"]}                          LLaMA-Factory
    {"conversations": […], "chosen": {"from", "value"}, "rejected": {…}}; or "messages" with "role"    LLaMA-Factory
    {"prompt", "completion", "label": true | false}; or any chat beside a label                        TRL, for KTO
    … "kto_tag": true | false                                                                          LLaMA-Factory

["margin"]: by how much the better one is better, for a reward model. What a chat may have beside its messages (system,
tools), an item here may have too: each answer is read as the chat that it ends, by chat_formats.py.

Without "prompt" it is what both begin with: the messages that are equal, which an answer must follow. Of two texts it
is the words that are equal; dialogues of the HH data ("\\n\\nHuman: … \\n\\nAssistant: …") become messages first.

    chosen     user: Hi    assistant: Hello, who are you?     user: Bob    assistant: Hi Bob.
    rejected   user: Hi    assistant: Hello, who are you?     user: Bob    assistant: So what.
               └──────────────────────── the prompt ────────────────────┘  └─ what is compared ─┘
"""

import math
import os.path
import re
from dataclasses import dataclass, replace
from typing import Any

from nanollm.data.chat_files import CHATS, Kind
from nanollm.data.chat_formats import ROLES, Chat, chat, misspelt, need

PAIR, LABELS, MARGIN = ("chosen", "rejected"), ("label", "kto_tag"), "margin"
EXPECTED = ("chosen, rejected, [prompt]; instruction, chosen, rejected, [input], [history]; conversations or messages, "
            "chosen, rejected; or a chat with a label or kto_tag, true or false")
SPEAKER = re.compile(r"\n\n(Human|Assistant): ?")


@dataclass(frozen=True)
class Preference:
    """One item: the answers to one prompt, each as a chat of which it alone is learnt."""
    where: str                                  # "file, line 7", for errors
    answers: tuple[Chat, ...]                   # the better and the worse one; or one
    label: bool = True                          # of one: whether it is a good answer
    margin: float = 0.0                         # of two: by how much the first is better

    @property
    def prompt(self) -> Chat:
        """What is answered."""
        one = self.answers[0]
        return Chat(self.where, one.messages[: one.first], one.tools)

    @property
    def tied(self) -> bool:
        """Whether the two answers are the same, so that there is nothing to learn."""
        return len(self.answers) == 2 and self.answers[0].messages == self.answers[1].messages


def preference(item: Any, where: str) -> Preference:
    """The preference of an item in any format. Raises DataError, which begins with `where`."""
    need(isinstance(item, dict), where, f"an object with the keys {EXPECTED}", item)
    item = {key: value for key, value in item.items() if value is not None}
    labels, margin = [item[key] for key in LABELS if key in item], item.get(MARGIN, 0.0)
    need(bool(labels) != (item.keys() >= {*PAIR}), where, f"the keys {EXPECTED}", [*item],
         misspelt(item, PREFERENCES.keys))
    need(isinstance(margin, (int, float)) and not isinstance(margin, bool) and math.isfinite(margin), where,
         "'margin' to be a finite number", str(margin))
    rest = {key: value for key, value in item.items() if key not in (*PAIR, *LABELS, MARGIN)}
    if labels:
        need(len(labels) == 1 and isinstance(labels[0], bool), where, "one label, true or false", labels)
        made = chat(rest, where)
        return Preference(where, (_judged(made, made.first or len(made.messages) - 1),), label=labels[0])
    chosen, rejected = (item[key] for key in PAIR)
    for key, answer in zip(PAIR, (chosen, rejected), strict=True):
        need(isinstance(answer, (str, list, dict)), where, f"{key!r} to be text, a message or a list of them", answer)
    need(type(chosen) is type(rejected), where, "chosen and rejected to be both text or both messages",
         [chosen, rejected])
    if _repeats(rest.get("prompt"), chosen) or not rest.keys() & {"prompt", "instruction", "conversations", "messages"}:
        rest.pop("prompt", None)
        prompt, chosen, rejected = _parted(chosen, rejected, where)
        rest |= prompt
    return Preference(where, tuple(answered(rest, answer, where) for answer in (chosen, rejected)),
                      margin=float(margin))


PREFERENCES = Kind("preferences", preference, CHATS.keys | {*PAIR, *LABELS, MARGIN}, EXPECTED)


def _repeats(prompt: Any, answer: Any) -> bool:
    """Whether an answer is a whole chat that begins with the prompt, as in UltraFeedback."""
    first = answer[0] if isinstance(answer, list) and len(answer) > 1 else None
    return isinstance(prompt, str) and isinstance(first, dict) and prompt in (first.get("content"), first.get("value"))


def _parted(chosen: Any, rejected: Any, where: str) -> tuple[dict[str, Any], Any, Any]:
    """What both begin with, under the key of its format, and what is left of each."""
    if isinstance(chosen, str) and SPEAKER.match(chosen) and SPEAKER.match(rejected):
        chosen, rejected = _dialogue(chosen), _dialogue(rejected)
    same = "a prompt, or chosen and rejected that begin with the same one"
    need(not isinstance(chosen, dict), where, same, [chosen, rejected])
    if isinstance(chosen, str):
        n = len(os.path.commonprefix([chosen, rejected]))
        n -= chosen[:n].endswith(" ")                           # most tokens begin with a space
        need(n > 0, where, same, [chosen, rejected])
        return {"prompt": chosen[:n]}, chosen[n:], rejected[n:]
    equal = [a == b for a, b in zip(chosen, rejected, strict=False)]
    n = equal.index(False) if False in equal else min(len(chosen), len(rejected)) - 1
    for messages in (chosen, rejected):
        turn = messages[n] if 0 < n < len(messages) and isinstance(messages[n], dict) else {}
        need(ROLES.get(str(turn.get("role", turn.get("from")))) == "assistant", where,
             f"{same} and go on with an answer of the assistant", messages)
    return {"messages" if "role" in chosen[0] else "conversations": chosen[:n]}, chosen[n:], rejected[n:]


def _dialogue(text: str) -> list[dict[str, str]]:
    """"\\n\\nHuman: Hi\\n\\nAssistant: Hello" as messages."""
    _, *parts = SPEAKER.split(text)
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[name], "content": said} for name, said in zip(parts[::2], parts[1::2], strict=True)]


def answered(item: dict[str, Any], answer: Any, where: str) -> Chat:
    """The chat that this answer ends."""
    messages = answer if isinstance(answer, list) else [answer]
    made = chat(_whole(item, messages, where), where)
    return _judged(made, len(made.messages) - len(messages))


def _whole(item: dict[str, Any], answer: list[Any], where: str) -> dict[str, Any]:
    """The item of chat_formats.py whose last messages are the answer."""
    for key, role, content in (("messages", "role", "content"), ("conversations", "from", "value")):
        if key in item:
            need(isinstance(item[key], list), where, f"{key!r} to be a list", item[key])
            return item | {key: item[key] + _turns(answer, role, content)}
    if "instruction" in item or item.keys() & {"query", "history", "system", "system_prompt"}:
        said = answer[0]
        text = said.get("content", said.get("value")) if isinstance(said, dict) else said
        return item | {"output" if "instruction" in item else "response": text}
    prompt = item["prompt"]
    if isinstance(prompt, str) and isinstance(answer[0], str):
        return item | {"completion": answer[0]}
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return item | {"prompt": asked, "completion": _turns(answer, "role", "content")}


def _turns(answer: list[Any], role: str, content: str) -> list[Any]:
    """The answer as messages, where it is given as text."""
    return [{role: "assistant", content: said} if isinstance(said, str) else said for said in answer]


def _judged(made: Chat, first: int) -> Chat:
    """The chat with its answers from message `first` on alone to be learnt. Raises DataError where they are empty."""
    judged = replace(made, first=first)
    need(judged.answers, made.where, "an answer that says something",
         [message["content"] for message in made.messages[first:]])
    return judged
