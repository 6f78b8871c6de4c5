"""Speculative decoding: tokens are guessed cheaply, and the model checks several of them in one pass.

    said so far          the cat sat on the
    guess                                   mat and the       a small model, or a look into what was said before
    one pass over        the mat and the                      reads each weight once, for up to four tokens
    chosen from it       mat and a                            the first that differs is kept, what follows is not

At each place the token is chosen from the model's logits as ever (sample.py), greedy or drawn, and compared with the
guess. While they agree, the pass has read what it had to read, and the next place counts, too. So the tokens are those
of `generate`, with a seed as well, and in distribution without one: a guess decides how many tokens a pass yields, and
nothing else. Where a guess g stands, a pass goes on with probability p(g).

Leviathan et al. 2023 (arXiv 2211.17192) draw the guess from the small model's q and accept it with min(1, p/q), which
goes on more often at a high temperature, and gives other tokens for a seed. At temperature 0 the two are one.

    speculate(model, prompt, 64, DraftModel(small, 4096))
    speculate(model, prompt, 64, look_up)               Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding

A pass over several tokens rounds otherwise than one at a time: in float32 only a near tie could tell, in 16 bits one
may. Models whose angles follow the length of the sequence are refused: there each token would need a pass of its own.
"""

from collections.abc import Callable, Generator, Iterable, Sequence
from itertools import takewhile
from typing import Any

import torch

from nanollm.config.positions import places
from nanollm.errors import InputError
from nanollm.inference.answer import Answer, Stream, logprobs_of
from nanollm.inference.context import session_length
from nanollm.inference.generation import Constrain, Finish, Stop, check_prompt
from nanollm.inference.rows import RowCache
from nanollm.inference.sample import Sampling, next_tokens, settings
from nanollm.model import Decoder

Guess = Callable[[Sequence[int], int], list[int]]       # what was said, at most so many → what may come next


def look_up(said: Sequence[int], most: int, longest: int = 3) -> list[int]:
    """What followed the last tokens where they stood before, the latest place first.

    >>> look_up([1, 2, 3, 4, 9, 2, 3], 2)
    [4, 9]
    """
    for n in range(min(longest, len(said) - 1), 0, -1):
        end = list(said[-n:])
        for at in range(len(said) - n - 1, -1, -1):
            if list(said[at : at + n]) == end:
                return list(said[at + n : at + n + most])
    return []


class DraftModel:
    """The likeliest tokens of a small model with the same vocabulary. It keeps its cache from one guess to the next."""

    def __init__(self, model: Decoder, length: int) -> None:
        """length: the most tokens, prompts and answers together. Where there are more, or one that the small model does
        not have, nothing is guessed."""
        self.vocab, most = model.config.vocab, places(model.config.positions)
        self.rows = RowCache(model, 1, length if most is None else min(length, most))

    def __call__(self, said: Sequence[int], most: int) -> list[int]:
        """Greedy, however the answer is drawn."""
        guess: list[int] = []
        rows = self.rows
        if len(said) >= rows.length or max(said) >= self.vocab:
            return []
        known = rows.usable(0, said)
        rows.take(0, 0, known)
        new = list(said[known:])
        if len(new) > 1:                                # a scan can come back to before the last token that is certain
            rows.read(0, new[:-1])
            rows.mark(0)
        new = new[-1:]
        while len(guess) < min(most, rows.length - len(said)):
            new = rows.read(0, new).argmax(-1).tolist()
            guess += new
        return guess


def speculate(model: Decoder, prompt: Sequence[int], max_new_tokens: int, guess: Guess, ahead: int = 4,
              sampling: Sampling | None = None, *, stop_ids: Iterable[int] = (),
              stop: Callable[[], Stop] | None = None, constrain: Constrain | None = None, logprobs: int | None = None,
              **options: Any) -> Stream:
    """As `generate` (generation.py), with `ahead` guesses a pass. Raises InputError where it does."""
    check_prompt(prompt, model.config.vocab)
    chosen = settings(sampling, options)
    chosen.check(model.config.vocab)
    length = session_length(model.config, len(prompt), max_new_tokens)
    room = length - len(prompt)
    rows = RowCache(model, 1, length)
    if rows.cache.ropes:
        raise InputError("the angles of RoPE follow the length of the sequence: several tokens cannot be checked in "
                         "one pass; use generate")
    answer, finish = Answer(), Finish(stop_ids, stop, constrain, min(max_new_tokens, room),
                                      "length" if max_new_tokens <= room else "context")
    return Stream(answer, _answer(rows, answer, list(prompt), chosen, finish, guess, ahead, logprobs))


def _answer(rows: RowCache, answer: Answer, prompt: list[int], sampling: Sampling, finish: Finish, guess: Guess,
            ahead: int, logprobs: int | None) -> Generator[int, None, None]:
    try:
        draw = sampling.generator(rows.cache.device)
        finish(answer)
        if len(prompt) > 1:
            rows.read(0, prompt[:-1])
        while answer.ended is None:
            said = [*prompt, *answer.tokens]
            before = len(said) - 1                      # tokens that have been read
            guessed = guess(said, min(ahead, finish.most - len(answer.tokens) - 1))
            guessed = list(takewhile(lambda token: token < rows.model.config.vocab, guessed))
            rows.mark(0)
            logits = rows.read(0, [said[-1], *guessed], last=len(guessed) + 1)
            right = 0
            for row, guessed_one in zip(logits.split(1), [*guessed, None], strict=True):
                with torch.inference_mode():
                    tokens, scores = next_tokens(row, sampling, [prompt], [answer.tokens], finish.ids, draw,
                                                 finish.constraints)
                    if logprobs is not None:
                        answer.logprobs += logprobs_of(row, scores, tokens, logprobs)
                answer.tokens += tokens.tolist()
                finish(answer)
                yield answer.tokens[-1]
                if answer.ended is not None or answer.tokens[-1] != guessed_one:
                    break
                right += 1
            if right < len(guessed) and answer.ended is None:
                _go_back(rows, before, [said[-1], *guessed[:right]])
    finally:
        answer.ended = answer.ended or "interrupted"


def _go_back(rows: RowCache, before: int, right: list[int]) -> None:
    """Forget the guesses that were wrong."""
    if rows.rewinds:
        rows.take(0, 0, before + len(right))
    else:                                               # a scan: from where it was before the pass
        rows.take(0, 0, before)
        rows.read(0, right)
