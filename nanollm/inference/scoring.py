"""How likely a continuation is, as the model sees it: what a choice between answers, and perplexity, are made of.

    log p(y | x) = Σ_t log softmax(z_t)[y_t]        z_t: the logits after x and y_1 … y_{t−1}
    greedy         y_t = argmax z_t at every t: decoding at temperature 0 would write y

    for index, score in scores(model, [(context_ids, continuation_ids), …]):
        score.total, score.greedy

Pairs that the model reads alike are computed once: the letters A to D after one question are one row. The rows are
sorted by length, the longest first, and as many stand in a batch as `budget` tokens hold. The end of a shorter row is
padded with position −1, which nothing sees. The head is applied to the scored places alone. Log-probabilities are
taken in float32 and summed in float64, whatever the weights are.

Shapes: B rows, T tokens, D model width, V vocabulary, n scored tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanollm.errors import InputError
from nanollm.inference.machine import free_memory
from nanollm.model import Decoder
from nanollm.text.tokenizer import Tokenizer

Pair = tuple[Sequence[int], Sequence[int]]      # context, continuation: each at least one token
LOGITS = 1 << 26                                # of logits at a time: 256 MiB in float32
MOST = {"cpu": 1 << 12, "cuda": 1 << 16}        # tokens in a batch; more fill no processor better


@dataclass(frozen=True)
class Score:
    """Of one continuation of n tokens."""
    logprobs: Tensor                            # (n,) float32, on the CPU
    greedy: bool

    @property
    def total(self) -> float:
        """log p(y | x), natural logarithm."""
        return self.logprobs.double().sum().item()


@torch.inference_mode()
def scores(model: Decoder, pairs: Sequence[Pair], budget: int | None = None) -> Iterator[tuple[int, Score]]:
    """The index and the score of each pair, in the order in which they are done.

    budget: tokens in a batch, None for what the memory holds. Where a GPU has no room after all, it is halved. Raises
    InputError for an empty context or continuation, and for a token that the model does not have.
    """
    rows: dict[tuple[int, ...], list[int]] = {}                 # what the model reads, and the pairs that it is for
    for index, pair in enumerate(pairs):
        check_pair(*pair, model.config.vocab)
        rows.setdefault((*pair[0], *pair[1][:-1]), []).append(index)
    order, at = sorted(rows, key=len, reverse=True), 0
    while at < len(order):
        longest = len(order[at])
        budget = budget or fitting(model, longest)
        batch = order[at : at + max(1, budget // longest)]
        asked = [(row, index) for row, inputs in enumerate(batch) for index in rows[inputs]]
        try:
            hidden = last_layer(model, batch)                   # (B, T, D)
            scored = torch.cat([hidden[row, len(batch[row]) - len(pairs[index][1]) : len(batch[row])]
                                for row, index in asked])       # (n, D)
            targets = torch.tensor([token for _, index in asked for token in pairs[index][1]], device=hidden.device)
            logprobs, best = likelihoods(model, scored, targets)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise InputError(f"a row of {longest:,} tokens does not fit into the memory of the GPU") from None
            budget //= 2
            continue
        lengths = [len(pairs[index][1]) for _, index in asked]
        for (_, index), own, hits in zip(asked, logprobs.split(lengths), best.split(lengths), strict=True):
            yield index, Score(own, bool(hits.all()))
        at += len(batch)


def check_pair(context: Sequence[int], continuation: Sequence[int], vocab: int) -> None:
    """Raise InputError for what cannot be scored."""
    if not context or not continuation:
        raise InputError(f"a context of {len(context)} tokens and a continuation of {len(continuation)}: "
                         "expected at least one of each")
    wrong = next((token for token in (*context, *continuation) if not 0 <= token < vocab), None)
    if wrong is not None:
        raise InputError(f"token {wrong} is outside the model's vocabulary of {vocab}: "
                         "tokenizer and weights do not belong together")


def last_layer(model: Decoder, batch: Sequence[Sequence[int]]) -> Tensor:
    """What the head reads, (B, T, D), of rows of different lengths."""
    longest, device = len(batch[0]), model.embed.weight.device
    tokens = torch.tensor([[*row, *[0] * (longest - len(row))] for row in batch], device=device)
    if len(batch[-1]) == longest:                               # sorted: all are as long
        return model.hidden(tokens)
    lengths, columns = torch.tensor([[len(row)] for row in batch], device=device), torch.arange(longest, device=device)
    return model.hidden(tokens, torch.where(columns < lengths, columns, -1))


def likelihoods(model: Decoder, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """hidden (n, D), targets (n,) → log p of each target, and whether it is the likeliest token: both (n,), on the
    CPU."""
    found = []
    for part, wanted in zip(*(each.split(max(1, LOGITS // model.config.vocab)) for each in (hidden, targets)),
                            strict=True):
        logits = model.head(part).float()                       # (n', V)
        logprobs = logits.gather(1, wanted[:, None])[:, 0] - logits.logsumexp(1)
        found.append((logprobs.cpu(), (logits.argmax(1) == wanted).cpu()))
    logprobs, best = zip(*found, strict=True)
    return torch.cat(logprobs), torch.cat(best)


def fitting(model: Decoder, longest: int) -> int:
    """Tokens for which half of the free memory is enough, at most MOST, in rows of up to `longest`.

    A token holds a few vectors as wide as the widest matrix, in float32 at worst, and, where attention keeps all
    scores, one of each head with each token of its row. This is an estimate, meant to be too high.
    """
    device = model.embed.weight.device
    free, most = free_memory(device), MOST.get(device.type, MOST["cpu"])
    if free is None:
        return most
    with torch.device("meta"):
        blank = Decoder(model.config)                           # a model that was prepared has packed its matrices
    widest = max(sum(p.shape[-2:]) for p in blank.layers.parameters() if p.ndim > 1)
    heads = max((getattr(layer.mixer, "heads", 0) for layer in model.config.layers), default=0)
    return max(1, min(most, free // 2 // (4 * (8 * widest + 2 * heads * longest))))


def start_id(tokenizer: Tokenizer) -> int:
    """The token before the first of a text, without which nothing would say how likely that one is: BOS, where there
    is one, or else the end of another text. Raises InputError where there is neither."""
    for token in (tokenizer.bos_id, tokenizer.eos_id, *tokenizer.stop_ids):
        if token is not None:
            return token
    raise InputError(f"{tokenizer.folder}: its tokenizer has neither a BOS nor an EOS token, so the first token of a "
                     "text cannot be scored")
