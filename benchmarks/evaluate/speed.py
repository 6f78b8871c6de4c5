"""How fast a prompt is read and an answer is written, and what memory that takes.

    first token      seconds from a prompt to the first token of its answer
    prefill          tokens of the prompts a second until then
    decode           tokens a second after it, all rows together
    cache            bytes of keys, values and states of all rows
    peak             the most that was held: of a GPU by torch's count, of a process by the system's (resident)

Medians of the rounds, after one that is not counted. The model is prepared as generate.py does it; beside transformers
and llama.cpp it is measured by benchmarks/generate.py.
"""

import resource
import statistics
import sys
import time
from dataclasses import dataclass

import torch

from nanollm.inference.context import cache_bytes, own_context
from nanollm.inference.generation import feed, new_cache
from nanollm.model import Decoder

CASES = ((1, 128), (1, 1024), (8, 128))         # rows, tokens of each prompt
NEW, ROUNDS = 32, 3


@dataclass(frozen=True)
class Speed:
    """Of one shape."""
    rows: int
    prompt: int
    first: float                                # seconds to the first token
    step: float                                 # seconds a token after it, of all rows
    cache: int
    peak: int

    def line(self) -> str:
        """A row of the table."""
        return (f"| {self.rows} | {self.prompt:,} | {self.first:.3f} s | {self.rows * self.prompt / self.first:,.0f} "
                f"| {self.rows / self.step:,.1f} | {self.cache / 1e6:,.1f} MB | {self.peak / 1e9:.2f} GB |")


def once(model: Decoder, tokens: torch.Tensor, new: int) -> tuple[float, float]:
    """Seconds to the first token, and for each after it."""
    cache = new_cache(model, len(tokens), tokens.shape[1] + new)
    start = time.perf_counter()
    token = feed(model, tokens, None, cache).argmax(-1, keepdim=True)
    token.tolist()                                              # a GPU is waited for
    first = time.perf_counter()
    for _ in range(new - 1):
        token = feed(model, token, None, cache).argmax(-1, keepdim=True)
        token.tolist()
    return first - start, (time.perf_counter() - first) / (new - 1)


def peak(device: torch.device) -> int:
    """Bytes, since the process began or, on a GPU, since it was last reset."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure(model: Decoder, rows: int, prompt: int, new: int = NEW, rounds: int = ROUNDS) -> Speed:
    """Of random tokens."""
    weight = model.embed.weight
    tokens = torch.randint(0, model.config.vocab, (rows, prompt), device=weight.device)
    if weight.is_cuda:
        torch.cuda.reset_peak_memory_stats(weight.device)
    once(model, tokens, new)
    first, step = (statistics.median(each) for each in zip(*(once(model, tokens, new) for _ in range(rounds)),
                                                           strict=True))
    held = cache_bytes(model.config, prompt + new, weight.dtype, rows)
    return Speed(rows, prompt, first, step, held, peak(weight.device))


def report(model: Decoder) -> None:
    """A table."""
    own = own_context(model.config)
    print("| rows | prompt | first token | prefill, tokens/s | decode, tokens/s | cache | peak memory |",
          "|--:|--:|--:|--:|--:|--:|--:|", sep="\n")
    for rows, prompt in CASES:
        if own is None or prompt + NEW <= own:
            print(measure(model, rows, prompt).line(), flush=True)
