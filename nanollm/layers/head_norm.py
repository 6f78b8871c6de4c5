"""LayerNorm of queries or keys in which every head has a gain of its own. Command-R+, StableLM-2 12B.

    x̂ = (x − mean(x)) / sqrt(var(x) + ε) · g_h                        over the d channels of head h

norm.py has the norms of whole vectors, and of heads that share a gain.

Shapes: B batch, T tokens, H heads, d head width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanollm.config import Norm
from nanollm.init import one


class HeadNorm(nn.Module):
    """LayerNorm of each head of q or k by itself, with a gain of its own."""
    INIT = {"gain": one}

    def __init__(self, config: Norm, heads: int, head_dim: int) -> None:
        super().__init__()
        self.config = config
        self.gain = nn.Parameter(torch.empty(heads, head_dim))

    def forward(self, x: Tensor) -> Tensor:             # (B, T, H, d) → (B, T, H, d)
        x_hat = F.layer_norm(x.float(), x.shape[-1:], eps=self.config.eps)
        return (x_hat * self.gain.float()).to(x.dtype)
