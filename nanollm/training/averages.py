"""Averaged weights (EMA): beside the weights that are trained, a running mean of them, which is evaluated and written.

    m ← β_t m + (1 − β_t) w          β_t = min(β, (1 + t) / (10 + t))         t = 1, 2 … steps taken; m₀ = w₀

Polyak & Juditsky 1992; Tarvainen & Valpola 2017 (arXiv 1703.01780). The mean follows the path of the last 1/(1 − β)
steps and smooths the noise of single steps, as a decay of the learning rate does. β_t grows with the steps, as in
TensorFlow's ExponentialMovingAverage, or the mean would remember random first weights for too long: β₁ = 2/11.

β_t is a function of the step, so a checkpoint keeps the means and nothing else. Only parameters that are trained have
a mean, each sharded as its parameter is.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from nanollm.model import Decoder
from nanollm.training import distributed
from nanollm.training.distributed import World, local


class Average:
    """The means of a model's trained parameters, by name."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        """To be made when the model has its first weights. decay: β."""
        self.decay = decay
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.means = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, taken: int) -> None:
        """After a step: the equation. taken: t, the steps taken with this one."""
        weights = [local(p) for p in self.parameters.values()]
        means = [local(mean) for mean in self.means.values()]
        torch._foreach_lerp_(means, weights, 1 - min(self.decay, (1 + taken) / (10 + taken)))

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {f"average.{name}": mean for name, mean in self.means.items()}

    @torch.no_grad()
    def exchange(self) -> None:
        """The model gets the means as its weights, and this object the weights. The second call undoes the first."""
        for name, p in self.parameters.items():
            mean, weight = local(self.means[name]), local(p)
            kept = weight.clone()
            weight.copy_(mean)
            mean.copy_(kept)


@contextlib.contextmanager
def averaged(average: Average | None) -> Iterator[None]:
    """Inside the block the model has the means as its weights, where there are any."""
    if average:
        average.exchange()
    try:
        yield
    finally:
        if average:
            average.exchange()


@contextlib.contextmanager
def gathered(model: Decoder, average: Average | None, world: World, dtype: torch.dtype,
             blank: Decoder) -> Iterator[Decoder | None]:
    """Inside the block the model with the means as its weights, on the device of rank 0; None on other ranks. All take
    part in the all-gather; `blank` is as in `distributed.gather`."""
    with averaged(average):
        yield distributed.gather(model, world.rank == 0, world.device, dtype, blank)
