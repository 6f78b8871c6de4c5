"""Answers in the words of OpenAI's API: whole, or as the chunks of a stream. What was asked for: api.py.

    whole     {"choices": [{"index": 0, "message": {"role": "assistant", "content": "Hi."}, "finish_reason": "stop"}]}
    chunks    {"choices": [{"index": 0, "delta": {"content": "Hi"}, "finish_reason": null}]}, …
"""

import codecs
import time
import uuid
from collections.abc import Iterable
from typing import Any

from nanollm.inference.api import Asked
from nanollm.inference.engine import Ticket
from nanollm.inference.generation import UpTo
from nanollm.inference.written import finish_reason


class Reply:
    """One answer on its way: of each token that is new, its text, up to a stop text, and its log-probability."""

    def __init__(self, asked: Asked, ticket: Ticket, index: int) -> None:
        self.asked, self.ticket, self.index = asked, ticket, index
        request = asked.request
        # a call may begin with a special token, which is left out of any other text
        self.stream = request.tokenizer.stream(skip_special=asked.calls is None,
                                               continues=request.keeps_space(not asked.chat))
        self.until = UpTo(request.stop_texts)
        self.text, self.sent, self.seen, self.finished = "", 0, 0, False
        self.calls: list[dict[str, Any]] = []
        self.offset, self.spelled = 0, codecs.getincrementaldecoder("utf-8")("replace")

    def read(self) -> dict[str, Any] | None:
        """What has come since: {"text": …, "logprobs": …, "calls": …}, or None for nothing."""
        over = self.ticket.done.is_set()                 # asked first: then all tokens are there
        answer, request = self.ticket.answer, self.asked.request
        tokens = answer.tokens[self.seen :]
        first, self.seen = self.seen, self.seen + len(tokens)
        for token in tokens:
            if not self.until.over and token not in request.tokenizer.stop_ids:
                self.text += self.until.push(self.stream.push(token))
        if over and not self.finished:
            self.finished = True
            if not self.until.over:
                self.text += self.until.push(self.stream.finish())
                self.text += self.until.held
            if self.asked.calls is not None:
                self.text, calls = self.asked.calls.split(self.text)
                self.calls = [call.told() for call in calls]
        elif over or not tokens:
            return None
        certain = len(self.text) if self.finished or self.asked.calls is None else self.asked.calls.certain(self.text)
        new, self.sent = self.text[self.sent : certain], max(self.sent, certain)
        likely = request.likely(answer.logprobs[first : self.seen]) if request.logprobs is not None else None
        return {"text": new, "logprobs": likely, "calls": self.calls if self.finished else []}

    @property
    def reason(self) -> str | None:
        """The finish_reason."""
        return "tool_calls" if self.calls else finish_reason(self.ticket.answer.ended)

    def choice(self) -> dict[str, Any]:
        """The whole answer, as one of the choices."""
        request = self.asked.request
        likely = None if request.logprobs is None else request.likely(self.ticket.answer.logprobs)
        told = {"index": self.index, "finish_reason": self.reason, "logprobs": self.logprobs(likely)}
        if not self.asked.chat:
            return told | {"text": self.text}
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.calls:
            message |= {"content": self.text or None, "tool_calls": self.calls}
        return told | {"message": message}

    def delta(self, new: dict[str, Any]) -> dict[str, Any]:
        """The choice of a chunk: what `read` returned."""
        told = {"index": self.index, "finish_reason": self.reason if self.finished else None,
                "logprobs": self.logprobs(new["logprobs"])}
        if not self.asked.chat:
            return told | {"text": new["text"]}
        delta = {"content": new["text"]} if new["text"] else {}
        if new["calls"]:
            delta["tool_calls"] = [{"index": at} | call for at, call in enumerate(new["calls"])]
        return told | {"delta": delta}

    def logprobs(self, likely: list[dict[str, Any]] | None) -> dict[str, Any] | None:
        """In the form of a chat, or in the older one of completions."""
        if likely is None or self.asked.chat:
            return None if likely is None else {"content": likely}
        offsets = []                                    # in characters of the answer, at which each token begins
        for each in likely:
            offsets.append(self.offset)
            self.offset += len(self.spelled.decode(bytes(each["bytes"])))
        return {"text_offset": offsets,
                "tokens": [each["token"] for each in likely], "token_logprobs": [each["logprob"] for each in likely],
                "top_logprobs": [{top["token"]: top["logprob"] for top in each["top_logprobs"]} for each in likely]}


class Told:
    """What all parts of one response have in common."""

    def __init__(self, asked: Asked, model: str) -> None:
        self.asked = asked
        self.name = "chat.completion" if asked.chat else "text_completion"
        begins = "chatcmpl" if asked.chat else "cmpl"
        self.head = {"id": f"{begins}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, replies: list[Reply]) -> dict[str, Any]:
        """The response that does not stream."""
        return self.head | {"object": self.name, "choices": [reply.choice() for reply in replies],
                            "usage": usage(replies, len(self.asked.prompts))}

    def chunk(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """A part of one that does."""
        return self.head | {"object": f"{self.name}.chunk" if self.asked.chat else self.name, "choices": choices} | more

    def begin(self, replies: Iterable[Reply]) -> list[dict[str, Any]]:
        """The chunks before the first token."""
        role = {"role": "assistant", "content": ""}
        return [self.chunk([{"index": reply.index, "delta": role, "finish_reason": None, "logprobs": None}])
                for reply in replies if self.asked.chat]


def usage(replies: list[Reply], prompts: int) -> dict[str, Any]:
    """Tokens; a prompt with several answers counts once."""
    firsts = replies[:: max(1, len(replies) // prompts)]
    prompt = sum(len(each.ticket.prompt) for each in firsts)
    new = sum(len(each.ticket.answer.tokens) for each in replies)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": sum(each.ticket.reused for each in firsts)}}
