"""Chats to learn from: written by the model's own template, with a loss on the answers only.

    what inference feeds    <user> Hi <end> <assistant>                        messages before an answer, and its prompt
    with the answer         <user> Hi <end> <assistant> Hello ! <end> \\n       messages up to the answer
    the answer                                          Hello ! <end>          behind their common prefix, to a stop id

    tokens       <user>  Hi    <end>  <assistant>  Hello  !      <end>         what follows a stop id is not generated:
    targets      −100    −100  −100   Hello        !      <end>  −100          it is of the next prompt, or of nothing
    positions    0       1     2      3            4      5      6             the next example begins at 0 again

Both texts come from `Conversation.prompt_ids`, so a model is trained on the very ids that it will be given, special
tokens that a user typed included. BPE may merge across the border: a token that holds the end of the prompt and the
beginning of the answer is the model's to say. The turns of a chat are one example as long as each goes on from the ids
of the last. Some templates rewrite what was said before (they leave out old thoughts, say): there each turn is an
example of its own.

Shapes: T tokens of the context, n tokens of one example.
"""

import json
import unicodedata
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nanollm.errors import DataError, TokenizerError
from nanollm.text.chat import Conversation
from nanollm.text.templates import no_template
from nanollm.text.tokenizer import Tokenizer

HELD_OUT = 0.05                 # share of the chats that training never sees
FEW = 20                        # of fewer chats none is held out: one or two would measure nothing
ROLES = {"system": "system", "developer": "developer", "user": "user", "assistant": "assistant", "tool": "tool",
         "human": "user", "gpt": "assistant", "observation": "tool"}
FORMATS: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (      # the keys that each needs, and that it may have
    ({"messages": list}, {"tools": list}),
    ({"instruction": str, "output": str}, {"input": str, "system": str, "history": list}),
    ({"conversations": list}, {"system": str}),
    ({"prompt": (str, list), "completion": (str, list)}, {}),
)
KINDS = {str: "text", list: "a list", (str, list): "text or a list"}
EXPECTED = "; or ".join(", ".join([*needed, *(f"[{key}]" for key in more)]) for needed, more in FORMATS)


@dataclass(frozen=True)
class Chat:
    """One item of the data, as messages."""
    where: str                                  # "file, line 7", for errors
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    first: int = 0                              # the answers before this message are context, not to be learnt
    plain: bool = False                         # a prompt and a completion, given as text: can do without a template

    @property
    def answers(self) -> list[int]:
        """The indices of the messages to learn."""
        return [i for i, message in enumerate(self.messages) if message["role"] == "assistant" and i >= self.first]


class Example(NamedTuple):
    """One conversation in tokens, with those that are learnt."""
    tokens: np.ndarray                          # (n,) int64
    answer: np.ndarray                          # (n,) bool: the token is part of an answer, to be predicted


# ---- reading

def read(path: Path) -> list[Chat]:
    """The chats of a .jsonl, of a .json that holds one list, or of every .jsonl in a folder, in the order of names.

    An item has one of four formats. Keys in brackets may be absent or null; keys that no format has are passed over.

        {"messages": [{"role", "content"}, …], ["tools"]}
        {"instruction", "output", ["input"], ["system"], ["history": [[question, answer], …]]}        Alpaca
        {"conversations": [{"from": "human" | "gpt" | a role, "value"}, …], ["system"]}               ShareGPT
        {"prompt", "completion"}: two texts, or two lists of messages, of which the second is learnt  TRL

    Every answer of the others is learnt, those of "history" too. Raises DataError, with the file and line (.json: the
    item).
    """
    files = [path]
    if path.is_dir():
        inside = [(file, file.relative_to(path).parts) for file in sorted(path.rglob("*.jsonl"))]
        files = [file for file, parts in inside if not any(part.startswith(".") for part in parts)]
    chats = [_chat(item, where) for file in files for item, where in _items(file)]
    if not chats:
        what = f"{'.jsonl files with ' * path.is_dir()}objects"
        raise DataError(f"{path}: no chats in it; expected {what} of one of the formats {EXPECTED}")
    return chats


def _items(path: Path) -> Iterator[tuple[Any, str]]:
    if path.suffix not in (".jsonl", ".json") and path.exists():
        raise DataError(f"{path}: expected a .jsonl with a chat a line, a .json with a list of chats, "
                        "or a folder of .jsonl")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    if path.suffix == ".jsonl":
        for n, line in enumerate(data.split(b"\n"), 1):
            if line.strip():
                yield _json(line, f"{path}, line {n}"), f"{path}, line {n}"
    else:
        items = _json(data, f"{path}")
        _need(isinstance(items, list), f"{path}", "one list of chats (a chat a line belongs into a .jsonl)", items)
        yield from ((item, f"{path}, item {n}") for n, item in enumerate(items, 1))


def _json(data: bytes, where: str) -> Any:
    try:
        value = json.loads(data.decode("utf-8-sig"))
        json.dumps(value, ensure_ascii=False).encode()          # "\ud800" is JSON, but no text
        return value
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON in UTF-8: {error}") from None


def _need(condition: Any, where: str, expected: str, found: Any) -> None:
    """`found` is shown as JSON in ASCII, so that the data cannot drive a terminal from an error either."""
    if not condition:
        text = json.dumps(found)
        raise DataError(f"{where}: expected {expected}, found {text if len(text) <= 100 else text[:100] + '…'}")


def _chat(item: Any, where: str) -> Chat:
    _need(isinstance(item, dict), where, f"an object with the keys {EXPECTED}", item)
    item = {key: value for key, value in item.items() if value is not None}
    needed, more = next((format for format in FORMATS if format[0].keys() <= item.keys()), ({}, {}))
    _need(needed, where, f"the keys {EXPECTED}", [*item])
    others = {key for format in FORMATS for part in format for key in part} - {*needed, *more}
    strays, format = sorted(others & {*item}), " + ".join(needed)
    _need(not strays, where, f"a chat of one format, {format}; remove what is not meant", strays)
    for key, kinds in (needed | more).items():
        _need(key not in item or isinstance(item[key], kinds), where, f"{key!r} to be {KINDS[kinds]}", item.get(key))

    names, first = ("role", "content"), 0
    if "messages" in needed:
        turns = item["messages"]
    elif "conversations" in needed:
        turns, names = item["conversations"], ("from", "value")
    elif "prompt" in needed:
        prompt, said = item["prompt"], item["completion"]
        alike = type(prompt) is type(said)
        _need(alike, where, "prompt and completion to be both text or both lists of messages", [prompt, said])
        if isinstance(prompt, str):
            prompt, said = [{"role": "user", "content": prompt}], [{"role": "assistant", "content": said}]
        turns, first = prompt + said, len(prompt)
    else:
        question = "\n".join(filter(None, (item["instruction"], item.get("input"))))
        pairs = [*item.get("history", []), [question, item["output"]]]
        even = all(isinstance(pair, list) and len(pair) == 2 for pair in pairs)
        _need(even, where, "'history' to hold pairs of question and answer", item.get("history"))
        roles = ("user", "assistant")
        turns = [{"role": role, "content": text} for pair in pairs for role, text in zip(roles, pair, strict=True)]
    if item.get("system"):
        turns = [{names[0]: "system", names[1]: item["system"]}, *turns]

    chat = Chat(where, [_message(turn, f"{where}, message {n}", *names) for n, turn in enumerate(turns, 1)],
                item.get("tools"), first, isinstance(item.get("prompt"), str))
    found, answers = [message["role"] for message in chat.messages], chat.answers
    _need(answers and answers[0] > 0, where, "an answer of the assistant to learn from, and something before it", found)
    for i in answers:
        message = chat.messages[i]
        says = message["content"].strip() or message.get("tool_calls")
        _need(says, where, f"message {i + 1}, an answer, to say something", message)
    return chat


def _message(value: Any, where: str, role_key: str, content_key: str) -> dict[str, Any]:
    """A message with text for content. What else it has, tool calls or thoughts, is for the template."""
    _need(isinstance(value, dict), where, "an object", value)
    message = {key: part for key, part in value.items() if part is not None}
    role, content = message.pop(role_key, None), message.pop(content_key, "" if "tool_calls" in message else None)
    _need(isinstance(role, str) and role in ROLES, where, f"{role_key!r} to be one of {', '.join(ROLES)}", role)
    _need("weight" not in message, where, "no 'weight': every answer counts alike", message.get("weight"))
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        if len(texts) == len(content) > 0 and all(isinstance(text, str) for text in texts):
            content = "".join(map(str, texts))
    _need(isinstance(content, str), where, f"{content_key!r} to be text, or parts of type text", content)
    return message | {"role": ROLES[role], "content": content}


def split(chats: Sequence[Chat], share: float = HELD_OUT) -> tuple[list[Chat], list[Chat]]:
    """(training, held out) by a hash of what is said: the same on every machine, equal chats on one side."""
    contents = [json.dumps([chat.messages, chat.tools], sort_keys=True) for chat in chats]
    unique = sorted({*contents}, key=lambda content: (zlib.crc32(content.encode()), content))
    held = {*unique[: round(share * len(unique))]} if len(unique) >= FEW else set()
    pairs = list(zip(chats, contents, strict=True))
    return [c for c, content in pairs if content not in held], [c for c, content in pairs if content in held]


# ---- ids

def examples(tokenizer: Tokenizer, chat: Chat) -> list[Example]:
    """What the model sees of a chat, and which of it are answers: one example, or one for each turn rewritten later.

    Where the template writes no stop id behind the last answer, the end-of-sequence id is put there: without one, the
    model would never learn to stop. Without a template only a prompt and a completion, both text, can be learnt.
    Raises TokenizerError if a template is missing; DataError if it refuses the chat, leaves an answer out, or asks for
    an answer in words that the written one does not begin with.
    """
    if not tokenizer.stop_ids:
        raise DataError(f"{chat.where}: the tokenizer has no stop id, so no answer could end; "
                        "name an eos_token in its tokenizer_config.json")
    made: list[tuple[list[int], list[bool]]] = []
    for i in chat.answers:
        prompt, whole = _ids(tokenizer, chat, i)
        differ = (at for at, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b)
        start = next(differ, min(len(prompt), len(whole)))
        asked, written = (tokenizer.decode(ids[start:], skip_special=False) for ids in (prompt, whole))
        _need(start < len(whole) and written.startswith(asked), f"{chat.where}, message {i + 1}",
              f"the template to write {json.dumps(asked[:80])} and the answer there, "
              "as it does where it asks for one; change the template, or write the answer so", written)
        end = next((at + 1 for at in range(start, len(whole)) if whole[at] in tokenizer.stop_ids), len(whole))
        goes_on = made and start >= len(made[-1][0]) and whole[: len(made[-1][0])] == made[-1][0]
        learnt = made.pop()[1] if goes_on else []
        made.append((whole[:end], learnt + [False] * (start - len(learnt)) + [True] * (end - start)))
    for ids, learnt in made:
        if ids[-1] not in tokenizer.stop_ids:
            ids.append(tokenizer.stop_ids[0] if tokenizer.eos_id is None else tokenizer.eos_id)
            learnt.append(True)
    return [Example(np.array(ids, np.int64), np.array(learnt, bool)) for ids, learnt in made]


def _ids(tokenizer: Tokenizer, chat: Chat, i: int) -> tuple[list[int], list[int]]:
    """The ids that ask for message i, and the ids of all messages up to it."""
    template = tokenizer.template_for(chat.tools)
    if template is None and not chat.plain:
        raise TokenizerError(f"{chat.where}: {no_template(tokenizer)}; or put a chat_template.jinja into the "
                             "folder, or give each item as a prompt and a completion, both text")
    try:
        if template is None:
            prompt, completion = (message["content"] for message in chat.messages)
            return tokenizer.encode(prompt), tokenizer.encode(prompt + completion)
        asking, said = (Conversation(tokenizer, chat.messages[:upto], chat.tools) for upto in (i, i + 1))
        return asking.prompt_ids(), said.prompt_ids(add_generation_prompt=False)
    except TokenizerError as error:
        raise DataError(f"{chat.where}: {error}") from None


def picture(tokenizer: Tokenizer, example: Example, colour: bool) -> str:
    """An example as text, special tokens included; answers in green, or between ⟦ and ⟧; no control characters."""
    begin, end = ("\x1b[32m", "\x1b[0m") if colour else ("⟦", "⟧")
    stream, text, inside = tokenizer.stream(skip_special=False), "", False
    for id, answer in zip(example.tokens, example.answer, strict=True):
        if answer != inside:
            text, inside = text + (begin if answer else end), answer
        text += _safe(stream.push(id))
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


class Chats:
    """Examples in rows of T tokens, a `stream.Source` for the trainer. Each begins at position 0 and sees no other.

    dropped   how many examples are longer than T, and left out
    pad       any id of the model: what fills a row up has position −1, which nothing sees (layers/mask.py)
    """

    def __init__(self, name: str, examples: Sequence[Example], context: int, pad: int) -> None:
        self.name, self.context, self.pad = name, context, pad
        self.examples = [example for example in examples if len(example.tokens) <= context]
        self.dropped = len(examples) - len(self.examples)
        if not self.examples:
            longest = max((len(example.tokens) for example in examples), default=0)
            raise DataError(f"{name}: none of {len(examples)} examples fits --context {context}; "
                            f"the longest has {longest} tokens: give a larger --context")
        self._rows = pack([len(example.tokens) for example in self.examples], context)
        self.rows = len(self._rows)
        self.fingerprint = zlib.crc32(b"%d" % context)
        for tokens, answer in self.examples:
            self.fingerprint = zlib.crc32(tokens.astype("<i8").tobytes() + answer.tobytes(), self.fingerprint)

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """tokens, targets (−100: nothing to predict), positions (−1: padding), each (T,) int64."""
        tokens, targets, positions = (np.full(self.context, fill, np.int64) for fill in (self.pad, -100, -1))
        at = 0
        for i in self._rows[index]:
            (ids, answer), n = self.examples[i], len(self.examples[i].tokens)
            tokens[at : at + n], positions[at : at + n] = ids, np.arange(n)
            targets[at : at + n - 1] = np.where(answer[1:], ids[1:], -100)      # the last token predicts nothing
            at += n
        return tokens, targets, positions

    def verify(self, vocab: int) -> None:
        """Raises DataError if a token is not below `vocab`."""
        largest = max(self.pad, *(int(example.tokens.max()) for example in self.examples))
        if largest >= vocab:
            raise DataError(f"{self.name}: token id {largest}, expected ids below {vocab}; "
                            "use the tokenizer that the model was trained with")

    def unchanged(self) -> None:
        """Held in memory: nothing can change under the run."""
