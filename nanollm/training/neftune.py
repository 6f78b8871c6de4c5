"""NEFTune: noise on the embeddings while a model is tuned, so that it learns less by heart.

    x = E[token] + ε,     ε ~ U(−a, a),     a = α / √(T·D)         Jain et al. 2023 (arXiv 2310.05914), Algorithm 1

The length of ε over a row is then about α/√3 whatever T and D are. The paper's α is 5, 10 or 15. T is the length of the
row as the model reads it, padding included, as in transformers; the paper's own code takes the row without padding.

Evaluation and samples see no noise. Which noise a micro-batch gets follows from its place in the run (phase.py).

Shapes: B batch, T tokens, D model width.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from nanollm.model import Decoder


def add_noise(model: Decoder, alpha: float) -> None:
    """From now on the embedding adds the noise in train mode."""
    def noisy(embed: nn.Module, _: Any, x: Tensor) -> Tensor:               # (B, T, D) → the same
        if not embed.training:
            return x
        bound = alpha / math.sqrt(x.shape[1] * x.shape[2])
        return x + torch.empty_like(x).uniform_(-bound, bound)

    model.embed.register_forward_hook(noisy)
