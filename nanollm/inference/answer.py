"""What comes of a prompt: the tokens, why they end, and how likely each was.

    stream = generate(model, ids, 64, temperature=0.8, logprobs=3)
    for token in stream:                             # one by one, as they are made
        …
    stream.answer.ended                              # "stop", "length", "context" or "interrupted"
    stream.answer.logprobs[0].chosen.raw             # log p of the first token

Two log-probabilities are told apart, both log softmax over the vocabulary (natural logarithm):

    raw         of the model's own logits: `logprob` and `top_logprobs` of OpenAI's API, log softmax of transformers'
                `output_logits`
    processed   of what the token was drawn from, after penalties, bans, temperature and filters: log softmax of
                transformers' `output_scores`; −∞ for a token that could not be drawn. Greedy has no temperature and
                no filters, and takes the largest.
"""

from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Ended = Literal["stop", "length", "context", "interrupted"]


@dataclass(frozen=True)
class Logprob:
    """Of one token at one place; the head of the file says which is which."""
    token: int
    raw: float
    processed: float


@dataclass(frozen=True)
class TokenLogprobs:
    """The token that was chosen, and the likeliest by `raw`, the likeliest first."""
    chosen: Logprob
    top: tuple[Logprob, ...]


@dataclass
class Answer:
    """What came of one prompt so far.

    ended: "stop" at a stop token (the last of `tokens`) or a stop text, "length" at max_new_tokens, "context" where the
    session is full, "interrupted" where an exception or `Stream.close` ended it; None while it goes on.
    """
    tokens: list[int] = field(default_factory=list)
    ended: Ended | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)         # one a token, where they were asked for


class Stream(Iterator[int]):
    """An iterator over the tokens of an answer. `answer` has what is known so far."""

    def __init__(self, answer: Answer, tokens: Generator[int, None, None]) -> None:
        self.answer, self._tokens = answer, tokens

    def __next__(self) -> int:
        return next(self._tokens)

    def close(self) -> None:
        """End the answer here: no more tokens are made, and it is marked as interrupted if it had not ended."""
        self._tokens.close()
        self.answer.ended = self.answer.ended or "interrupted"


def logprobs_of(logits: Tensor, scores: Tensor, tokens: Tensor, top: int) -> list[TokenLogprobs]:
    """Logits and scores (B, V), the tokens chosen (B,) → one a row, each with the `top` likeliest tokens."""
    raw, processed = logits.float().log_softmax(-1), scores.log_softmax(-1)
    index = torch.cat([tokens[:, None], raw.topk(min(top, raw.shape[-1]), -1).indices], 1)              # (B, 1 + top)
    columns = index.tolist(), raw.gather(1, index).tolist(), processed.gather(1, index).tolist()
    rows = ([Logprob(*each) for each in zip(*row, strict=True)] for row in zip(*columns, strict=True))
    return [TokenLogprobs(row[0], tuple(row[1:])) for row in rows]
