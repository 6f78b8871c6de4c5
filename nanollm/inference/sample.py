"""From logits to the next token: what changes the logits z, then the draw.

    constraint              −∞ for v that no text of a grammar goes on with           constrained.py
    logit bias              z_v + b_v
    repetition penalty θ    z_v / θ where z_v > 0, else z_v · θ      for v in prompt or answer    Keskar et al. 2019
    presence, frequency     z_v − α_p [c_v > 0] − α_f c_v            c_v: times in the answer      OpenAI's API
    no repeated n-gram      −∞ for v that would end an n-gram which prompt and answer already have
    banned                  −∞ for v, or for v that would end a banned word of several tokens
    least length            −∞ for stop tokens, until the answer has min_new_tokens
    temperature τ           p = softmax(z / τ): below 1 sharper, above 1 flatter; 0 takes the largest logit (greedy)
    top-k                   only the k most likely tokens stay                                    Fan et al. 2018
    top-p                   only the fewest tokens whose probabilities reach p stay               Holtzman et al. 2019
    min-p                   only tokens at least min_p times as likely as the likeliest stay      Nguyen et al. 2024

They apply in this order, which is that of transformers 5.23 (generation/utils.py, `_get_logits_processor`), where the
presence and frequency penalties are missing: here they come after the repetition penalty, as in vLLM. Each of the last
three keeps at least one token. arXiv: 1909.05858 §4.1, 1805.04833 §5.3, 1904.09751 §3.1, 2407.01082 §3.

Shapes: B batch, V vocabulary. All is done in float32.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import Any, Protocol

import torch
from torch import Tensor

from nanollm.errors import InputError

LARGE = 1 << 31
# field: its range, in words and as a test. The smallest temperature and penalty keep z / τ a finite float32.
RANGES = {
    "temperature": ("0 (greedy), or 0.000001 to 100", lambda x: x == 0 or 1e-6 <= x <= 100),
    "top_p": ("more than 0, at most 1", lambda x: 0 < x <= 1),
    "min_p": ("0 to 1", lambda x: 0 <= x <= 1),
    "repetition_penalty": ("0.01 to 100; 1 is none", lambda x: 0.01 <= x <= 100),
    "presence_penalty": ("-2 to 2; 0 is none", lambda x: -2 <= x <= 2),
    "frequency_penalty": ("-2 to 2; 0 is none", lambda x: -2 <= x <= 2),
}
WHOLE = {"top_k": (1, LARGE), "no_repeat_ngram": (0, LARGE), "min_new_tokens": (0, LARGE), "seed": (0, 2**64 - 1)}


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; greedy as it stands. Raises InputError with the field, its value and its range."""
    temperature: float = 0.0                    # 0.7
    top_k: int | None = None                    # 40; None: all
    top_p: float | None = None                  # 0.95
    min_p: float | None = None                  # 0.05
    repetition_penalty: float = 1.0             # 1.1; over prompt and answer
    presence_penalty: float = 0.0               # 0.5; over the answer, once a token
    frequency_penalty: float = 0.0              # 0.5; over the answer, each time
    no_repeat_ngram: int = 0                    # 3: no three tokens in a row twice; 0: as often as it likes
    min_new_tokens: int = 0                     # 20; a stop text may still end the answer before
    logit_bias: Mapping[int, float] = field(default_factory=dict)       # {50256: -100.0}; -100 all but bans
    banned: Collection[int | Sequence[int]] = ()                        # [13, (464, 3290)]: ids, words of several ids
    seed: int | None = None                     # 1234 makes the draw repeatable

    def __post_init__(self) -> None:
        for name, (words, holds) in RANGES.items():
            value = getattr(self, name)
            if not (value is getattr(Sampling, name) or isinstance(value, Real) and holds(value)):
                raise InputError(f"{name} {value!r}: expected {words}")
        for name, (low, high) in WHOLE.items():
            value = getattr(self, name)
            if not (value is getattr(Sampling, name) or isinstance(value, Integral) and low <= int(value) <= high):
                raise InputError(f"{name} {value!r}: expected a whole number from {low} to {high}")
        for token, bias in self.logit_bias.items():
            if not (isinstance(bias, Real) and math.isfinite(bias) and -100 <= bias <= 100):
                raise InputError(f"logit_bias {bias!r} of token {token!r}: expected -100 to 100")
        for token in self.tokens():
            if not isinstance(token, Integral):
                raise InputError(f"{token!r} in logit_bias or banned: expected a token id")
        if any(not word for word in self.words()):
            raise InputError("banned has an empty word: expected token ids, or words of at least one id")

    def words(self) -> list[tuple[int, ...]]:
        """What is banned, each as the ids of a word."""
        return [tuple(word) if isinstance(word, Sequence) else (word,) for word in self.banned]

    def tokens(self) -> Iterator[int]:
        """All tokens that it names."""
        yield from self.logit_bias
        for word in self.words():
            yield from word

    def check(self, vocab: int) -> None:
        """Raise InputError for a token that a model of so many tokens does not have."""
        for token in self.tokens():
            if not 0 <= token < vocab:
                raise InputError(f"logit_bias or banned names token {token}; the model has 0 to {vocab - 1}")

    def generator(self, device: torch.device) -> torch.Generator | None:
        """The source of the draws; None, torch's own, without a seed."""
        return None if self.seed is None else torch.Generator(device).manual_seed(int(self.seed))


class Constraint(Protocol):
    """What one answer is held to, a grammar for instance; it knows the tokens that it has accepted."""

    def mask(self, logits: Tensor) -> Tensor:
        """Logits (V,) with −∞ at the tokens that may not come next."""
        ...

    def accept(self, token: int) -> bool:
        """Take the token that was chosen. True: the answer is complete, and nothing may follow."""
        ...


def settings(sampling: Sampling | None, options: Mapping[str, Any]) -> Sampling:
    """`sampling`, changed by options that have the names of its fields."""
    return replace(sampling or Sampling(), **options)


def next_tokens(logits: Tensor, sampling: Sampling, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]],
                stop_ids: Collection[int] = (), generator: torch.Generator | None = None,
                constraints: Sequence[Constraint] = ()) -> tuple[Tensor, Tensor]:
    """Logits (B, V) → tokens (B,) int64, and what they were drawn from: log p without its constant, float32 (B, V).

    prompts, answers: what each row has been given and has said so far. constraints: one a row, or none at all. Raises
    InputError where the logits are not finite, and where nothing is left to choose from.
    """
    scores = logits.float()
    if constraints:
        scores = torch.stack([each.mask(row) for each, row in zip(constraints, scores, strict=True)])
    scores = processed(scores, sampling, prompts, answers, stop_ids)
    best, tokens = scores.max(-1)               # one pass for the check and the greedy choice
    if not best.isfinite().all():
        raise InputError(why_none(logits))
    if sampling.temperature != 0:
        tokens = torch.multinomial(scores.softmax(-1), 1, generator=generator)[:, 0]
    return tokens, scores


def why_none(logits: Tensor) -> str:
    """What to say where logits (B, V) gave a row no token."""
    if logits.float().amax(-1).isfinite().all():
        return "no token is left to choose: banned, no_repeat_ngram, min_new_tokens and a constraint rule out every one"
    message = f"the model's logits, {str(logits.dtype).removeprefix('torch.')}, are infinite or not a number"
    if logits.dtype == torch.float16:
        return f"{message}: float16 ends at 65504; load the model in bfloat16 or float32"
    return f"{message}: its weights are damaged, or it was trained to where it diverged"


def processed(logits: Tensor, sampling: Sampling, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]],
              stop_ids: Collection[int] = ()) -> Tensor:
    """Logits (B, V) float32 after all lines of the table at the head of the file."""
    s = sampling
    if s.logit_bias:
        bias = torch.zeros_like(logits[0])
        bias[[*s.logit_bias]] = torch.tensor([*s.logit_bias.values()]).to(bias)
        logits = logits + bias
    if s.repetition_penalty != 1:
        logits = penalize_repetition(logits, [[*p, *a] for p, a in zip(prompts, answers, strict=True)],
                                     s.repetition_penalty)
    if s.presence_penalty or s.frequency_penalty:
        count = counts(answers, logits)
        logits = logits - s.presence_penalty * (count > 0) - s.frequency_penalty * count
    if s.no_repeat_ngram or s.banned or s.min_new_tokens:
        logits = logits.clone()
        words, stops = s.words(), [token for token in stop_ids if 0 <= token < logits.shape[-1]]
        for row, prompt, answer in zip(logits, prompts, answers, strict=True):
            said = [*prompt, *answer]
            row[[*ends_of_ngrams(said, s.no_repeat_ngram), *ends_of_words(said, words)]] = -torch.inf
            if len(answer) < s.min_new_tokens:
                row[stops] = -torch.inf
    if s.temperature == 0:
        return logits
    return keep_likely(logits / s.temperature, s.top_k, s.top_p, s.min_p)


def penalize_repetition(logits: Tensor, rows: Sequence[Sequence[int]], penalty: float) -> Tensor:
    """Logits (B, V), those of the tokens that stand in their row made less likely where the penalty is above 1."""
    seen = counts(rows, logits) > 0
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def counts(rows: Sequence[Sequence[int]], logits: Tensor) -> Tensor:
    """How often each token stands in each row, (B, V) float32, like the logits."""
    found = [torch.tensor(row, dtype=torch.long).bincount(minlength=logits.shape[-1]) for row in rows]
    return torch.stack(found).to(logits)


def ends_of_ngrams(said: Sequence[int], n: int) -> Iterator[int]:
    """The tokens that would end an n-gram which is already there. n = 3: after 5 6 7 … 5 6 that is 7."""
    if n > 0 and len(said) >= n:
        begun = list(said[len(said) - n + 1 :])
        for at in range(len(said) - n + 1):
            if list(said[at : at + n - 1]) == begun:
                yield said[at + n - 1]


def ends_of_words(said: Sequence[int], words: Iterable[tuple[int, ...]]) -> Iterator[int]:
    """The last token of each word whose other tokens are the last that were said."""
    for word in words:
        if len(word) - 1 <= len(said) and tuple(said[len(said) - len(word) + 1 :]) == word[:-1]:
            yield word[-1]


def keep_likely(logits: Tensor, top_k: int | None = None, top_p: float | None = None,
                min_p: float | None = None) -> Tensor:
    """Logits (B, V) with −∞ at the tokens that the filters drop."""
    if top_k is not None:
        smallest = logits.topk(min(top_k, logits.shape[-1]), -1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p is not None:
        ordered, index = logits.sort(-1)                                        # least likely first, the likeliest last
        dropped = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
        dropped[:, -1] = False
        logits = logits.masked_fill(dropped.scatter(-1, index, dropped), -torch.inf)
    if min_p is not None:
        p = logits.softmax(-1)
        logits = logits.masked_fill(p < min_p * p.amax(-1, keepdim=True), -torch.inf)
    return logits
