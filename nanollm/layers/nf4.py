"""NF4, 4-bit NormalFloat: 16 levels that weights, which are nearly normal, use equally often.

    q = the level nearest to w / a          a = max |w| of a block of 64 weights            w ≈ a · level[q]
    a ≈ s · map[c] + m                      m = mean of all a of the weight                 double quantisation
                                            s = max |a − m| of 256 blocks, c in 8 bits

Dettmers et al. 2023 (arXiv 2305.14314) §3; the levels are those of its appendix E. Bits a weight: 4 for q, 8/64 for c,
32/(64 · 256) for s: 4.127; without double quantisation it would be 4.5.

Blocks run through the weight row after row, whatever its width: the last one is short where 64 does not divide N·K.

    weight    w₀ w₁ w₂ w₃ …          bytes    q₀ q₁ │ q₂ q₃ │ …     the first of two in the upper four bits

`map` is the dynamic map of Dettmers 2015 (arXiv 1511.04561): a sign, the place of the first digit, and linear steps
behind it, fewer the smaller the number is. A number between two of its values takes the nearer one; like bitsandbytes
on a CPU, which all of this equals bit for bit, we ask a table of 65,536 equal steps for it.

Shapes: N outputs, K inputs, n = N·K, b = n / 64 blocks, rounded up. Experts are stacked: E in front of each.
    packed (n/2,) uint8;   c (b,) uint8;   s (b/256,) float32;   m () float32.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanollm.layers.frozen import frozen_linear

BLOCK, BLOCKS = 64, 256         # weights that share an a, and blocks that share an s
TINY = 1e-38                    # the smallest a that is divided by: a block of zeros has levels too
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)


class NF4(NamedTuple):
    """A weight, or those of E experts."""
    packed: Tensor
    c: Tensor
    s: Tensor
    m: Tensor


def dynamic_map() -> Tensor:
    """(256,) float32, rising: 0, 1, and ± 10^(i − 6) · f for i = 0 … 6, f in the middle of 2^i steps from 0.1 to 1."""
    values = [0.0, 1.0]
    for i in range(7):
        steps = torch.linspace(0.1, 1, 2**i + 1)
        middle = 10 ** (i - 6) * ((steps[:-1] + steps[1:]) / 2)
        values += [*middle.tolist(), *(-middle).tolist()]
    return torch.tensor(sorted(values))


# Tables are tensors of the file, not cached functions, so that torch.compile takes them for inputs.
LEVEL = torch.tensor(LEVELS)
# (256,) int64: the two float32 levels of each byte, which one look-up of 8 bytes brings
PAIRS = torch.stack([LEVEL.repeat_interleave(16), LEVEL.repeat(16)], 1).view(torch.int64).view(-1)
MAP = dynamic_map()


@functools.cache
def nearest() -> Tensor:
    """(65536,) uint8: for each of so many steps from −1 to 1 the place in MAP of the value nearest to it."""
    steps = torch.arange(1 << 16) / 65535 * 2 - 1
    return torch.bucketize(steps, (MAP[:-1] + MAP[1:]) / 2).to(torch.uint8)


def quantize(weight: Tensor) -> NF4:
    """weight (N, K), or any shape, in one of the float dtypes → q, c, s, m."""
    flat = weight.detach().reshape(-1).float()
    whole = len(flat) - len(flat) % BLOCK
    blocks = flat[:whole].view(-1, BLOCK)
    a = blocks.abs().amax(1)
    scaled = (blocks * (1 / a.clamp(min=TINY))[:, None]).view(-1)
    if whole < len(flat):                                       # the short block is divided, as bitsandbytes does
        last = flat[whole:].abs().amax().clamp(min=TINY)
        a, scaled = torch.cat([a, last[None]]), torch.cat([scaled, flat[whole:] / last])
    middle = (LEVEL[:-1] + LEVEL[1:]) / 2                 # a number in the middle takes the lower level
    q = torch.bucketize(scaled.clamp(-1, 1), middle.to(flat.device), out_int32=True).to(torch.uint8)
    q = F.pad(q, (0, len(q) % 2), value=7)                      # level 0: half a byte that no weight has
    m = a.mean()
    return NF4(q[::2] << 4 | q[1::2], *quantize_dynamic(a - m), m)


def quantize_dynamic(values: Tensor) -> tuple[Tensor, Tensor]:
    """values (b,) float32 → c (b,) uint8, s (b/256,) float32."""
    blocks = in_blocks(values, BLOCKS)
    s = blocks.abs().amax(1)
    scaled = (blocks * (1 / s)[:, None]).clamp(-1, 1)
    c = nearest().to(values.device)[((scaled + 1) * 32767.5 + 0.5).nan_to_num().long()]
    return torch.where(s[:, None] == 0, 0, c).view(-1)[: len(values)], s


def dequantize(dtype: torch.dtype, shape: tuple[int, ...], packed: Tensor, c: Tensor, s: Tensor, m: Tensor) -> Tensor:
    """q, c, s, m → the weight of that shape, computed in float32 and rounded to dtype."""
    a = in_blocks(MAP.to(c.device)[c.int()], BLOCKS).mul(s[:, None]).view(-1)[: len(c)] + m
    level = PAIRS.to(packed.device).index_select(0, packed.int()).view(torch.float32)      # n, or one more
    weight = in_blocks(level, BLOCK).mul_(a[:, None]).view(-1).to(dtype)
    return weight[: math.prod(shape)].view(shape)


def in_blocks(values: Tensor, size: int) -> Tensor:
    """(n,) → (blocks, size), zeros behind the last."""
    short = -len(values) % size
    return (F.pad(values, (0, short)) if short else values).view(-1, size)


def room(shape: tuple[int, ...], device: str | torch.device) -> NF4:
    """q, c, s, m for a weight (N, K), or (E, N, K), with nothing in them yet."""
    *experts, N, K = shape
    b = -(-N * K // BLOCK)
    sizes = {"packed": (-(-N * K // 2), torch.uint8), "c": (b, torch.uint8), "s": (-(-b // BLOCKS), torch.float32)}
    parts = {name: torch.empty(*experts, size, dtype=dtype, device=device) for name, (size, dtype) in sizes.items()}
    return NF4(**parts, m=torch.empty(experts, device=device))


class NF4Linear(nn.Module):
    """A Linear whose weight is in NF4, or the E of one place in the experts. Nothing in it is trained."""
    packed: Tensor
    c: Tensor
    s: Tensor
    m: Tensor
    bias: Tensor | None

    def __init__(self, outputs: int, inputs: int, weight: NF4, bias: Tensor | None = None) -> None:
        super().__init__()
        self.outputs, self.inputs = outputs, inputs
        for name, value in (*weight._asdict().items(), ("bias", bias)):
            self.register_buffer(name, value)

    def forward(self, x: Tensor, expert: int | None = None) -> Tensor:          # (…, K) → (…, N)
        stored, bias = [self.packed, self.c, self.s, self.m], self.bias
        if expert is not None:
            stored, bias = [part[expert] for part in stored], None if bias is None else bias[expert]
        return frozen_linear(x, bias, functools.partial(of_shape, self.outputs, self.inputs), *stored)

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, K), or (E, N, K)."""
        return (*self.m.shape, self.outputs, self.inputs)

    def dense(self) -> Tensor:
        """The weight, (N, K) or (E, N, K), float32."""
        whole = [self.packed, self.c, self.s, self.m]
        experts = [whole] if self.m.ndim == 0 else zip(*whole, strict=True)
        found = torch.stack([of_shape(self.outputs, self.inputs, torch.float32, *one) for one in experts])
        return found if self.m.ndim else found[0]

    def _apply(self, fn: Callable, recurse: bool = True) -> "NF4Linear":
        """What .to(), .cuda() and .bfloat16() call. The last would round the scales."""
        kept = {name: getattr(self, name) for name in ("s", "m")}
        super()._apply(fn, recurse)
        for name, value in kept.items():
            if getattr(self, name).dtype != value.dtype:
                setattr(self, name, value.to(getattr(self, name).device))
        return self

    def extra_repr(self) -> str:
        experts = f"experts={len(self.m)}, " if self.m.ndim else ""
        return f"{experts}in_features={self.inputs}, out_features={self.outputs}, nf4, bias={self.bias is not None}"


def of_shape(outputs: int, inputs: int, dtype: torch.dtype, *stored: Tensor) -> Tensor:
    """`dequantize` of a matrix (N, K)."""
    return dequantize(dtype, (outputs, inputs), *stored)
