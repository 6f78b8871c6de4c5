"""Normalisation: bring each token's vector to a fixed length, then let a learned gain stretch it.

    RMSNorm(x)   = x / sqrt(mean(x²) + ε) · g                        Zhang & Sennrich 2019, eq. 4
    LayerNorm(x) = (x − mean(x)) / sqrt(var(x) + ε) · g + b          Ba, Kiros & Hinton 2016, eq. 4

Shapes: B batch, T tokens, D width.   x (B, T, D) → (B, T, D);   g, b (D,).
Of queries and keys:   x (B, T, H, d), g (d,), or (H, d) where each head has its own;   or x (B, T, H·d), g (H·d,).

RMSNorm leaves the mean alone: centring costs a pass and buys nothing in a pre-norm decoder.
The statistics are always float32. What differs between families is *where the result is rounded back* to the
working dtype, which float32 tests cannot see and bfloat16 users can:

    round before the gain    (x̂ rounded) · g             Llama, Mistral, Qwen
    round after the gain     rounded(x̂ · (1 + g))        Gemma, whose gain is stored as an offset from one
"""

from typing import overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanollm.config import Norm
from nanollm.init import Draw, constant, zero
from nanollm.layers.head_norm import HeadNorm
from nanollm.ops import accelerated


@accelerated                            # on a GPU kernels.rms_norm runs in its place: same signature, same result
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
def add_rms_norm(x: Tensor, y: Tensor, gain: Tensor, eps: float, offset: float = 0.0,
                 cast_after_gain: bool = False) -> tuple[Tensor, Tensor]:
    """x + y, which is the residual stream, and its norm."""
    total = x + y
    return total, rms_norm(total, gain, eps, offset, cast_after_gain)


@accelerated
def layer_norm(x: Tensor, gain: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """x (…, D), gain and bias (D,) → (…, D) in the dtype of x."""
    bias = None if bias is None else bias.to(x.dtype)
    return F.layer_norm(x, gain.shape, gain.to(x.dtype), bias, eps)             # x may be wider than gain and bias


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last dimension. The equation is at the head of the file."""

    def __init__(self, config: Norm, dim: int) -> None:
        super().__init__()
        self.config = config
        self.gain = nn.Parameter(torch.empty(dim)) if config.gain else None     # g, or g − 1 where offset is 1 (Gemma)

    @property
    def INIT(self) -> dict[str, Draw]:
        """A gain of 1, as it is stored, and no shift."""
        return {"gain": constant(1 - self.config.offset), "bias": zero}

    def forward(self, x: Tensor) -> Tensor:             # (…, D) → (…, D)
        if self.gain is None:
            return F.rms_norm(x.float(), x.shape[-1:], eps=self.config.eps).to(x.dtype)
        return rms_norm(x, self.gain, self.config.eps, self.config.offset, self.config.cast_after_gain)

    def add(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """x + y and its norm, in one pass over memory where a kernel runs."""
        if self.gain is None:
            return x + y, self(x + y)
        return add_rms_norm(x, y, self.gain, self.config.eps, self.config.offset, self.config.cast_after_gain)

    def extra_repr(self) -> str:
        return f"{'no gain' if self.gain is None else len(self.gain)}, eps={self.config.eps:g}"


class LayerNorm(nn.Module):
    """Mean and variance normalisation over the last dimension; gain g and shift b are there if the config says so."""
    INIT = RMSNorm.INIT

    def __init__(self, config: Norm, dim: int) -> None:
        super().__init__()
        self.config = config
        self.gain = nn.Parameter(torch.empty(dim)) if config.gain else None
        self.bias = nn.Parameter(torch.empty(dim)) if config.bias else None

    def forward(self, x: Tensor) -> Tensor:             # (…, D) → (…, D)
        if self.gain is None:
            return F.layer_norm(x, x.shape[-1:], eps=self.config.eps)
        gain = self.gain + self.config.offset if self.config.offset else self.gain
        return layer_norm(x, gain, self.bias, self.config.eps)

    def add(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """x + y and its norm."""
        total = x + y
        return total, self(total)


class OuterNorm(RMSNorm):
    """x / (sqrt(mean(x²)) + ε) · g, with ε outside the root. StripedHyena."""

    def forward(self, x: Tensor) -> Tensor:             # (…, D) → (…, D)
        return self.gain * (x / (x.norm(2, -1, keepdim=True) * x.shape[-1] ** -0.5 + self.config.eps))

    def add(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """x + y and its norm."""
        return x + y, self(x + y)


KINDS: dict[str, type[RMSNorm] | type[LayerNorm]] = {"rms": RMSNorm, "layer": LayerNorm, "rms_outer": OuterNorm}


@overload
def build_norm(config: Norm, dim: int) -> RMSNorm | LayerNorm: ...
@overload
def build_norm(config: None, dim: int) -> None: ...
def build_norm(config: Norm | None, dim: int) -> RMSNorm | LayerNorm | None:
    """The module a config describes; None stays None, so an absent norm has no name in the state dict."""
    return None if config is None else KINDS[config.kind](config, dim)


def build_head_norm(config: Norm | None, heads: int, head_dim: int) -> nn.Module | None:
    """As build_norm, for q or k; the config's scope says what it normalises."""
    if config is not None and config.scope == "each":
        return HeadNorm(config, heads, head_dim)
    return build_norm(config, heads * head_dim if config is not None and config.scope == "all" else head_dim)


def normed(norm: nn.Module | None, x: Tensor) -> Tensor:
    """x, normalised where there is a norm."""
    return x if norm is None else norm(x)
