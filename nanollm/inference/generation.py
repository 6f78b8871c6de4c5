"""The decoding loop: read the prompt once, then one token at a time, each from the logits of the last.

    for token in generate(model, prompt_ids, 64, temperature=0.7):    # an iterator: stream it, stop when you like
    generate_batch(model, [ids, other_ids], 64)                       # ragged prompts, no padding tokens
    Session(model, length=4096)                                       # keeps its cache between the turns of a chat

What all three take: `sampling`, or its fields by name (sample.py); and by name

    stop_ids    tokens that end an answer, and belong to it
    stop        makes a function for each answer, that is told each token and says whether it ends there; for stop
                texts `lambda: StopText(tokenizer.stream(), ["\\n\\n"])`
    constrain   makes a `Constraint` (sample.py) for each answer, that rules tokens out and says where the answer is
                complete, as a grammar does (constrained.py)
    logprobs    likeliest tokens that are told at each place beside the chosen one (answer.py); None: no
                log-probabilities at all

Rows of a batch do not see each other, and a row that has stopped is fed padding (position −1), which changes nothing.
In float32, greedy, a batch gives the tokens that each prompt would give alone. In bfloat16 and float16 it need not: a
product of several rows is summed in another order than one of a single row, and a sum rounded to 8 or 11 bits can tip
a close choice. What is drawn with a seed depends on the whole batch in any dtype: the rows share one source of draws.

Models may be used from several threads at once; a session belongs to one. On a CPU a model decodes faster after
`prepare(model)` (prepare.py).
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from nanollm.cache import Cache
from nanollm.config.positions import places
from nanollm.errors import InputError
from nanollm.inference.answer import Answer, Ended, Stream, logprobs_of
from nanollm.inference.sample import Constraint, Sampling, next_tokens, settings
from nanollm.model import Decoder

PREFILL = 2048          # prompt tokens in one forward pass: bounds the memory of activations, not the result
Stop = Callable[[int], bool]            # is told each new token of one answer; True ends it
Constrain = Callable[[], Constraint]


class Session:
    """One sequence and its cache. A prompt that begins with all that was fed before is read only from there on.

    Whatever ends an answer, and wherever (an interrupt, no memory), the next one is right: where a step did not come to
    its end, the session begins anew.
    """

    def __init__(self, model: Decoder, length: int) -> None:
        """length: the most tokens, prompts and answers together."""
        self.model, self.length = model, length
        self.cache = new_cache(model, 1, length)
        self.fed: list[int] = []                                # what the cache holds; empty: of no more use
        self.newest: Answer | None = None                       # the only one that may go on

    def generate(self, prompt: Sequence[int], max_new_tokens: int, sampling: Sampling | None = None, *,
                 stop_ids: Iterable[int] = (), stop: Callable[[], Stop] | None = None,
                 constrain: Constrain | None = None, logprobs: int | None = None, **options: Any) -> Stream:
        """The new tokens, until a stop (whose token is among them), max_new_tokens, or the end of the session.

        Raises InputError for an empty prompt, one that is too long, a token that the model does not have, or an option
        out of its range; and from an answer that is asked to go on after a newer one of this session has begun.
        """
        check_prompt(prompt, self.model.config.vocab)
        if len(prompt) > self.length:
            raise InputError(f"the prompt has {len(prompt)} tokens, this session holds {self.length}")
        chosen = settings(sampling, options)
        chosen.check(self.model.config.vocab)
        answer, room = Answer(), self.length - len(prompt)
        finish = Finish(stop_ids, stop, constrain, min(max_new_tokens, room),
                        "length" if max_new_tokens <= room else "context")
        return Stream(answer, self._answer(answer, list(prompt), chosen, finish, logprobs))

    def _answer(self, answer: Answer, prompt: list[int], sampling: Sampling, finish: "Finish",
                logprobs: int | None) -> Generator[int, None, None]:
        try:
            self.newest = answer
            if not self.fed or prompt[: len(self.fed)] != self.fed or len(prompt) == len(self.fed):
                self._begin()
            known, draw = self.fed, sampling.generator(self.cache.device)
            new = prompt[len(known) :]
            finish(answer)
            while answer.ended is None:
                if self.newest is not answer:
                    raise InputError("a newer answer of this session has begun, so this one cannot go on; "
                                     "take one session for each of two answers at a time")
                self.fed = []                   # until the step is done: an exception may come between any two lines
                logits = feed(self.model, torch.tensor([new], device=self.cache.device), None, self.cache)
                known += new
                self.fed = known
                tokens, scores = next_tokens(logits, sampling, [prompt], [answer.tokens], finish.ids, draw,
                                             finish.constraints)
                new = tokens.tolist()
                answer.tokens += new
                if logprobs is not None:
                    answer.logprobs += logprobs_of(logits, scores, tokens, logprobs)
                finish(answer)
                yield new[0]
        finally:
            answer.ended = answer.ended or "interrupted"

    def _begin(self) -> None:
        """Forget all that was fed. The old memory is given back before the new is asked for."""
        self.fed = []
        self.cache.states = []
        self.cache = new_cache(self.model, 1, self.length)


class Finish:
    """Says of one answer, after each token, whether and why it ends there."""

    def __init__(self, stop_ids: Iterable[int], stop: Callable[[], Stop] | None, constrain: Constrain | None,
                 most: int, full: Ended) -> None:
        """most: tokens; full: why an answer with so many ends."""
        self.ids, self.stop, self.most, self.full = set(stop_ids), stop and stop(), most, full
        self.constraints = [constrain()] if constrain else []                   # one or none

    def __call__(self, answer: Answer) -> None:
        """Set `answer.ended` where it ends. To be called for each token, and once before the first."""
        last = answer.tokens[-1] if answer.tokens else None
        stops = last is not None and self.stop is not None and self.stop(last)  # these two hear of every token
        complete = last is not None and any(each.accept(last) for each in self.constraints)
        if stops or complete or last in self.ids:
            answer.ended = "stop"
        elif len(answer.tokens) >= self.most:
            answer.ended = self.full


def generate(model: Decoder, prompt: Sequence[int], max_new_tokens: int, sampling: Sampling | None = None, *,
             stop_ids: Iterable[int] = (), stop: Callable[[], Stop] | None = None,
             constrain: Constrain | None = None, logprobs: int | None = None, **options: Any) -> Stream:
    """The tokens that follow the prompt, one by one; `Session.generate` with a session of just that length."""
    return Session(model, len(prompt) + max_new_tokens).generate(
        prompt, max_new_tokens, sampling, stop_ids=stop_ids, stop=stop, constrain=constrain, logprobs=logprobs,
        **options)


def generate_batch(model: Decoder, prompts: Sequence[Sequence[int]], max_new_tokens: int,
                   sampling: Sampling | None = None, **how: Any) -> list[list[int]]:
    """The tokens that follow each prompt, all prompts at once; `answer_batch` without the rest of what it tells."""
    return [answer.tokens for answer in answer_batch(model, prompts, max_new_tokens, sampling, **how)]


def answer_batch(model: Decoder, prompts: Sequence[Sequence[int]], max_new_tokens: int,
                 sampling: Sampling | None = None, *, samples: int = 1, stop_ids: Iterable[int] = (),
                 stop: Callable[[], Stop] | None = None, constrain: Constrain | None = None,
                 logprobs: int | None = None, **options: Any) -> list[Answer]:
    """Answers to all prompts at once, `samples` to each: those to the first prompt, those to the second, …

    Greedy answers in float32 equal `generate`'s, token for token; the head of the file says what holds elsewhere.
    """
    vocab, chosen = model.config.vocab, settings(sampling, options)
    chosen.check(vocab)
    if samples < 1:
        raise InputError(f"samples {samples}: expected at least 1")
    for prompt in prompts:
        check_prompt(prompt, vocab)
    rows = [list(prompt) for prompt in prompts for _ in range(samples)]
    if not rows:
        return []
    device, longest, stops = model.embed.weight.device, max(map(len, rows)), set(stop_ids)
    cache, draw = new_cache(model, len(rows), longest + max_new_tokens), chosen.generator(device)
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)[:, None]
    columns = torch.arange(longest, device=device)
    positions = torch.where(columns < lengths, columns, -1)                     # (B, T), −1 behind the end of a row
    answers = [Answer() for _ in rows]
    finishes = [Finish(stops, stop, constrain, max_new_tokens, "length") for _ in rows]
    for answer, finish in zip(answers, finishes, strict=True):
        finish(answer)
    while live := [row for row, answer in enumerate(answers) if answer.ended is None]:
        logits = feed(model, tokens, positions, cache)[live]                    # what padding gives is drawn by no one
        new, scores = next_tokens(logits, chosen, [rows[row] for row in live], [answers[row].tokens for row in live],
                                  stops, draw, [each for row in live for each in finishes[row].constraints])
        likely = logprobs_of(logits, scores, new, logprobs) if logprobs is not None else []
        for at, (row, token) in enumerate(zip(live, new.tolist(), strict=True)):
            answers[row].tokens.append(token)
            answers[row].logprobs += likely[at : at + 1]
            finishes[row](answers[row])
        tokens = torch.tensor([answer.tokens[-1:] for answer in answers], device=device)
        running = torch.tensor([[answer.ended is None] for answer in answers], device=device)
        positions = torch.where(running, cache.lengths[:, None], -1)
    return answers


@torch.inference_mode()
def feed(model: Decoder, tokens: Tensor, positions: Tensor | None, cache: Cache) -> Tensor:
    """Run tokens (B, T) through the model; logits (B, V) of each row's last real token (of the last column if none)."""
    last = None
    for at in range(0, tokens.shape[1], PREFILL):
        part = slice(at, at + PREFILL)
        places = None if positions is None else positions[:, part]
        hidden = model.hidden(tokens[:, part], places, cache)                   # (B, T, D)
        if places is None:
            last = hidden[:, -1]
            continue
        real = places >= 0
        index = (real * torch.arange(real.shape[1], device=real.device)).amax(1)
        here = hidden[torch.arange(len(index), device=real.device), index]
        last = here if last is None else torch.where(real.any(1, keepdim=True), here, last)
    return model.head(last)


def new_cache(model: Decoder, batch: int, length: int) -> Cache:
    """An empty cache on the model's device. Raises InputError where a learned table of positions is too short."""
    rows = places(model.config.positions)
    if rows is not None and length > rows + 1:           # the last new token is never read
        raise InputError(f"prompt and new tokens may be {length} long together, and the model has {rows} positions; "
                         f"ask for at most {rows + 1}")
    return Cache(model.config, batch, length, model.embed.weight.dtype, model.embed.weight.device)


def check_prompt(prompt: Sequence[int], vocab: int) -> None:
    """Raise InputError for an empty prompt or a token outside the vocabulary."""
    if len(prompt) == 0:
        raise InputError("the prompt is empty: give at least one token (a BOS token will do)")
    wrong = next((token for token in prompt if not 0 <= token < vocab), None)
    if wrong is not None:
        raise InputError(f"token {wrong} is outside the model's vocabulary of {vocab}: expected 0 to {vocab - 1}; "
                         "where a tokenizer wrote it, tokenizer and weights do not belong together")


class TextStream(Protocol):
    """Turns tokens into text as they come: `Tokenizer.stream()`."""

    def push(self, id: int) -> str:
        """The text that this token completes."""
        ...


class StopText:
    """Ends an answer whose text has one of the stop strings: `StopText(tokenizer.stream(), ["\\n\\n"])`.

    The answer keeps the token that completed the string; `stream_text` cuts the text off before the string.
    """

    def __init__(self, stream: TextStream, texts: Sequence[str]) -> None:
        if "" in texts:
            raise InputError("a stop text is empty; expected at least one character")
        self.stream, self.texts, self.tail = stream, texts, ""
        self.kept = max(map(len, texts), default=1) - 1         # characters that may be the start of a string

    def __call__(self, token: int) -> bool:
        tail = self.tail + self.stream.push(token)
        self.tail = tail[max(len(tail) - self.kept, 0) :]
        return any(text in tail for text in self.texts)


def stream_text(pieces: Iterable[str], stop: Sequence[str] = ()) -> Iterator[str]:
    """Pass text on, piece by piece, up to the first of the stop strings. What may be the start of one is held back."""
    until = UpTo(stop)
    for piece in pieces:
        if text := until.push(piece):
            yield text
        if until.over:
            return
    yield until.held


class UpTo:
    """Text up to the first of the stop strings, for who is handed the pieces: push(piece) → what may be passed on."""

    def __init__(self, stop: Sequence[str]) -> None:
        self.stop, self.over = stop, False
        self.held = ""                                          # it may be the start of a string; at the end it is text

    def push(self, piece: str) -> str:
        held = self.held + piece
        found = [at for at in (held.find(s) for s in self.stop) if at >= 0]
        self.over = bool(found)
        kept = max((n for s in self.stop for n in range(1, len(s)) if held.endswith(s[:n])), default=0)
        end = min(found) if found else len(held) - kept
        self.held = "" if found else held[end:]
        return held[:end]
