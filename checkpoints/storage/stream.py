"""Moving weights: from a file to memory, from memory to a file, from a file to a file, a few megabytes at a time.

    read     stored tensor → piece of ours        write    piece of ours → stored tensor        copy     stored → stored

A piece (names/ops.py) is cut into runs that fit a buffer. What needs no cast and lies in one stretch of memory is read
straight into it. Each run is checked as it passes: a NaN or an infinity is an error with the tensor's name, never
judged by logits, as PyTorch's fused attention turns a NaN in q or k into finite numbers on a CPU.
"""

import dataclasses
import itertools
import math
import os
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from checkpoints.names.ops import Beside, Piece
from checkpoints.names.table import Step, short
from checkpoints.storage.files import Stored, same_bits
from checkpoints.storage.gguf_writing import Target
from nanollm.errors import CheckpointError

RUN = 1 << 19                                    # elements of a run: the processor's cache holds it from read to write
WAITING = 1                                      # runs that are read before they are written
CACHED = 1 << 24                                 # bytes that are written before the system's cache gives them up


def runs(piece: Piece, most: int = RUN) -> Iterator[Piece]:
    """The piece cut by rows, then within a row, into parts of at most `most` elements. A row of a Beside stays one."""
    if piece.numel() <= most or (isinstance(piece, Beside) and len(piece) == 1):
        yield piece
    elif isinstance(piece, Tensor) and len(piece) == 1:
        yield from runs(piece[0], most)
    else:
        rows = max(1, most * len(piece) // piece.numel())
        for at in range(0, len(piece), rows):
            yield from runs(piece[at : at + rows], most)


def read(stored: Stored, first: int, piece: Piece, name: str) -> int:
    """Fill a piece with the elements of a stored tensor from the first-th on; return which comes next.

    Raises CheckpointError if one of them is not finite in the dtype of the piece, or the file has ended."""
    for part in runs(piece):
        dtype = (part.views[0] if isinstance(part, Beside) else part).dtype
        if isinstance(part, Tensor) and part.is_cpu and part.is_contiguous() and stored.run_dtype(dtype) == dtype:
            stored.read_run(first, part.view(-1))
            need_finite(name, part, f"{stored.file}: ")
        else:
            run = torch.empty(part.numel(), dtype=stored.run_dtype(dtype))
            stored.read_run(first, run)
            run = run.to(dtype)
            need_finite(name, run, f"{stored.file}: ")
            part.copy_(run if isinstance(part, Beside) else run.view(part.shape))
        first += part.numel()
    return first


class Writer:
    """Writes runs on a thread of its own: each while the next one is read and checked.

    Use it inside `with`; at its end all is written, though not yet forced to disk. A run must not be changed after it
    was handed over. Raises OSError, for this run or one before it.

    What was written does not stay in the system's cache: so the disk begins at once, and a conversion pushes nothing
    else out of memory. It is also faster, as the same pages are used again and again: on a virtual machine new pages
    cost more (benchmarks/convert.md)."""

    def __enter__(self) -> "Writer":
        self.thread = ThreadPoolExecutor(1)
        self.waiting: deque[Future[None]] = deque()
        self.path: Path | None = None            # of the open file, self.file
        self.cached = 0                          # bytes of it that the system's cache still has
        return self

    def __call__(self, stored: Stored, first: int, run: Tensor) -> None:
        """Put a run, contiguous, on the CPU and of the tensor's dtype, into the tensor from its first-th element on."""
        self.waiting.append(self.thread.submit(self._put, stored, first, run))
        if len(self.waiting) > WAITING:
            self.waiting.popleft().result()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.thread.shutdown(cancel_futures=kind is not None)
        self._close()
        if kind is None:
            self.drain()

    def drain(self) -> None:
        """Wait until all is written, and no run is held any more."""
        while self.waiting:
            self.waiting.popleft().result()

    def _put(self, stored: Stored, first: int, run: Tensor) -> None:
        if stored.file != self.path:
            self._close()
            self.path, self.file, self.cached = stored.file, os.open(stored.file, os.O_WRONLY), 0
        place, left = stored.packed(first, run)
        while left:                              # a call may write less than it was given
            done = os.pwrite(self.file, left, place)
            left, place = left[done:], place + done
        self.cached += run.nbytes
        if self.cached >= CACHED and hasattr(os, "posix_fadvise"):       # Linux: written pages leave the cache
            os.posix_fadvise(self.file, 0, 0, os.POSIX_FADV_DONTNEED)
            self.cached = 0

    def _close(self) -> None:
        if self.path is not None:
            os.close(self.file)
            self.path = None


def write(stored: Stored, first: int, piece: Piece, name: str, out: Writer) -> int:
    """Put a piece where a stored tensor lies, from its first-th element on; return which comes next."""
    for part in runs(piece):
        run = (part.dense() if isinstance(part, Beside) else part).to("cpu", stored.dtype).contiguous()
        need_finite(name, run)
        out(stored, first, run)
        first += part.numel()
    return first


class Ring:
    """Memory for runs, used again and again, as new pages would cost as much as the copying.

    A run that it gives is good for WAITING more rounds."""

    def __init__(self) -> None:
        count = 2 * (WAITING + 2)                # memory is taken when it is touched
        self.memory = itertools.cycle([torch.empty(8 * RUN, dtype=torch.uint8) for _ in range(count)])

    def run(self, count: int, dtype: torch.dtype) -> Tensor:
        """Memory for a run of so many elements."""
        return next(self.memory)[: count * dtype.itemsize].view(dtype)

    def runs_of(self, stored: Stored, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        """(first element, run) of a stored tensor from end to end, as dtype."""
        count = math.prod(stored.shape)
        for first in range(0, count, RUN):
            run = self.run(min(RUN, count - first), stored.run_dtype(dtype))
            stored.read_run(first, run)
            yield first, run if run.dtype == dtype else self.run(len(run), dtype).copy_(run)


def copy(source: Stored, target: Stored, name: str, ring: Ring, out: Writer) -> None:
    """A stored tensor into the place of another of its shape, cast if need be."""
    for first, run in ring.runs_of(source, target.dtype):
        need_finite(name, run, f"{source.file}: ")
        out(target, first, run)


def same(source: Stored, target: Stored, ring: Ring) -> bool:
    """Whether `copy` would change nothing."""
    if isinstance(target, Target):
        return all(target.holds(first, run) for first, run in ring.runs_of(source, target.dtype))
    pairs = zip(ring.runs_of(source, target.dtype), ring.runs_of(target, target.dtype), strict=True)
    return all(same_bits(ours, theirs) for (_, ours), (_, theirs) in pairs)


def load_step(step: Step, stored: Mapping[str, Stored], parameters: Mapping[str, Tensor]) -> None:
    """Fill the parameters of one step."""
    _fill(step, stored, parameters, dict.fromkeys(step.theirs, 0))


def _fill(step: Step, stored: Mapping[str, Stored], parameters: Mapping[str, Tensor], places: dict[str, int]) -> None:
    """The same, from the given elements of the stored tensors on."""
    for name, piece in step.pieces(parameters):
        places[name] = read(stored[name], places[name], piece, name)


def load_expert(step: Step, expert: int, experts: int, stored: Mapping[str, Stored],
                parameters: Mapping[str, Tensor]) -> None:
    """Fill the parameters of one step, (1, …) each, with those of one expert of so many.

    Either each has tensors of its own, or all are in one tensor, one after another."""
    shapes = step.op.shapes([parameters[name] for name in step.ours], step.layer)       # of one expert's part
    together, shape = len(shapes) == len(step.theirs), shapes[0]
    own = step if together else dataclasses.replace(step, theirs=step.theirs[expert::experts])
    _fill(own, stored, parameters, dict.fromkeys(own.theirs, expert * math.prod(shape) if together else 0))


def save_step(step: Step, parameters: Mapping[str, Tensor], stored: Mapping[str, Stored], out: Writer) -> None:
    """Write the parameters of one step where their stored tensors go."""
    places = dict.fromkeys(step.theirs, 0)
    for name, piece in step.pieces(parameters):
        places[name] = write(stored[name], places[name], piece, name, out)


def need_finite(name: str, run: Tensor, where: str = "") -> None:
    """Raises CheckpointError with the name of a tensor that holds a NaN or an infinity."""
    if run.numel() and not all(torch.isfinite(end) for end in torch.aminmax(run)):           # NaN goes through both
        raise CheckpointError(f"{where}{name} holds a NaN or an infinity as {short(run.dtype)}")


def same_step(step: Step, parameters: Mapping[str, Tensor], stored: Mapping[str, Stored]) -> Iterator[tuple[str, bool]]:
    """For each piece of a step, whether its stored tensor has just the bits that it has."""
    places = dict.fromkeys(step.theirs, 0)
    for name, piece in step.pieces(parameters):
        for part in runs(piece):
            target, first = stored[name], places[name]
            ours = (part.dense() if isinstance(part, Beside) else part).to(target.dtype).contiguous().view(-1)
            places[name] += part.numel()
            if isinstance(target, Target):
                yield name, target.holds(first, ours)
                continue
            theirs = torch.empty(part.numel(), dtype=target.dtype)
            target.read_run(first, theirs)
            yield name, same_bits(ours, theirs)
