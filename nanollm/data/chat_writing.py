"""A chat in ids, and what of it is learnt: written by the model's own template, with a loss on the answers only.

    what inference feeds    <user> Hi <end> <assistant>                        messages before an answer, and its prompt
    with the answer         <user> Hi <end> <assistant> Hello ! <end> \\n       messages up to the answer
    the answer                                          Hello ! <end>          behind their common prefix, to a stop id

    tokens       <user>  Hi    <end>  <assistant>  Hello  !      <end>         what follows a stop id is not generated:
    targets      −100    −100  −100   Hello        !      <end>  −100          it is of the next prompt, or of nothing
    positions    0       1     2      3            4      5      6             the next example begins at 0 again

Both texts come from the template as inference uses it (text/chat.py), so a model is trained on the very ids that it
will be given, special tokens that a user typed included. BPE may merge across the border: a token that holds the end of
the prompt and the beginning of the answer is the model's to say.

**Several turns** are one example as long as each goes on from the ids of the last. Some templates rewrite what was said
before (they leave out old thoughts, say): there each turn is an example of its own.

**The end of an answer.** Where the template writes no stop id behind it, the answer must be taught to end all the same,
in the middle of a chat too. Its target is a stop id, though the next token is another one:

    tokens    User: Hi \\n Assistant:  Hello  \\n     User: …                   the ids stay those of inference
    targets                 Hello      \\n    </s>   −100                      the end-of-sequence id
    targets (GLM-4)         Hello      <|user|>                               a role marker that is a stop id

**Prompts that open thoughts.** R1-Distill's prompt ends in "<think>\\n", and its template cuts thoughts from answers.
Such an answer is the prompt, the thoughts, "\\n</think>\\n\\n" and the rest as the template writes it; one without
thoughts has empty ones, as LLaMA-Factory writes them.
"""

import functools
import json
from collections import Counter
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from nanollm.data.chat_fields import CLOSES, OPENS, Fields
from nanollm.data.chat_formats import THOUGHTS, Chat, need
from nanollm.errors import DataError, TokenizerError
from nanollm.text.chat import ids, mark, texts
from nanollm.text.templates import no_template
from nanollm.text.tokenizer import CLOSE, OPEN, Tokenizer

CHECKED = 32                    # texts whose ids are compared with those of the definition
IGNORED = -100                  # the target where there is nothing to predict


class Example(NamedTuple):
    """One conversation in tokens, with what is predicted at each."""
    tokens: np.ndarray                          # (n,) ids
    targets: np.ndarray                         # (n,) ids, −100 where there is nothing to learn

    @property
    def answer(self) -> np.ndarray:
        """(n,) bool: the token itself is predicted by the one before it."""
        return np.concatenate([[False], self.targets[:-1] == self.tokens[1:]])

    @property
    def stops(self) -> np.ndarray:
        """(n,) stop ids that are predicted though another token follows; −100 elsewhere."""
        return np.where(np.append(self.answer[1:], False), IGNORED, self.targets)


class _Draft(NamedTuple):
    """An example in the making. end: the stop id that the last answer still lacks, or None."""
    ids: list[int]
    targets: list[int]
    end: int | None


class Writer:
    """Writes chats with one tokenizer's template. What it finds out about the template holds for all of them.

    notes    of how many messages a person should know something, by what it is
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.fields = tokenizer, Fields(tokenizer)
        self.notes: Counter[str] = self.fields.notes
        self._checks, self._by_pieces = CHECKED, True
        self._piece = functools.lru_cache(4096)(lambda text: tuple(tokenizer.encode(text, bos=False, special=True)))
        self._ends: dict[tuple[Any, ...], int] = {}

    def examples(self, chat: Chat) -> list[Example]:
        """What the model sees of a chat: one example, or one for each turn rewritten later; none without answers.

        Without a template only a prompt and a completion, both text, can be learnt. Raises TokenizerError if a template
        is missing; DataError if it refuses the chat, leaves a field or an answer out, or asks for an answer in words
        that the written one does not begin with.
        """
        tokenizer, stops = self.tokenizer, self.tokenizer.stop_ids
        if not stops:
            raise DataError(f"{chat.where}: the tokenizer has no stop id, so no answer could end; "
                            "name an eos_token in its tokenizer_config.json")
        made: list[_Draft] = []
        for i, asking, written in self._texts(chat):
            prompt, whole = self.ids(asking), self.ids(written)
            start = len(prompt)
            if whole[:start] != prompt:
                differ = (at for at, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b)
                start = next(differ, len(whole))
            if start < len(prompt) or start == len(whole):
                asked, said = (tokenizer.decode(part[start:], skip_special=False) for part in (prompt, whole))
                need(start < len(whole) and said.startswith(asked), f"{chat.where}, message {i + 1}",
                     f"the template to write {json.dumps(asked[:80])} and the answer there, "
                     "as it does where it asks for one; change the template, or write the answer so", said)
            end = next((at + 1 for at in range(start, len(whole)) if whole[at] in stops), len(whole))
            lacks = None if whole[end - 1] in stops else self._end(chat, i)
            if rest := tokenizer.decode(whole[end:]).strip():
                stop = tokenizer.decode([whole[end - 1]], skip_special=False)
                raise DataError(f"{chat.where}, message {i + 1}: the template writes {json.dumps(rest[:80])} behind "
                                f"{stop}, at which generation stops: that could not be learnt; take {stop} out of the "
                                "eos_token_id of generation_config.json, or choose another --template")
            before = made[-1] if made else _Draft([], [], None)
            targets = [IGNORED] * end
            if made and start >= len(before.ids) and whole[: len(before.ids)] == before.ids:
                targets[: len(before.ids)] = made.pop().targets
                if before.end is not None:
                    targets[len(before.ids) - 1] = before.end
            for at in range(max(start, 1), end):
                if targets[at - 1] == IGNORED:
                    targets[at - 1] = whole[at]
            made.append(_Draft(whole[:end], targets, lacks))
        finished = [draft if draft.end is None else
                    _Draft([*draft.ids, draft.end], [*draft.targets[:-1], draft.end, IGNORED], None) for draft in made]
        return [Example(np.array(draft.ids, np.int64), np.array(draft.targets, np.int64)) for draft in finished]

    def _texts(self, chat: Chat) -> list[tuple[int, str, str]]:
        """(index, the text that asks for it, the text up to it) of each answer."""
        template, answers = self.tokenizer.template_for(chat.tools), chat.answers
        if template is None and not chat.plain:
            raise TokenizerError(f"{chat.where}: {no_template(self.tokenizer)}; or put a chat_template.jinja into the "
                                 "folder, or give each item as a prompt and a completion, both text")
        if not answers:
            return []
        if template is None:
            prompt, completion = (message["content"] for message in chat.messages)
            return [(1, prompt, prompt + completion)]
        try:
            messages = self.fields.spelled(chat)
            cuts = [cut for i in answers for cut in ((i, True), (i + 1, False))]
            written = texts(self.tokenizer, messages, chat.tools, cuts)
        except TokenizerError as error:
            raise DataError(f"{chat.where}: {error}") from None
        return [(i, asking, self._with_thoughts(messages[i], asking, whole))
                for i, asking, whole in zip(answers, written[::2], written[1::2], strict=True)]

    def _with_thoughts(self, message: dict[str, Any], asking: str, whole: str) -> str:
        """The text up to an answer, where the prompt opens thoughts and the template leaves them out."""
        if not asking.rstrip().endswith(OPENS) or whole.startswith(asking):
            return whole
        before = asking[: asking.rindex(OPENS)]
        if not whole.startswith(before):
            return whole                                # `examples` says what is wrong
        answer = whole[len(before) :].lstrip("\n" + CLOSE)      # CLOSE: of a tag that is a special token, now cut off
        if answer.startswith(OPENS) and CLOSES in answer:      # spaced in another way than the prompt
            thoughts, _, answer = answer.removeprefix(OPENS).partition(CLOSES)
        else:
            thoughts, answer = (message["content"] or "").rpartition(CLOSES)[0].strip(), f"\n\n{answer}"
            thoughts = mark(thoughts.removeprefix(OPENS), self.tokenizer.special_pattern)
        if not thoughts.strip():
            self.notes["no thoughts: written as empty ones, since the prompt opens them"] += 1
        return f"{asking}{thoughts.strip()}\n{CLOSES}{answer}"

    def ids(self, text: str) -> list[int]:
        """As `text.chat.ids`, but what stands between two special tokens is encoded once, however often it is said.

        A chat of n turns is written n times over, each longer than the last; so its cost grows with its length and not
        with the square. A special token that follows a space begins no piece, since it may swallow it (lstrip). The
        first texts are compared with the definition: where they differ, it is used instead.
        """
        if self.tokenizer.template_for(None) is None and not self.tokenizer.chat_templates:
            return self.tokenizer.encode(text)          # a prompt and a completion, without a template
        if not self._by_pieces:
            return ids(self.tokenizer, text)
        places = [match.start() for match in self.tokenizer.special_pattern.finditer(text)]
        begin = (at for at in places if at and text[at - 1] != OPEN and not text[at - 1].isspace())
        edges = sorted({0, len(text), *begin})
        found = [id for a, b in pairwise(edges) for id in self._piece(text[a:b])]
        found = [*self.tokenizer.prefix, *found] if self.tokenizer.chat_begins else found
        if self._checks:
            self._checks -= 1
            if found != (defined := ids(self.tokenizer, text)):
                self._by_pieces = False
                return defined
        return found

    def _end(self, chat: Chat, i: int) -> int:
        """The stop id that an answer should end with, where the template writes none: the role marker that follows, if
        generation stops at it; else the end-of-sequence id."""
        tokenizer = self.tokenizer
        calls = bool(chat.messages[i].get("tool_calls"))
        if (key := (chat.tools is None, calls)) not in self._ends:
            self._ends[key] = tokenizer.stop_ids[0] if tokenizer.eos_id is None else tokenizer.eos_id
            talk: list[dict[str, Any]] = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}]
            after = {"role": "user", "content": "x"}
            try:
                if calls:                               # and no thoughts, which some templates take out when it goes on
                    plain = {key: value for key, value in chat.messages[i].items() if key not in THOUGHTS}
                    fields = Fields(tokenizer)          # whose notes are of nobody's data
                    talk = [talk[0], fields.spelled(Chat(chat.where, [talk[0], plain], chat.tools))[1]]
                    after = {"role": "tool", "content": "x", "name": "x", "tool_call_id": "x" * 9}
                if tokenizer.template_for(chat.tools) is not None:
                    written, longer = (ids(tokenizer, text) for text in texts(
                        tokenizer, [*talk, after], chat.tools, [(2, False), (3, False)]))
                    following = longer[len(written) : len(written) + 1] if longer[: len(written)] == written else []
                    if following and following[0] in tokenizer.stop_ids:
                        self._ends[key] = following[0]
            except (TokenizerError, DataError):
                pass                                    # a template that refuses such a talk shows no marker
        return self._ends[key]


def examples(tokenizer: Tokenizer, chat: Chat) -> list[Example]:
    """The examples of one chat; for many, keep one `Writer`."""
    return Writer(tokenizer).examples(chat)
