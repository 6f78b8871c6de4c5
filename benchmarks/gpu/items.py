"""What a part of a session is made of: items, each under a limit of time, each result written when it is there.

A part is a function of a Setting that yields items. It runs in a process of its own (`run`), which appends to
PART.jsonl in the output folder, a line when an item begins and a line when it ends:

    {"item": "attend 2 x 8192", "state": "begun"}
    {"item": "attend 2 x 8192", "state": "done", "seconds": 3.1, "row": {…}}
    … "state": "so far"         a first row of an item that goes on
    … "state": "failed"         with "error", a traceback; or "out of time"

So whatever ends the process, the file says how far it came. A GPU that has met an illegal address answers every later
call of that process with the same error, and an item that is interrupted may leave a library half imported: then the
process ends with POISONED, and the next one goes on behind the item.
"""

import contextlib
import importlib
import os
import signal
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from benchmarks.gpu.lines import POISONED, append, ended, lines

Row = dict[str, Any]
Tell = Callable[[Row], None]
LEAST = 2.0                                 # seconds: with less left no item is begun


class OutOfTime(BaseException):
    """An item had its time. No Exception: what code under test catches must not catch this."""


@dataclass(frozen=True)
class Item:
    """run is given a function for rows before the last. An item named "X | Y" adds to the row of X."""
    name: str
    run: Callable[[Tell], Row]
    seconds: float = 60.0                   # at most


@dataclass(frozen=True)
class Setting:
    """Where the results go, until when (time.time()), and whether this is a dry run: tiny, on the CPU."""
    out: Path
    deadline: float
    dry: bool

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry else "cuda")

    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.time()

    def rows(self, part: str) -> list[Row]:
        """What a part of this session has found."""
        return [line["row"] for line in ended(lines(self.out / f"{part}.jsonl")).values() if "row" in line]


@contextlib.contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTime inside the block when its time is over, as soon as Python is asked."""
    def over(number, frame):
        raise OutOfTime(f"after {seconds:.0f} seconds")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def poisoned() -> bool:
    """Whether the GPU answers this process with an error, whatever is asked."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def be_child(part: str, out: Path, deadline: float, dry: bool) -> NoReturn:
    """This process runs a part, and ends at once: what libraries do at the end can wait for a spoilt GPU."""
    code = 0
    die_with_parent()
    try:
        run(part, Setting(out, deadline, dry))
    except SystemExit as end:
        code = POISONED if end.code == POISONED else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run(part: str, setting: Setting) -> None:
    """Run what a part has not done yet. Ends with POISONED where another process has to go on."""
    torch.manual_seed(0)
    file = setting.out / f"{part}.jsonl"
    done = {name for name, line in ended(lines(file)).items() if line["state"] != "begun"}
    for item in importlib.import_module(f"benchmarks.gpu.{part}").items(setting):
        if item.name in done:
            continue
        if setting.left() < LEAST:
            append(file, item.name, "no time")
            continue
        append(file, item.name, "begun")
        start, spoilt = time.time(), False
        try:
            with limit(setting.left() if setting.dry else min(item.seconds, setting.left())):
                row = item.run(lambda row, name=item.name: append(file, name, "so far", row=row))
            append(file, item.name, "done", seconds=round(time.time() - start, 2), row=row)
        except OutOfTime as over:
            append(file, item.name, "out of time", error=str(over))
            spoilt = True
        except Exception:
            append(file, item.name, "failed", error=traceback.format_exc())
        if (spoilt or poisoned()) and setting.left() > LEAST:
            sys.exit(POISONED)


def die_with_parent() -> None:
    """End this process and all that it started when the one that started it is gone."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.killpg(0, signal.SIGKILL)

    if os.getpgrp() == os.getpid():                             # a group of our own: nobody else is in it
        threading.Thread(target=watch, daemon=True).start()


def clock(call: Callable[[], object], device: torch.device, repeats: int = 20) -> float:
    """Seconds of one call, the median, after three calls that are not counted."""
    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    taken = []
    for _ in range(3 + repeats):
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[3:])
