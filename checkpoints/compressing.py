"""A Hugging Face folder whose weights have 8 or 4 bits, in compressed-tensors' layout
(storage/quantized/compressed.py).

    written as usual           written here
    X.weight (N, K)      ──→   X.weight_packed, X.weight_scale [, X.weight_zero_point], X.weight_shape
                               config.json: quantization_config

The numbers are those that load(…, quantize=…) has of the same source. A matrix that is stored turned over (GPT-2), or
all experts in one tensor (gpt-oss), has no place in this layout and stays as it is.
"""

import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from checkpoints import packing
from checkpoints.export import Export
from checkpoints.names.table import Step
from checkpoints.source import Source
from checkpoints.storage import stream
from checkpoints.storage.files import Stored
from checkpoints.storage.quantized import compressed
from checkpoints.storage.quantized.compressed import PACKED, SCALE, SHAPE, ZERO, packed_down
from checkpoints.storage.quantized.integers import Integers, Ints
from nanollm.errors import InputError
from nanollm.inference.quantize import BITS, Plan, choose, quantize_weight
from nanollm.layers.moe import Experts


@dataclass(frozen=True)
class Compressed(Export):
    """A model as it will be written, some of its weights quantised."""
    plan: Plan
    weights: frozenset[str]                      # our names of them
    parts: Mapping[str, tuple[str, ...]]         # the tensors in the place of one

    def parts_of(self, name: str) -> tuple[str, ...]:
        return self.parts.get(name, (name,))

    def changes(self, step: Step) -> bool:
        return self.weights.issuperset(step.ours)

    def save_step(self, step: Step, parameters: Mapping[str, Tensor], places: Mapping[str, Stored],
                  out: stream.Writer) -> None:
        """Write the tensors of one step: weights that the plan has as codes, s and z, the others as `Export` does."""
        if not self.changes(step):
            return super().save_step(step, parameters, places, out)
        words, scales, zeros = self._quantised(step, parameters)
        stream.save_step(step, words, {name: places[name + PACKED] for name in step.theirs}, out)
        stream.save_step(step, scales, {name: places[name + SCALE] for name in step.theirs}, out)
        for name, rows in _rows(step, zeros).items():
            out(places[name + ZERO], 0, packed_down(rows, self.plan.bits).view(-1))
        for name, shape in step.shapes(parameters).items():
            out(places[name + SHAPE], 0, torch.tensor(shape))

    def same_step(self, step: Step, parameters: Mapping[str, Tensor],
                  stored: Mapping[str, Stored]) -> Iterator[tuple[str, bool]]:
        """For each piece of a step, whether what is stored has the bits that `save_step` writes."""
        if not self.changes(step):
            yield from super().same_step(step, parameters, stored)
            return
        there = {name: one for name in step.theirs if isinstance(one := stored[name], Ints)}
        words, scales, zeros = self._quantised(step, parameters)
        yield from stream.same_step(step, words, {name: one.codes for name, one in there.items()})
        yield from stream.same_step(step, scales, {name: one.scales for name, one in there.items()})
        if zeros:
            yield from stream.same_step(step, zeros, {name: one.zeros for name, one in there.items() if one.zeros})

    def _quantised(self, step: Step, parameters: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], ...]:
        """The weights of a step by part: words of codes, s, and z where there is one."""
        found = {name: quantize_weight(parameters[name], self.plan.bits, self.plan.group) for name in step.ours}
        words = {name: packed if packed.dtype == torch.int32 else (packed.view(torch.uint8) ^ 128).view(torch.int32)
                 for name, (packed, _, _) in found.items()}
        zeros = {name: zero for name, (_, _, zero) in found.items() if zero is not None}
        return words, {name: scale for name, (_, scale, _) in found.items()}, zeros


def compress(written: Export, source: Source, kind: str, group: int | None) -> Compressed:
    """The same export, quantised to "int8" or "int4". Raises InputError if that cannot be."""
    if source.integers:
        raise InputError(f"{source.folder}: its weights have {source.integers} already; quantise the folder that it "
                         "was made from, or write this one without --quantize first")
    bits = BITS[kind]
    whole = choose(source.model, bits, group)
    plan = packing.moved_by_rows(source.model, whole, written.steps, lambda step: all(
        name.endswith(".weight") and written.tensors[name][1][-1] * bits % 32 == 0 for name in step.theirs))
    left = [name for name in whole.modules if name not in plan.modules]
    if not plan.modules:
        raise InputError(f"{source.folder}: no weight is stored so that it can be quantised in this layout: "
                         f"{left[0] if left else 'there is no matrix'}. generate.py --quantize does it in memory")
    if left:
        warnings.warn(f"{source.folder}: not quantised, as this layout has no place for them: {left[0]}"
                      f"{f' and {len(left) - 1} more modules' if len(left) > 1 else ''}", stacklevel=2)
    if bits == 4 and any(isinstance(source.model.get_submodule(name), Experts) for name in plan.modules):
        warnings.warn("of this layout transformers reads experts in 8 bits only (5.23), and nanollm both; for a folder "
                      "that transformers reads: --quantize int8", stacklevel=2)
    weights = frozenset(plan.weights(source.model))
    fewer = {name for step in written.steps if weights.issuperset(step.ours) for name in step.theirs}
    how = Integers(bits, plan.group if bits == 4 else None, symmetric=bits == 8)
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    parts = {}
    for name, (dtype, shape) in written.tensors.items():
        own = _parts(name, shape, how) if name in fewer else {name: (dtype, shape)}
        tensors |= own
        if name in fewer:
            parts[name] = tuple(own)
    config = compressed.config(how, sorted(_ignored(written, source, fewer)))
    values = {**written.values, "quantization_config": config}
    return Compressed(written.to, values, written.steps, tensors, plan, weights, parts)


def _parts(name: str, shape: tuple[int, ...], how: Integers) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    N, K = shape
    groups = K // (how.group or K)
    parts = {name + PACKED: (torch.int32, (N, K * how.bits // 32)), name + SCALE: (torch.float32, (N, groups))}
    if not how.symmetric:
        parts[name + ZERO] = torch.int32, (-(-N * how.bits // 32), groups)
    return {**parts, name + SHAPE: (torch.int64, (2,))}


def _ignored(written: Export, source: Source, fewer: set[str]) -> set[str]:
    """The modules that transformers may take for Linears, and that are not quantised. A tied head is one too."""
    names = source.family.tables(source.config)[0]
    own = {name.removesuffix(".weight") for name, (_, shape) in written.tensors.items()
           if name not in fewer and name.endswith(".weight") and len(shape) == 2}
    return own - {names["embed"].theirs[0]} | {names["head"].theirs[0]}


def _rows(step: Step, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each stored tensor that a step makes of these, in memory."""
    rows: dict[str, list[Tensor]] = defaultdict(list)
    for name, piece in step.pieces(ours) if ours else ():
        assert isinstance(piece, Tensor), "a step by rows"
        rows[name].append(piece.reshape(-1, piece.shape[-1]))
    return {name: torch.cat(parts) for name, parts in rows.items()}
