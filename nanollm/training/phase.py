"""Training and looking: what a model does only while it learns (noise, dropout, shifted attention) asks `training`.

    with learning(model, seed, step, rank, number):     forward and backward pass of one micro-batch
    otherwise                                           the model is in eval mode: losses on held-out rows, samples

What is drawn at random inside follows from (seed, step, rank, micro-batch) alone: torch's generators begin there. So a
checkpoint keeps nothing of it, and a run that is resumed draws what it would have drawn.
"""

import contextlib
import zlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def learning(model: nn.Module, *key: int) -> Iterator[None]:
    """Train mode inside the block, eval mode after it. key: (seed, step, rank, number of the micro-batch)."""
    torch.manual_seed(zlib.crc32(repr(key).encode()))
    model.train()
    try:
        yield
    finally:
        model.eval()
