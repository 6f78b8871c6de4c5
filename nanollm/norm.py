"""Normalisation: bring each token's vector to a fixed length, then let a learned gain stretch it.

    RMSNorm(x)   = x / sqrt(mean(x²) + ε) · g                        Zhang & Sennrich 2019, eq. 4
    LayerNorm(x) = (x − mean(x)) / sqrt(var(x) + ε) · g + b          Ba, Kiros & Hinton 2016, eq. 4

Shapes: B batch, T tokens, D width.   x (B, T, D) → (B, T, D);   g, b (D,).   Per-head norms: (B, H, T, d), g (d,).

RMSNorm leaves the mean alone: centring costs a pass and buys nothing in a pre-norm decoder.
The statistics are always float32. What differs between families is *where the result is rounded back* to the
working dtype, which float32 tests cannot see and bfloat16 users can:

    round before the gain    (x̂ rounded) · g             Llama, Mistral, Qwen
    round after the gain     rounded(x̂ · (1 + g))        Gemma, whose gain is stored as an offset from one
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanollm.config import Norm
from nanollm.ops import accelerated


@accelerated                                            # on a GPU kernels.rms_norm runs in its place: same signature, same result
def rms_norm(x: Tensor, gain: Tensor, eps: float, offset: float = 0.0, cast_after_gain: bool = False) -> Tensor:
    """x (…, D), gain (D,) → (…, D) in the dtype of x."""
    x32 = x.float()
    x_hat = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    if offset:
        gain = offset + gain.float()
    if cast_after_gain:
        return (x_hat * gain.float()).to(x.dtype)
    return (gain * x_hat.to(x.dtype)).to(x.dtype)


@accelerated
def add_rms_norm(x: Tensor, y: Tensor, gain: Tensor, eps: float, offset: float = 0.0, cast_after_gain: bool = False) -> tuple[Tensor, Tensor]:
    """x + y, which is the residual stream, and its norm."""
    total = x + y
    return total, rms_norm(total, gain, eps, offset, cast_after_gain)


@accelerated
def layer_norm(x: Tensor, gain: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """x (…, D), gain and bias (D,) → (…, D) in the dtype of x."""
    return F.layer_norm(x, gain.shape, gain, bias, eps)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last dimension. The equation is at the head of the file."""

    def __init__(self, config: Norm, dim: int) -> None:
        super().__init__()
        self.config = config
        self.gain = nn.Parameter(torch.empty(dim))      # g, or g − 1 where offset is 1 (Gemma)

    def forward(self, x: Tensor) -> Tensor:             # (…, D) → (…, D)
        return rms_norm(x, self.gain, self.config.eps, self.config.offset, self.config.cast_after_gain)

    def add(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """x + y and its norm, in one pass over memory where a kernel runs."""
        return add_rms_norm(x, y, self.gain, self.config.eps, self.config.offset, self.config.cast_after_gain)

    def extra_repr(self) -> str:
        return f"{len(self.gain)}, eps={self.config.eps:g}"


class LayerNorm(nn.Module):
    """Mean and variance normalisation over the last dimension; the shift b is there if the config says so."""

    def __init__(self, config: Norm, dim: int) -> None:
        super().__init__()
        self.config = config
        self.gain = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(dim)) if config.bias else None

    def forward(self, x: Tensor) -> Tensor:             # (…, D) → (…, D)
        return layer_norm(x, self.gain, self.bias, self.config.eps)

    def add(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """x + y and its norm."""
        total = x + y
        return total, self(total)


def build_norm(config: Norm | None, dim: int) -> nn.Module | None:
    """The module a config describes; None stays None, so an absent norm has no name in the state dict."""
    return None if config is None else {"rms": RMSNorm, "layer": LayerNorm}[config.kind](config, dim)
