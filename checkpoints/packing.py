"""Weights in 8 and 4 bits, on their way in: there is never memory for a whole model in 16 bits.

    load_step    weights of 16 bits, which are quantised as they come: of a step there are those in memory, of experts
                 one expert's
    take_step    weights that are stored so (storage/quantized/integers.py), which stay as they are

A stored weight and its parts have the same rows. So what a step does to rows is done to packed, s and z, each by
itself; where it turns a matrix over (Transposed, the experts of gpt-oss) their groups would run along the wrong side.

Shapes: E experts, N outputs, K inputs.
"""

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from checkpoints.names.table import Step
from checkpoints.storage import stream
from checkpoints.storage.files import Stored
from checkpoints.storage.quantized.integers import Ints
from nanollm.inference.quantize import GROUPS, LEFT_ALONE, Packed, Plan, Quantised, leaves, skipped
from nanollm.model import Decoder

Shape = tuple[int, ...]


class Scratch:
    """Memory for the weights of one step before they are quantised, used again and again: between what is kept, holes
    of that size would stay."""

    def __init__(self, device: str | torch.device) -> None:
        self.device, self.memory = device, torch.empty(0, dtype=torch.uint8, device=device)

    def tensors(self, shapes: Mapping[str, Shape], dtype: Callable[[str], torch.dtype]) -> dict[str, Tensor]:
        sizes = {name: math.prod(shape) * dtype(name).itemsize for name, shape in shapes.items()}
        starts = {name: -(-size // 64) * 64 for name, size in sizes.items()}            # aligned for any dtype
        if sum(starts.values()) > len(self.memory):
            self.memory = torch.empty(sum(starts.values()), dtype=torch.uint8, device=self.device)
        parts = self.memory[: sum(starts.values())].split(list(starts.values()))
        return {name: part[: sizes[name]].view(dtype(name)).view(shapes[name])
                for name, part in zip(shapes, parts, strict=True)}


def load_step(step: Step, plan: Plan, packed: Mapping[str, Packed], stored: Mapping[str, Stored],
              parameters: Mapping[str, Tensor], dtype: Callable[[str], torch.dtype], scratch: Scratch) -> None:
    """Fill the parameters of one step: those that `packed` has room for quantised, the others as they are.

    `parameters` has the weights on the meta device; `dtype` says what each would be kept as."""
    shapes = {name: tuple(parameters[name].shape) for name in step.ours if name in packed}
    first = next(iter(shapes.values()))
    if len(first) == 2:
        whole = scratch.tensors(shapes, dtype)
        stream.load_step(step, stored, {**parameters, **whole})
        for name, weight in whole.items():
            plan.fill(packed[name], weight)
        return
    own = scratch.tensors({name: (1, *shape[1:]) for name, shape in shapes.items()}, dtype)
    for expert in range(first[0]):
        stream.load_expert(step, expert, first[0], stored, own)
        for name, weight in own.items():
            plan.fill(packed[name], weight[0], expert)


# ---- weights that are stored so

def by_rows(step: Step, parameters: Mapping[str, Tensor]) -> bool:
    """Whether a step puts the rows of its weights into rows of matrices, and does nothing else to them."""
    return all(len(shape) == 2 and shape[1] == 0 for shape in _without_inputs(step, parameters))


def by_columns(step: Step, parameters: Mapping[str, Tensor]) -> bool:
    """Whether it puts them into columns of matrices, as GPT-2 has them."""
    return all(len(shape) == 2 and shape[0] == 0 for shape in _without_inputs(step, parameters))


def _without_inputs(step: Step, parameters: Mapping[str, Tensor]) -> list[Shape]:
    """The shapes of what a step stores, were there no inputs: their 0 shows where they go."""
    ours = [torch.empty(*parameters[name].shape[:-1], 0, device="meta") for name in step.ours]
    return list(step.op.shapes(ours, step.layer))


def moved_by_rows(model: Decoder, plan: Plan, steps: Iterable[Step], also: Callable[[Step], bool]) -> Plan:
    """The plan without the modules whose weights are not moved by rows, or together with others than its own, or by a
    step that is not `also` true."""
    parameters, steps = dict(model.named_parameters()), list(steps)
    while True:
        weights = set(plan.weights(model))
        fit = [step for step in steps if weights.issuperset(step.ours) and by_rows(step, parameters) and also(step)]
        out = weights.difference(*(step.ours for step in fit))
        kept = [name for name in plan.modules if out.isdisjoint(plan._replace(modules=[name]).weights(model))]
        if kept == plan.modules:
            return plan
        plan = plan._replace(modules=kept)


def stored_so(model: Decoder, steps: Iterable[Step], stored: Mapping[str, Stored]) -> Plan:
    """The modules of a model on the meta device whose weights stay as they are stored.

    Of 8 bits those with a scale a row and without zero points, as quantize.py has no others; none whose inputs are in
    an order of their own."""
    def whole_numbers(step: Step) -> bool:
        parts = [stored[name] for name in step.theirs]
        return all(isinstance(one, Ints) and one.in_order and (
            one.how.bits == 4 or (one.how.bits == 8 and one.how.group is None and one.how.symmetric)) for one in parts)

    modules = [name for name, module in model.named_modules() if leaves(module) and not skipped(name, LEFT_ALONE)]
    return moved_by_rows(model, Plan(0, 0, modules), steps, whole_numbers)


def take_step(step: Step, stored: Mapping[str, Stored], parameters: Mapping[str, Tensor],
              device: str | torch.device) -> dict[str, Quantised]:
    """The weights of one step, as they are stored; `parameters` has them on the meta device."""
    parts = {name: one for name, one in stored.items() if name in step.theirs and isinstance(one, Ints)}
    first = parts[step.theirs[0]]

    def take(kind: Mapping[str, Stored], dtype: torch.dtype) -> dict[str, Tensor]:
        width = kind[step.theirs[0]].shape[1]
        taken = {name: torch.empty(*parameters[name].shape[:-1], width, dtype=dtype, device=device)
                 for name in step.ours}
        stream.load_step(step, kind, taken)
        return taken

    packed = take({name: one.codes for name, one in parts.items()}, torch.int32)
    scale = take({name: one.scales for name, one in parts.items()}, torch.float32)
    if first.how.bits == 8:
        return {name: ((words.view(torch.uint8) ^ 128).view(torch.int8), scale[name], None)
                for name, words in packed.items()}
    zeros = {name: one.zeros for name, one in parts.items() if one.zeros is not None}
    zero = take(zeros, torch.int8) if zeros else {
        name: torch.full_like(one, 8, dtype=torch.int8) for name, one in scale.items()}
    return {name: (packed[name], *in_groups(scale[name], zero[name], 8 * packed[name].shape[-1])) for name in step.ours}


def in_groups(scale: Tensor, zero: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """s and z of a row (…, N, 1) for each of its groups, which products on a CPU and a GPU ask for."""
    group = next((size for size in reversed(GROUPS) if K % size == 0), K)
    if scale.shape[-1] > 1 or K == group:
        return scale, zero
    scale, zero = (one.expand(*one.shape[:-1], K // group).contiguous() for one in (scale, zero))
    return scale, zero
