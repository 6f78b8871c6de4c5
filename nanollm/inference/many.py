"""Answers to many prompts at once, each with how likely its tokens were: what reinforcement learns from.

The engine answers them (engine.py): several answers to one prompt read it once, and answers of unequal length do not
wait for each other. An engine remembers keys and values, and they belong to the weights that made them: here one lives
for one call, so that none outlives a step of the optimizer.
"""

from collections.abc import Collection, Sequence

from nanollm.inference.engine import Engine
from nanollm.model import Decoder

SLOTS = 32              # answers at once


def answers(model: Decoder, prompts: Sequence[Sequence[int]], seeds: Sequence[int], most: int, temperature: float,
            stop_ids: Collection[int]) -> list[tuple[list[int], list[float], bool]]:
    """(tokens, log p of each, whether it was cut) of an answer to each prompt, of at most `most` tokens.

    log p is that of the distribution which the token was drawn from: softmax(z / temperature). A stop token belongs to
    its answer. Each answer has a seed. Raises InputError where the cache does not fit into memory."""
    if not prompts:
        return []
    engine = Engine(model, slots=min(SLOTS, len(prompts)), length=max(map(len, prompts)) + most, queue=len(prompts))
    tickets = [engine.submit(prompt, most, temperature=temperature, seed=seed, stop_ids=stop_ids, logprobs=0)
               for prompt, seed in zip(prompts, seeds, strict=True)]
    while engine.step():
        pass
    found = [ticket.wait() for ticket in tickets]
    return [(answer.tokens, [each.chosen.processed for each in answer.logprobs], answer.ended != "stop")
            for answer in found]
