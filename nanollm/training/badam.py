"""BAdam: one block of the model is trained at a time, by AdamW, and the blocks take turns.

    block       0 0 … 0   1 1 … 1   …   D−1 …   0 0 …      K steps each
    m, v, t     0 → …     0 → …                            begin anew with each block
                                                           Luo et al. 2024 (arXiv 2404.02827) algorithm 1

A block is a layer; what stands in no layer (embedding, last norm, head) is one block more, the last. With --freeze
embed norm head, as the authors' package has it, there is none.

    bytes of state, float32     AdamW 8N, N trained parameters; BAdam 8 max_i N_i, N_i those of block i

Other blocks have requires_grad off: no gradient, and the backward pass ends at the block that is trained. m and v of
whichever block that is lie in the same two buffers (max N_i,), so a checkpoint has the same tensors at every step. The
authors' code also keeps the weights of other blocks in 16 bits; here they stay in float32.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nanollm.model import Decoder
from nanollm.training.adam import direction

STATE: Any = "block"            # the name of the state, which belongs to no parameter


class BAdam(torch.optim.Optimizer):
    """Blocks of parameters, each of which is in one of the groups."""

    def __init__(self, groups: list[dict[str, Any]], betas: Sequence[float], blocks: list[list[nn.Parameter]],
                 every: int) -> None:
        """every: K."""
        super().__init__(groups, {"lr": 0.0})
        self.betas, self.blocks, self.every = betas, blocks, every
        first, most = blocks[0][0], max(sum(p.numel() for p in block) for block in blocks)
        self.state[STATE] = {
            "step": torch.zeros((), dtype=torch.int64),
            "exp_avg": first.new_zeros(most),
            "exp_avg_sq": first.new_zeros(most),
        }

    @property
    def active(self) -> list[nn.Parameter]:
        """The block of the next step."""
        return self.blocks[int(self.state[STATE]["step"]) // self.every % len(self.blocks)]

    def begin(self) -> None:
        """Only the block of the next step has gradients from here on. To be called before the first step of a run, and
        of one that is resumed."""
        for p in (p for block in self.blocks for p in block):
            p.requires_grad_(False)
        for p in self.active:
            p.requires_grad_(True)

    # override: torch's step also takes a closure, for which there is no use here
    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of the block whose turn it is; after its last one, the next block begins."""
        state, groups = self.state[STATE], {p: group for group in self.param_groups for p in group["params"]}
        step, at = state["step"], 0
        t = int(step) % self.every + 1
        for p in self.active:
            m, v = (state[name][at : at + p.numel()].view_as(p) for name in ("exp_avg", "exp_avg_sq"))
            at += p.numel()
            if p.grad is not None:
                p.mul_(1 - groups[p]["lr"] * groups[p]["weight_decay"])
                p.add_(direction(p.grad, m, v, t, self.betas), alpha=-groups[p]["lr"])
        step += 1
        if t == self.every:
            state["exp_avg"].zero_()
            state["exp_avg_sq"].zero_()
            self.begin()


def blocks(model: Decoder) -> list[list[nn.Parameter]]:
    """The parameters of each layer that are trained, then the others that are; without what is empty."""
    layers = [[p for p in layer.parameters() if p.requires_grad] for layer in model.layers]
    inside: set[Tensor] = {p for layer in layers for p in layer}
    rest = [p for p in model.parameters() if p.requires_grad and p not in inside]
    return [block for block in (*layers, rest) if block]
