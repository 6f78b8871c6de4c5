"""The decoding loop: read the prompt once, then one token at a time, each from the logits of the last.

    for token in generate(model, prompt_ids, max_new_tokens=64):      # a generator: stream it, stop when you like
    generate_batch(model, [ids, other_ids], max_new_tokens=64)        # ragged prompts, no padding tokens
    Session(model, length=4096)                                       # keeps its cache between the turns of a chat

Rows of a batch do not see each other, and a row that has stopped is fed padding (position −1), which changes nothing:
a batch gives the tokens that each prompt would give alone.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from nanollm.cache import Cache
from nanollm.errors import InputError
from nanollm.inference.sample import sample
from nanollm.model import Decoder

PREFILL = 2048          # prompt tokens in one forward pass: bounds the memory of activations, not the result


class Session:
    """One sequence and its cache. A prompt that begins with all that was fed before is read only from there on."""

    def __init__(self, model: Decoder, length: int) -> None:
        """length: the most tokens, prompts and answers together."""
        self.model, self.length = model, length
        self.fed: list[int] = []
        self.cache = new_cache(model, 1, length)

    def generate(self, prompt: Sequence[int], max_new_tokens: int, *, stop_ids: Iterable[int] = (),
                 seed: int | None = None, **sampling: Any) -> Iterator[int]:
        """Yield new tokens until a stop token (which is yielded too), max_new_tokens, or the end of the session.

        sampling: temperature, top_k, top_p, min_p of `sample`. Raises InputError for an empty prompt, one that is too
        long, or a token that the model does not have.
        """
        check_prompt(prompt, self.model.config.vocab)
        if len(prompt) > self.length:
            raise InputError(f"the prompt has {len(prompt)} tokens, this session holds {self.length}")
        if not self.fed or list(prompt[: len(self.fed)]) != self.fed or len(prompt) == len(self.fed):
            self.fed, self.cache = [], new_cache(self.model, 1, self.length)
        stop, draw = set(stop_ids), generator_for(self.model, seed)
        new, room = list(prompt[len(self.fed) :]), min(max_new_tokens, self.length - len(prompt))
        for _ in range(room):
            logits = feed(self.model, torch.tensor([new], device=self.model.embed.weight.device), None, self.cache)
            self.fed += new
            new = sample(logits, generator=draw, **sampling).tolist()
            yield new[0]
            if new[0] in stop:
                return


def generate(model: Decoder, prompt: Sequence[int], max_new_tokens: int, *, stop_ids: Iterable[int] = (),
             seed: int | None = None, **sampling: Any) -> Iterator[int]:
    """Yield the tokens that follow the prompt, one by one; `Session.generate` with a session of just that length."""
    session = Session(model, len(prompt) + max_new_tokens)
    return session.generate(prompt, max_new_tokens, stop_ids=stop_ids, seed=seed, **sampling)


def generate_batch(model: Decoder, prompts: Sequence[Sequence[int]], max_new_tokens: int, *,
                   stop_ids: Iterable[int] = (), seed: int | None = None, **sampling: Any) -> list[list[int]]:
    """The tokens that follow each prompt, all prompts at once. Greedy rows equal `generate`'s, token for token."""
    for prompt in prompts:
        check_prompt(prompt, model.config.vocab)
    device, longest = model.embed.weight.device, max(len(prompt) for prompt in prompts)
    cache = new_cache(model, len(prompts), longest + max_new_tokens)
    tokens = torch.tensor([[*prompt] + [0] * (longest - len(prompt)) for prompt in prompts], device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)[:, None]
    columns = torch.arange(longest, device=device)
    positions = torch.where(columns < lengths, columns, -1)                     # (B, T), −1 behind the end of a row
    stop, draw = torch.tensor(sorted(set(stop_ids)), device=device, dtype=torch.long), generator_for(model, seed)
    running = torch.ones(len(prompts), dtype=torch.bool, device=device)
    steps: list[Tensor] = []                                                    # (B,) each, −1 where a row had stopped
    for _ in range(max_new_tokens):
        new = sample(feed(model, tokens, positions, cache), generator=draw, **sampling)
        steps.append(torch.where(running, new, -1))
        running = running & ~torch.isin(new, stop)
        if not running.any():
            break
        tokens = new[:, None]
        positions = torch.where(running[:, None], cache.lengths[:, None], -1)
    if not steps:
        return [[] for _ in prompts]
    return [[token for token in row if token >= 0] for row in torch.stack(steps, 1).tolist()]


@contextmanager
def matrix_vector(weight: Tensor) -> Iterator[None]:
    """For one token in bfloat16 on a CPU, torch's own matrix-vector product in place of oneDNN's.

    It reads the weights 1.5 × as fast; oneDNN's is made for many rows (benchmarks/generate.md). Both sum in float32.
    Elsewhere this changes nothing.
    """
    before = torch.backends.mkldnn.enabled
    enabled = before and not (weight.is_cpu and weight.dtype == torch.bfloat16)
    torch.backends.mkldnn.enabled = enabled  # type: ignore[assignment]  # torch declares its descriptor, not the bool
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


@torch.inference_mode()
def feed(model: Decoder, tokens: Tensor, positions: Tensor | None, cache: Cache) -> Tensor:
    """Run tokens (B, T) through the model; logits (B, V) of each row's last real token (of the last column if none)."""
    if tokens.numel() == 1:
        with matrix_vector(model.embed.weight):
            return model(tokens, positions, cache)[:, -1]
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
    rows = model.config.positions
    if rows is not None and length > rows + 1:           # the last new token is never read
        raise InputError(f"prompt and new tokens may be {length} long together, and the model has {rows} positions; "
                         f"ask for at most {rows + 1}")
    return Cache(model.config, batch, length, model.embed.weight.dtype, model.embed.weight.device)


def generator_for(model: Decoder, seed: int | None) -> torch.Generator | None:
    return None if seed is None else torch.Generator(model.embed.weight.device).manual_seed(seed)


def check_prompt(prompt: Sequence[int], vocab: int) -> None:
    """Raise InputError for an empty prompt or a token outside the vocabulary."""
    if len(prompt) == 0:
        raise InputError("the prompt is empty: give at least one token (a BOS token will do)")
    wrong = next((token for token in prompt if not 0 <= token < vocab), None)
    if wrong is not None:
        raise InputError(f"token {wrong} is outside the model's vocabulary of {vocab}: "
                         "tokenizer and weights do not belong together")


def stream_text(pieces: Iterable[str], stop: Sequence[str] = ()) -> Iterator[str]:
    """Pass text on, piece by piece, up to the first of the stop strings. What may be the start of one is held back."""
    held = ""
    for piece in pieces:
        held += piece
        found = [at for at in (held.find(s) for s in stop) if at >= 0]
        if found:
            yield held[: min(found)]
            return
        keep = max((n for s in stop for n in range(1, len(s)) if held.endswith(s[:n])), default=0)
        if len(held) > keep:
            yield held[: len(held) - keep]
            held = held[len(held) - keep :]
    yield held
