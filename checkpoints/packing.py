"""Weights that are quantised as they come in, so that there is never memory for a whole model in 16 bits.

    a step of the plan ──→ its weights in 16 bits ──→ packed, s, z (nanollm/inference/quantize.py)
                           one step's, and of experts one's: GateUp has two matrices of it

Shapes: E experts, N outputs, K inputs.
"""

import math
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from checkpoints.names.table import Step
from checkpoints.storage import stream
from checkpoints.storage.files import Stored
from nanollm.inference.quantize import Plan, Quantised, quantize_into, room

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


def load_step(step: Step, plan: Plan, weights: Collection[str], stored: Mapping[str, Stored],
              parameters: Mapping[str, Tensor], dtype: Callable[[str], torch.dtype],
              scratch: Scratch) -> dict[str, Quantised]:
    """Of the parameters of one step, `weights` quantised; the others are filled.

    `parameters` has the weights on the meta device; `dtype` says what each would be kept as."""
    shapes = {name: tuple(parameters[name].shape) for name in step.ours if name in weights}
    found = {name: room(shape, plan.bits, plan.group, scratch.device) for name, shape in shapes.items()}
    first = next(iter(shapes.values()))
    if len(first) == 2:
        whole = scratch.tensors(shapes, dtype)
        stream.load_step(step, stored, {**parameters, **whole})
        for name, weight in whole.items():
            quantize_into(found[name], weight, plan.bits, plan.group)
        return found
    own = scratch.tensors({name: (1, *shape[1:]) for name, shape in shapes.items()}, dtype)
    for expert in range(first[0]):
        stream.load_expert(step, expert, first[0], stored, own)
        for name, weight in own.items():
            quantize_into(found[name], weight[0], plan.bits, plan.group, expert)
    return found
