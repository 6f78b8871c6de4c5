"""Many requests at once, each answered as if it were alone: continuous batching over the rows of one cache.

    engine = Engine(model, tokenizer, slots=8)
    one = engine.submit("Once upon a time", 64)                       # at once: a ticket
    two = engine.submit(ids, 64, temperature=0.8, seed=1)
    while engine.step():                                              # or engine.start(), and it runs in a thread
        …
    one.wait().tokens

A step is a forward pass of prompts, then one of all answers. Requests join and leave between two steps:

    step     1         2         3          4            A … Z: a token of that request's prompt, a … z: of its answer
    row 0    AAAAA a         a          a         a
    row 1              BBBB      BB b       b     b      prompts are read together, CHUNK tokens a step, so that they
    row 2              CCCC      CCCC       CC c  c      hold the answers up for no longer; who joins has equal shares

The rows that answer are always the first ones, behind them stand those that join; where one ends, the last takes its
place (Yu et al. 2022, Orca).

Rows are ragged (rows.py). A row that has ended keeps what it remembers until its place is needed. A
prompt that begins with tokens which any row has read, ended or not, takes over what that row remembers of them and
reads only the rest: the turns of a chat, a common system message, several answers to one prompt. One that begins for
more than half as a prompt that is just being read waits for that.

What holds for each request, whatever the others do:

    tokens      in float32, greedy or drawn with a seed, those of `generate` alone (of bfloat16 see generation.py)
    draws       from a source of its own
    failures    of its grammar, its stop rule, its listener, its logits: it ends with the error, the others go on

Requests wait in a queue of bounded length. The memory of the cache is asked for once, when the engine is made.
"""

import itertools
import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from nanollm.errors import InputError
from nanollm.inference.context import cache_bytes, default_context, longest_within
from nanollm.inference.generation import Constrain, Finish, Stop, check_prompt
from nanollm.inference.machine import free_memory
from nanollm.inference.rows import MARKS, RowCache, mark_bytes
from nanollm.inference.sample import Sampling, settings
from nanollm.inference.ticket import Ticket
from nanollm.model import Decoder
from nanollm.text.tokenizer import Tokenizer

CHUNK = 256             # prompt tokens a step


class Busy(InputError):
    """The queue is full."""


class Stopped(Busy):
    """The engine is closed, or was before the answer was whole."""


class TooLong(InputError):
    """A prompt that leaves no room for an answer."""


class Engine:
    """The scheduler of the head of the file. Any thread may `submit` and `cancel`; one at a time may `step`."""

    def __init__(self, model: Decoder, tokenizer: Tokenizer | None = None, slots: int = 8, length: int | None = None,
                 queue: int = 256, compiled: Sequence[int] = ()) -> None:
        """slots: answers at once; length: the most tokens of a prompt with its answer, else the model's own context as
        far as half of the free memory holds it; queue: requests that may wait; compiled: the numbers of rows that the
        model has programs for (compiled.py), of which a step takes the next larger one. The tokenizer reads prompts
        given as text, and says which tokens end an answer where a request does not.

        Raises InputError where the cache is larger than the memory that is free, before any of it is taken.
        """
        if slots < 1:
            raise InputError(f"slots {slots}: expected at least 1")
        self.model, self.tokenizer, self.slots, self.queue = model, tokenizer, slots, queue
        self.length = fitting(model, slots, length)
        self.compiled = sorted(n for n in compiled if n <= slots)
        self.rows = RowCache(model, slots, self.length)
        self.waiting: deque[Ticket] = deque()
        self.seated: list[Ticket] = []                  # row → who is answered in it, or whose prompt is read into it
        self.answering = 0                              # rows that are answered in: the first ones
        self.ended_at = [0] * slots                     # row → when it ended: those that did long ago go first
        self.counts = {"requests": 0, "failed": 0, "prompt_tokens": 0, "reused_tokens": 0, "new_tokens": 0, "steps": 0}
        self.wake, self.closed = threading.Condition(), False
        self.reason: Exception | None = None            # of those that `close` ends
        self.thread: threading.Thread | None = None

    # ---- from any thread

    def submit(self, prompt: str | Sequence[int], max_new_tokens: int, sampling: Sampling | None = None, *,
               stop_ids: Iterable[int] | None = None, stop: Callable[[], Stop] | None = None,
               constrain: Constrain | None = None, logprobs: int | None = None,
               listen: Callable[[Ticket], None] | None = None, **options: Any) -> Ticket:
        """Put a request into the queue; what it takes is what `generate` takes (generation.py).

        listen: is told the ticket after each token and once at the end, in the engine's thread, which it must not hold
        up. Raises InputError for what `generate` raises it for, TooLong, Busy for a full queue, and Stopped
        where the engine is closed.
        """
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise InputError("the prompt is text and the engine has no tokenizer; give token ids")
            prompt = self.tokenizer.encode(prompt)
        vocab, chosen, room = self.model.config.vocab, settings(sampling, options), self.length - len(prompt)
        check_prompt(prompt, vocab)
        chosen.check(vocab)
        if room < 1:
            raise TooLong(f"the prompt has {len(prompt):,} tokens, and the context holds {self.length:,} with the "
                          "answer")
        if stop_ids is None:
            stop_ids = () if self.tokenizer is None else self.tokenizer.stop_ids
        finish = Finish(stop_ids, stop, constrain, min(max_new_tokens, room),
                        "length" if max_new_tokens <= room else "context")
        ticket = Ticket(list(prompt), chosen, finish, logprobs, listen, chosen.generator(self.rows.cache.device))
        finish(ticket.answer)
        with self.wake:
            if self.closed:
                raise Stopped("the engine is closed")
            if len(self.waiting) >= self.queue:
                raise Busy(f"{len(self.waiting):,} requests wait already, as many as may; try again later")
            self.counts["requests"] += 1
            if ticket.answer.ended is None:
                self.waiting.append(ticket)
                self.wake.notify()
        if ticket.answer.ended is not None:             # no token was asked for
            ticket.end()
        return ticket

    @property
    def live(self) -> list[Ticket]:
        """Those that are answered."""
        return self.seated[: self.answering]

    @property
    def joining(self) -> list[Ticket]:
        """Those whose prompts are being read."""
        return self.seated[self.answering :]

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.waiting or self.seated)

    def start(self) -> "Engine":
        """Run in a thread of its own until `close`."""
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.thread.start()
        return self

    def close(self, error: Exception | None = None) -> None:
        """After the step that runs, let all end, interrupted or with this error, and the thread with them."""
        with self.wake:
            if not self.closed:
                self.closed, self.reason = True, error
            self.wake.notify()
        if self.thread is not None:
            self.thread.join()
        else:
            self._drop_all(self.reason)

    def _run(self) -> None:
        while True:
            with self.wake:
                self.wake.wait_for(lambda: self.closed or self.busy)
            if self.closed:
                return self._drop_all(self.reason)
            try:
                self.step()
            except Exception as error:                  # a bug of ours: nothing is known of any row
                self._drop_all(error)

    def _drop_all(self, error: Exception | None) -> None:
        with self.wake:
            tickets = [*self.seated, *self.waiting]
            self.seated, self.answering = [], 0
            self.waiting.clear()
        for row in range(self.slots):
            self.rows.clear(row, wipe=error is not None and not self.closed)
        for ticket in tickets:
            ticket.end(error)

    # ---- the steps, in one thread

    def step(self) -> bool:
        """Read up to CHUNK tokens of prompts, then write a token of each answer. False: there is nothing to do."""
        self._drop_cancelled()
        if not self.busy:
            return False
        left = CHUNK
        while 2 * left > CHUNK and self._seat():        # a pass of few tokens reads all weights, too
            left -= self._read_prompts(left)
        if self.answering:
            self._write()
        self.counts["steps"] += 1
        return True

    def _drop_cancelled(self) -> None:
        with self.wake:
            gone = [each for each in self.waiting if each.cancelled]
            for ticket in gone:
                self.waiting.remove(ticket)
        for ticket in [each for each in self.seated if each.cancelled]:
            self._leave(ticket)
            gone.append(ticket)
        for ticket in gone:
            ticket.end()

    def _seat(self) -> bool:
        """Let those in the queue join, as far as there are rows. False: nobody joins."""
        while self.waiting and len(self.seated) < self.slots and self._admit(self.waiting[0]):
            pass
        return len(self.seated) > self.answering

    def _admit(self, ticket: Ticket) -> bool:
        """Let the first in the queue join, in a row with as much as any row remembers of its prompt; but not where what
        it could take over of a prompt that is being read is more than half of what it had to read."""
        usable = [self.rows.usable(row, ticket.prompt) for row in range(self.slots)]
        soon = max((self.rows.usable_after(each.prompt, ticket.prompt) for each in self.joining), default=0)
        if 2 * (soon - max(usable)) > len(ticket.prompt) - max(usable):
            return False
        ticket.row = first_free = len(self.seated)
        with self.wake:
            self.seated.append(self.waiting.popleft())
        free = range(first_free, self.slots)
        source = max(range(self.slots), key=lambda row: (usable[row], row in free))
        ticket.reused = usable[source]
        goes_on = source in free and ticket.reused == len(self.rows.tokens[source]) > 0
        oldest = min(free, key=lambda row: (len(self.rows.tokens[row]) > 0, self.ended_at[row]))     # or an empty one
        row = source if goes_on else oldest
        self.rows.take(row, source, ticket.reused)
        self.rows.exchange(row, first_free)
        self.ended_at[row] = self.ended_at[first_free]
        self.counts["prompt_tokens"] += len(ticket.prompt)
        self.counts["reused_tokens"] += ticket.reused
        return True

    def _read_prompts(self, most: int) -> int:
        """Read equal parts of the prompts of all who join, as one pass of up to so many tokens; who has read the last
        one begins to answer. How many tokens that were, padding included."""
        joining = self.joining
        single = next((each for each in joining if each.alone or self.rows.cache.ropes), None)
        tickets = joining if single is None else [single]
        share = max(1, most // len(tickets))
        parts = [ticket.prompt[slice(*self._next_part(ticket, share))] for ticket in tickets]
        try:
            whole = [len(self.rows.tokens[each.row]) + len(part) == len(each.prompt)
                     for each, part in zip(tickets, parts, strict=True)]
            logits = self.rows.read_together(tickets[0].row, parts, whole)
        except Exception as error:
            if len(tickets) == 1:
                self._fail(tickets[0], error)
            else:                                       # nobody knows who it was: each by itself, from the beginning
                for ticket in tickets:
                    self.rows.clear(ticket.row, wipe=True)
                    ticket.alone = True
            return most
        ready = list(itertools.compress(tickets, whole))
        for ticket in ready:
            self._exchange(ticket.row, self.answering)
            self.answering += 1
        self._choose(ready, logits)
        return len(parts) * max(map(len, parts))

    def _next_part(self, ticket: Ticket, share: int) -> tuple[int, int]:
        """Where the next tokens to read of its prompt begin and end."""
        done, whole = len(self.rows.tokens[ticket.row]), len(ticket.prompt)
        if self.rows.cache.ropes:                       # or each part would have all before it read again
            return done, whole
        if done == whole - 1:
            self.rows.mark(ticket.row)
        elif not self.rows.rewinds:
            whole -= 1                                  # so that the same prompt can begin here, with a token to read
        return done, min(done + share, whole)

    def _write(self) -> None:
        """One token of each answer."""
        tickets = self.live
        lengths = [len(self.rows.tokens[ticket.row]) for ticket in tickets]
        if any(self.rows.turns(n, n + 1) for n in lengths):
            return self._write_singly(tickets)
        try:
            rows = next((n for n in self.compiled if n >= len(tickets)), len(tickets))
            idle: list[list[int]] = [[]] * (rows - len(tickets))
            logits = self.rows.read_together(0, [ticket.answer.tokens[-1:] for ticket in tickets] + idle)
        except Exception as error:
            if len(tickets) == 1:
                return self._fail(tickets[0], error)
            return self._write_singly(tickets)
        self._choose(tickets, logits)

    def _write_singly(self, tickets: list[Ticket]) -> None:
        """Where a row is to be read again from its beginning; and after a step that failed, so that it is only who
        fails alone, too, that ends with it."""
        for ticket in tickets:
            try:
                logits = self.rows.read(ticket.row, ticket.answer.tokens[-1:])
            except Exception as error:
                self._fail(ticket, error)
            else:
                self._choose([ticket], logits)

    def _choose(self, tickets: Sequence[Ticket], logits: Tensor) -> None:
        """The next token of each, from logits (n, V). One pass over all of them finds those of the greedy."""
        with torch.inference_mode():
            largest, likeliest = (found.tolist() for found in logits.float().max(-1))
        for ticket, row, value, token in zip(tickets, logits[:, None], largest, likeliest, strict=True):
            try:
                if ticket.greedy and math.isfinite(value):
                    ticket.answer.tokens.append(token)
                else:
                    ticket.choose(row)
                self.counts["new_tokens"] += 1
                ticket.finish(ticket.answer)
                if ticket.answer.ended is None:
                    ticket.tell()
            except Exception as error:
                self._fail(ticket, error)
            else:
                if ticket.answer.ended is not None:
                    self._leave(ticket)
                    ticket.end()

    def _leave(self, ticket: Ticket) -> None:
        """Let the last one that answers take its place, and the last one that joins the place of that. It stands behind
        them all, and its row keeps what it has read."""
        if ticket.row < self.answering:
            self.answering -= 1
            self._exchange(ticket.row, self.answering)
        self._exchange(ticket.row, len(self.seated) - 1)
        self.seated.pop()
        self.ended_at[ticket.row] = self.counts["steps"]

    def _exchange(self, one: int, other: int) -> None:
        """Let the tickets of two rows change places."""
        self.rows.exchange(one, other)
        seated = self.seated
        seated[one], seated[other] = seated[other], seated[one]
        seated[one].row, seated[other].row = one, other

    def _fail(self, ticket: Ticket, error: Exception) -> None:
        """End a ticket with an error; nothing is left of what it had in its row."""
        self.rows.clear(ticket.row, wipe=True)          # first: to change places leaves what is longer where it was
        self._leave(ticket)
        self.counts["failed"] += 1
        ticket.end(error)


def fitting(model: Decoder, slots: int, length: int | None) -> int:
    """The length of a row. Raises InputError where the cache does not fit into the memory that is free."""
    config, dtype, place = model.config, model.embed.weight.dtype, model.embed.weight.device
    free = free_memory(place)
    if length is None:
        length = default_context(config, dtype)
        if free is not None:
            length = longest_within(free // 2, config, dtype, length, slots)
    needed = cache_bytes(config, length, dtype, slots) + MARKS * slots * mark_bytes(config, length, dtype)
    if free is not None and needed > free:
        most = longest_within(free, config, dtype, length, slots)
        raise InputError(f"{slots} slots of {length:,} tokens: their cache takes {needed:,} bytes, and {free:,} are "
                         f"free; give fewer (--slots), or a context (--context, length) of at most {most:,} tokens")
    return length
