"""AdamW with its two averages in 8 bits, by bitsandbytes: 2 bytes a parameter for them, and not 8.

    m, v  →  for each 256 numbers of a tensor: their largest absolute value in float32, and one byte a number, its
             place in a table of 256 values between −1 and 1 that is finer near 0
                                                         Dettmers et al. 2021 (arXiv 2110.02861) §2

    bytes of state     8N → 2N + 8N/256; tensors of fewer than 4,096 numbers keep float32

The arithmetic is AdamW's: both are made float32 numbers for the step, and rounded again after it. bitsandbytes has
kernels for CUDA, and computes the same in PyTorch on a CPU.
"""

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch

from nanollm.errors import InputError

TABLES = ("qmap1", "qmap2")     # the same for all tensors: no state


def require() -> None:
    """Raise InputError without bitsandbytes."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError("--optimizer adamw8bit: the package bitsandbytes is not installed; pip install -e '.[8bit]' "
                         "brings it, or take --optimizer adamw, whose state is in 32 bits")


def adamw8bit(groups: list[dict[str, Any]], betas: Sequence[float]) -> torch.optim.Optimizer:
    """The optimizer over groups of parameters, with its state made. Raises InputError without bitsandbytes."""
    require()
    from bitsandbytes.optim import AdamW8bit

    class Counted(AdamW8bit):
        """The same, with its count of steps as a tensor, as a checkpoint keeps it."""
        def update_step(self, group: dict, p: torch.Tensor, gindex: int, pindex: int) -> None:
            state = self.state[p]
            count = state["step"]
            state["step"] = int(count)
            super().update_step(group, p, gindex, pindex)
            state["step"] = count.fill_(state["step"])

    optimizer = Counted(groups, lr=0.0, betas=(betas[0], betas[1]))
    for gindex, group in enumerate(optimizer.param_groups):
        for pindex, p in enumerate(group["params"]):
            optimizer.init_state(group, p, gindex, pindex)
            optimizer.state[p]["step"] = torch.zeros((), dtype=torch.int64)
    return optimizer
