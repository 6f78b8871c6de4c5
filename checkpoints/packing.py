"""Weights that are quantised as they come in, so that there is never memory for a whole model in 16 bits.

    a step of the plan ──→ its weights in 16 bits ──→ packed, s, z (nanollm/inference/quantize.py)
                           one step's, and of experts one's: GateUp has two matrices of it

Shapes: E experts, N outputs, K inputs.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from checkpoints.names.table import Step
from checkpoints.storage import stream
from checkpoints.storage.files import Stored
from nanollm.inference.quantize import Plan, Quantised, quantize_weight, stacked


def load_step(step: Step, plan: Plan, weights: Collection[str], stored: Mapping[str, Stored],
              parameters: Mapping[str, Tensor], dtype: Callable[[str], torch.dtype],
              device: str | torch.device) -> dict[str, Quantised]:
    """Of the parameters of one step, `weights` quantised; the others are filled.

    `parameters` has the weights on the meta device; `dtype` says what each would be kept as."""
    here = [name for name in step.ours if name in weights]

    def empty(name: str, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=dtype(name), device=device)

    shapes = {name: tuple(parameters[name].shape) for name in here}
    if len(shapes[here[0]]) == 2:
        filled = {**parameters, **{name: empty(name, shapes[name]) for name in here}}
        stream.load_step(step, stored, filled)
        return {name: quantize_weight(filled[name], plan.bits, plan.group) for name in here}
    experts, parts = shapes[here[0]][0], defaultdict(list)
    one = {name: empty(name, (1, *shapes[name][1:])) for name in here}
    for expert in range(experts):
        stream.load_expert(step, expert, experts, stored, one)
        for name in here:
            parts[name].append(quantize_weight(one[name][0], plan.bits, plan.group))
    return {name: stacked(parts.pop(name)) for name in here}
