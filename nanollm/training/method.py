"""A training method, as the loop of train.py sees it: it knows none by name.

    batches     what a step learns from: rows of the corpus as they are, or answers that are sampled now (rollouts.py)
    loss        of a batch: see losses.py
    held_out    what is measured on rows that nothing is learnt from
    tensors     what a checkpoint keeps beside weights, optimizer and data
"""

import argparse
from typing import Any

from torch import Tensor

from nanollm.data.stream import Source
from nanollm.model import Decoder
from nanollm.training.distributed import World
from nanollm.training.evaluation import held_out_means
from nanollm.training.losses import Loss


class Method:
    """A loss on the rows of the corpus: pre-training, SFT, preferences, a reward model, distillation."""

    def __init__(self, loss: Loss) -> None:
        self.loss = loss

    def batches(self, model: Decoder, rows: list[Any], step: int) -> tuple[list[Any], dict[str, float]]:
        """The micro-batches of a step, of what the corpus has for it, and what the log says of their making."""
        return rows, {}

    def held_out(self, model: Decoder, source: Source | None, world: World, options: argparse.Namespace,
                 most: int | None = None) -> dict[str, float]:
        """Means over `most` rows of the source, or all: "loss", the lower the better, and what else there is to say."""
        return held_out_means(model, self.loss, source, world, options, most)

    def tensors(self) -> dict[str, Tensor]:
        """By name. Each is changed in place, and has the same shape all through a run."""
        return {}
