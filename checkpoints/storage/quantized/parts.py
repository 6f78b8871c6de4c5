"""What all layouts of fewer bits share: a weight that is several stored tensors, and the numbers inside a word.

A weight is made when it is read, the rows of a run at a time. Where a layout keeps the matrix turned over, (K, N) in
place of (N, K), rows of ours are columns of the file: then the packed numbers of one weight are read whole and turned,
and given up again with its last run.

Shapes: N outputs, K inputs, b bits.
"""

import math
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from checkpoints.names.reader import Reader, brief_list
from checkpoints.storage.files import Stored
from nanollm.errors import CheckpointError, counted

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# The scales that values between the weights were quantised by, where they stand beside them.
ACTIVATIONS = tuple(f"{what}_{part}" for what in ("input", "output", "activation", "q", "k", "v", "kv", "kv_cache")
                    for part in ("scale", "scale_ub", "global_scale", "zero_point"))
Where = str | Path
One = TypeVar("One", bound="Packed")


class Layout:
    """How weights of a folder are kept; str() says it in words."""
    NAME: ClassVar[str]                          # of the program, or the format

    def plain(self, stored: Mapping[str, Stored], where: str) -> dict[str, Stored]:
        """Every tensor by the name of what it stands for. Raises CheckpointError for parts that do not fit."""
        raise NotImplementedError


@dataclass(frozen=True)
class Packed(Stored):
    """A weight (N, K) that is several stored tensors. shape is its own, dtype bfloat16; file, start, size are those of
    `codes`."""
    codes: Stored

    def run_dtype(self, wanted: torch.dtype) -> torch.dtype:
        return wanted                            # rounded once, to what is wanted

    def rows(self, top: int, end: int) -> Tensor:
        """The rows of the weight from `top` on, float32."""
        raise NotImplementedError

    def read_run(self, first: int, run: Tensor) -> None:
        """The rows that the run touches are unpacked."""
        width = self.shape[-1]
        top, end = first // width, -(-(first + run.numel()) // width)
        run.copy_(self.rows(top, end).flatten()[first - top * width :][: run.numel()].view(run.shape))


def packed(kind: type[One], shape: tuple[int, ...], codes: Stored, *more: object, **named: object) -> One:
    """A weight of this kind and shape."""
    place = codes.file, torch.bfloat16, shape, codes.start, codes.size
    return kind(*place, codes, *more, **named)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Held(Stored):
    """A part that is made of another one as a whole, and kept from its first run until its last."""
    of: Stored

    def make(self) -> Tensor:
        raise NotImplementedError

    @cached_property
    def made(self) -> Tensor:
        return self.make()

    def read_run(self, first: int, run: Tensor) -> None:
        end = first + run.numel()
        run.copy_(self.made.view(-1)[first:end].view(run.shape))
        if end == math.prod(self.shape):
            self.__dict__.pop("made")


@dataclass(frozen=True)
class Turned(Held):
    """The transpose of a stored matrix."""

    def make(self) -> Tensor:
        return whole(self.of).T.contiguous()


@dataclass(frozen=True)
class AsStored(Packed):
    """A weight (N, K) as (K, N), for a model whose own folders have it turned over: what quantises GPT-2's Conv1D keeps
    it as a Linear's. It is float32, and whole, from its first run until its last: its rows are columns of groups."""

    @cached_property
    def made(self) -> Tensor:
        found = torch.empty(self.codes.shape)
        self.codes.read_run(0, found)
        return found.T.contiguous()

    def rows(self, top: int, end: int) -> Tensor:
        return self.made[top:end]

    def read_run(self, first: int, run: Tensor) -> None:
        super().read_run(first, run)
        if first + run.numel() == math.prod(self.shape):
            self.__dict__.pop("made")


def turned(one: Stored) -> Turned:
    return Turned(one.file, one.dtype, one.shape[::-1], one.start, one.size, one)


def whole(part: Stored) -> Tensor:
    """A stored part in memory."""
    found = torch.empty(part.shape, dtype=part.dtype)
    part.read_run(0, found)
    return found


def rows_of(part: Stored, top: int, end: int) -> Tensor:
    """Rows of a stored matrix."""
    found = torch.empty(end - top, part.shape[1], dtype=part.dtype)
    part.read_run(top * part.shape[1], found)
    return found


def unpacked(words: Tensor, bits: int) -> Tensor:
    """(…, C) int32 → (…, 32 C/b) int32: numbers of b bits in a row, the first in the lowest bits.

    Where b does not divide 32, some begin in one word and end in the next: 32 numbers are b words."""
    mask = (1 << bits) - 1
    if 32 % bits == 0:
        shifts = bits * torch.arange(32 // bits, dtype=torch.int32)
        return (words[..., None] >> shifts & mask).flatten(-2)       # >> brings the sign along, the mask takes it off
    sets = words.unflatten(-1, (-1, bits)).long() & 0xFFFFFFFF
    after = torch.cat([sets[..., 1:], torch.zeros_like(sets[..., :1])], -1)
    first = bits * torch.arange(32)                                 # bit where each of the 32 begins
    pairs = sets[..., first // 32] | after[..., first // 32] << 32
    return (pairs >> first % 32 & mask).flatten(-2).int()


# ---- what is asked of a folder

def part(stored: Mapping[str, Stored], name: str, dtypes: Collection[torch.dtype], where: Where,
         *shapes: tuple[int, ...]) -> Stored:
    """A part of a weight. Raises CheckpointError, with what was expected, for one that is missing or does not fit."""
    one = stored.get(name)
    if one is None or one.dtype not in dtypes or (shapes and one.shape not in shapes):
        found = "missing" if one is None else f"{one.dtype} {one.shape}"
        kinds = " or ".join(map(str, dtypes))
        sizes = " or ".join(map(str, dict.fromkeys(shapes)))
        raise CheckpointError(f"{where}: {name} is {found}; expected {kinds}{f' of shape {sizes}' if sizes else ''}")
    return one


def matrix(stored: Mapping[str, Stored], name: str, dtypes: Collection[torch.dtype], where: Where) -> Stored:
    """A part of two dimensions."""
    one = part(stored, name, dtypes, where)
    if len(one.shape) != 2:
        raise CheckpointError(f"{where}: {name} is {one.dtype} {one.shape}; expected a matrix")
    return one


def without_activations(stored: Mapping[str, Stored], where: Where) -> dict[str, Stored]:
    """The tensors without the scales of activations and of a cache. A warning counts them."""
    over = [name for name in stored if name.rpartition(".")[2] in ACTIVATIONS]
    if over:
        warnings.warn(f"{where}: passed over: {counted(len(over), 'scale')} of activations or of the cache "
                      f"({brief_list(over, 2)}), as only weights are in fewer bits here, and what is computed is not",
                      stacklevel=2)
    return {name: one for name, one in stored.items() if name not in over}


def must_be(r: Reader, key: str, *implemented: object) -> None:
    """As r.must, of a key that has to be there."""
    r.get(key)
    r.must(key, *implemented)
