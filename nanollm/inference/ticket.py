"""A request in an engine (engine.py): what was asked, and what has come of it so far.

    ticket = engine.submit("Once upon a time", 64)
    ticket.wait().tokens                                # or ticket.cancel(), from any thread

Shapes: V vocabulary.
"""

import threading
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from nanollm.inference.answer import Answer, logprobs_of
from nanollm.inference.generation import Finish
from nanollm.inference.sample import Sampling, next_tokens

GREEDY = Sampling()


class Ticket:
    """A request in an engine, and what has come of it so far."""

    def __init__(self, prompt: list[int], sampling: Sampling, finish: Finish, logprobs: int | None,
                 listen: "Callable[[Ticket], None] | None", draw: torch.Generator | None) -> None:
        self.prompt, self.sampling, self.finish, self.logprobs = prompt, sampling, finish, logprobs
        self.listen, self.draw = listen, draw
        self.answer = Answer()
        self.error: Exception | None = None             # why it ended, where it failed
        self.row = -1                                   # while its prompt is read or its answer is written
        self.reused = 0                                 # tokens of the prompt that a row had read before
        self.cancelled = False
        self.alone = False                              # read by itself: a pass with others has failed
        self.greedy = not finish.constraints and logprobs is None and replace(sampling, seed=None) == GREEDY
        self.done = threading.Event()

    def cancel(self) -> None:
        """End it at the next step; its answer is "interrupted"."""
        self.cancelled = True

    def wait(self, seconds: float | None = None) -> Answer:
        """The whole answer, once it is there. Raises what it failed with."""
        if not self.done.wait(seconds):
            raise TimeoutError(f"no answer after {seconds} s")
        if self.error is not None:
            raise self.error
        return self.answer

    @torch.inference_mode()
    def choose(self, logits: Tensor) -> None:
        """Its next token, from logits (1, V), as its sampling and its grammar say."""
        answer, finish = self.answer, self.finish
        tokens, scores = next_tokens(logits, self.sampling, [self.prompt], [answer.tokens], finish.ids, self.draw,
                                     finish.constraints)
        if self.logprobs is not None:                       # before the token: another thread may look at any moment
            answer.logprobs += logprobs_of(logits, scores, tokens, self.logprobs)
        answer.tokens += tokens.tolist()

    def tell(self) -> None:
        """Tell the listener that there is a token more, or the end."""
        if self.listen is not None:
            self.listen(self)

    def end(self, error: Exception | None = None) -> None:
        """It is over, and if nothing else has ended it, interrupted."""
        self.answer.ended, self.error = self.answer.ended or "interrupted", error
        self.done.set()
        try:
            self.tell()
        except Exception as failed:                     # a listener that breaks at the end hurts nobody
            self.error = self.error or failed
