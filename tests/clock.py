"""Bounds of time that hold on a busy machine, and on a slow one.

A bound is in seconds of the machine that it was written on. Where it is missed, a piece of work whose time there is
known is timed by the same clock: if that takes twice as long as it took there, so may everything else.
"""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
Clock = Callable[[], float]
ROUNDS = 3
PIECE = 0.1                                      # seconds that piece_of_work took there


def piece_of_work() -> dict[str, int]:
    """What Python does most: names, numbers, dictionaries."""
    found: dict[str, int] = {}
    for i in range(400_000):
        name = f"layers.{i % 1000}"
        found[name] = found.get(name, 0) + i
    return found


def slowness(clock: Clock = time.perf_counter) -> float:
    """How many times as long as there a piece of work takes here and now; at least 1."""
    start = clock()
    piece_of_work()
    return max(1.0, (clock() - start) / PIECE)


def within(seconds: float, work: Callable[[], T], clock: Clock = time.perf_counter) -> T:
    """What work() gives, in less time than that in one of three rounds: whatever else the machine does only adds.

    Raises AssertionError."""
    taken = []
    for _ in range(ROUNDS):
        start = clock()
        found = work()
        taken.append(clock() - start)
        if taken[-1] < seconds:
            return found
    allowed = seconds * slowness(clock)
    assert min(taken) < allowed, f"{min(taken):.2f} s, the quickest of {ROUNDS} rounds; {allowed:.2f} s are allowed"
    return found
