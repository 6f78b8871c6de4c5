"""How well a model foresees a text: perplexity, bits per byte, and the loss by place in the window.

    perplexity     exp(−1/n Σ log p(token | what the window has before it))     n tokens; depends on the tokenizer
    bits per byte  −1/(b ln 2) Σ log p                                          b bytes of UTF-8; does not
    loss at i      the mean of −log p of the tokens that have i tokens before them: where it rises, the context ends

A text is longer than what a model reads at once, so it is cut. Window W, stride S; each token is scored once:

    s            < t1 t2 t3 t4 t5 t6 t7 t8          "<" stands before the text (`start_id`) and is not scored
    W = 4, S = 4   read < t1 t2 t3    scored t1 t2 t3 t4            a token has 1 to W tokens before it
                   read t4 t5 t6 t7   scored t5 t6 t7 t8
    W = 4, S = 2   read < t1 t2 t3    scored t1 t2 t3 t4            as the harness's rolling windows, and
                   read t2 t3 t4 t5   scored t5 t6                  all but the first have W − S + 1 to W before them:
                   read t4 t5 t6 t7   scored t7 t8                  a lower loss for W / S times the work

The last window reaches back as far as the others. S = W is what llama.cpp and most papers' code do, but for which
places of a window they score.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanollm.errors import InputError
from nanollm.inference.scoring import Pair, scores
from nanollm.model import Decoder


@dataclass(frozen=True)
class Perplexity:
    """Of one text."""
    nats: Tensor            # (W,) float64, the sum of −log p of tokens with i + 1 tokens before them
    counts: Tensor          # (W,) how many those are

    @property
    def loss(self) -> float:
        """Nats per token."""
        return (self.nats.sum() / self.counts.sum()).item()

    @property
    def perplexity(self) -> float:
        """e to the loss; ∞ where that is beyond what a float can be."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def tokens(self) -> int:
        """Scored ones."""
        return int(self.counts.sum())

    def bits_per_byte(self, size: int) -> float:
        """size: bytes of the text."""
        return self.nats.sum().item() / math.log(2) / size

    def by_place(self, points: int) -> list[tuple[int, float]]:
        """The window in so many equal parts: the place of the last token of each, and the mean loss in it."""
        ends = sorted({round((i + 1) * len(self.counts) / points) for i in range(points)} - {0})
        found = []
        for begin, end in zip([0, *ends], ends, strict=False):
            if count := self.counts[begin:end].sum().item():
                found.append((end, self.nats[begin:end].sum().item() / count))
        return found


def windows(length: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(begin, first, end) over a sequence s of so many tokens: s[begin : end − 1] is read, s[first : end] is scored."""
    end = min(window + 1, length)
    yield 0, 1, end
    while end < length:
        first, end = end, min(end + stride, length)
        yield end - 1 - window, first, end


def perplexity(model: Decoder, tokens: Sequence[int], window: int, stride: int, budget: int | None = None,
               progress: Callable[[int], object] = lambda scored: None) -> Perplexity:
    """Of a text with the token before it: tokens[0] is not scored. budget: as in `scores`.

    progress is told each time how many tokens were scored. Raises InputError for less than two tokens, or a stride that
    would leave tokens out.
    """
    if len(tokens) < 2:
        raise InputError("the text is empty: there is no token to score")
    if not 1 <= stride <= window:
        raise InputError(f"stride {stride}, window {window}: expected 1 to {window}, so that each token is scored once")
    cuts = list(windows(len(tokens), window, stride))
    pairs: list[Pair] = [(tokens[begin:first], tokens[first:end]) for begin, first, end in cuts]
    nats, counts = torch.zeros(window, dtype=torch.float64), torch.zeros(window, dtype=torch.long)
    for index, score in scores(model, pairs, budget):
        begin, first, end = cuts[index]
        place = slice(first - begin - 1, end - begin - 1)
        nats[place] -= score.logprobs.double()
        counts[place] += 1
        progress(end - first)
    return Perplexity(nats, counts)
