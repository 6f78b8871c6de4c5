"""A model made ready to decode on a CPU. Each new token reads every weight once, so what counts is how they are read.

    side by side     q, k, v of an attention, and gate, up of an MLP, have one input: one product in place of several
    packed           weights of 16 bits in the order in which oneDNN reads them. F.linear puts them into that order anew
                     in every product: 38 ms of a processor a token for SmolLM2-135M, packed and side by side 26
    widened          where the processor has no products in 16 bits, many rows go through float32: 256 rows through a
                     weight of 3072 × 576 take 14 ms in place of 59 (AVX2)
    quantised        weights of 8 or 4 bits (quantize.py) are put side by side too; the head can have 8 bits

    model = prepare(checkpoints.load(folder))

The logits are those of the model as it was, up to rounding: sums of 16-bit products are added in another order. What is
packed is no parameter any more, so a prepared model can be run, but neither trained nor saved.

The packing is private to torch (`torch.ops.mkldnn`, which torch.compile uses). It is tried once a process and dtype;
where it is missing, fails or differs, weights stay as they are, side by side.
"""

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanollm import ops
from nanollm.inference.quantize import QuantizedLinear, quantize_weight
from nanollm.layers.attention import Attention
from nanollm.layers.linear import Linear
from nanollm.layers.mlp import MLP
from nanollm.model import Decoder, Head


class PackedLinear(nn.Module):
    """A Linear whose weight lies in oneDNN's order."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.outputs, self.inputs = weight.shape
        self.packed, self.bias = pack(weight), bias             # neither moves with .to(): it is made for this CPU

    def forward(self, x: Tensor) -> Tensor:                     # (…, K) → (…, N)
        return product(x, self.packed, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.inputs}, out_features={self.outputs}, bias={self.bias is not None}"


class WideLinear(Linear):
    """A Linear in 16 bits whose products of many rows are computed in float32."""
    MANY = 32

    def forward(self, x: Tensor) -> Tensor:                     # (…, K) → (…, N)
        if x.numel() < self.MANY * x.shape[-1] or torch.is_grad_enabled():
            return super().forward(x)
        bias = None if self.bias is None else self.bias.float()
        return F.linear(x.float(), self.weight.float(), bias).to(x.dtype)


class SideBySide(nn.Module):
    """Several Linears of one input as one product. Whoever asks first computes it; the others take their part of it."""

    def __init__(self, product: nn.Module, sizes: Sequence[int]) -> None:
        super().__init__()
        self.product, self.sizes = product, list(sizes)
        self.last: tuple[Tensor, tuple[Tensor, ...]] | None = None             # an input, and what came of it

    def part(self, x: Tensor, index: int) -> Tensor:
        last = self.last                        # of this thread: another may put its own there at any moment
        if last is None or last[0] is not x:
            last = x, self.product(x).split(self.sizes, -1)
        self.last = last if index + 1 < len(self.sizes) else None              # the last part frees the memory
        return last[1][index]


class Part(nn.Module):
    """In the place of one of the Linears."""

    def __init__(self, whole: SideBySide, index: int) -> None:
        super().__init__()
        self.whole, self.index = whole, index

    def forward(self, x: Tensor) -> Tensor:                     # (…, K) → (…, N)
        return self.whole.part(x, self.index)

    def extra_repr(self) -> str:
        return f"{self.index} of {self.whole.sizes}, {self.whole.product}"


def pack(weight: Tensor) -> Tensor:
    """weight (N, K) → the same in an order of oneDNN's own."""
    # the order that it has for 64 rows takes 512 rows through a weight of more outputs than inputs 1.3 times as fast,
    # and through others half as fast (AMX); one row is as fast in either
    rows = 64 if weight.shape[0] > weight.shape[1] else 1
    return torch.ops.mkldnn._reorder_linear_weight(weight, rows)


def product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """x (…, K) → x Wᵀ + b (…, N)."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


@functools.cache
def has_packing(dtype: torch.dtype) -> bool:
    """Whether torch packs weights of this dtype and their product is F.linear's, tried once."""
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    draw = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=draw).to(dtype) for shape in ((3, 64), (32, 64), (32,)))
    try:
        found = product(x, pack(weight), bias)
    except (AttributeError, RuntimeError, NotImplementedError, TypeError):
        return False
    expected = F.linear(x.float(), weight.float(), bias.float())
    return bool((found.float() - expected).abs().max() < 0.02 * expected.abs().max())


@torch.no_grad()
def prepare(model: Decoder, head_bits: int | None = None) -> Decoder:
    """Make a model ready in place, and return it. On another device than a CPU, or where kernels were asked for by
    NANOLLM_KERNELS=triton, nothing is done.

    head_bits: 8 for a head in 8 bits, of an otherwise quantised model; None leaves its weight as it is."""
    if not model.embed.weight.is_cpu or ops.mode() == "triton":
        return model
    for owner in side_by_side(model):
        for name, linear in linears(owner):
            if has_packing(linear.weight.dtype):
                owner.set_submodule(name, PackedLinear(linear.weight.detach(), linear.bias))
            else:
                widen(owner, name, linear)
    head = model.head
    if head_bits is not None:
        head.packed = head_product(head, head_bits)
    elif has_packing(head.weight.dtype):
        head.packed = PackedLinear(head.rows().detach(), head.bias)
        if not model.config.tied:
            head.weight = nn.Parameter(head.weight.new_empty(0), requires_grad=False)      # it is read no more
    return model


@torch.no_grad()
def head_product(head: Head, bits: int | None) -> Linear | QuantizedLinear:
    """W x + b of a head, as a module; in 8 bits, or None: with the weight as it is."""
    if bits is not None:
        return QuantizedLinear(*quantize_weight(head.rows(), bits), None if head.bias is None else head.bias.detach())
    linear = Linear(head.in_features, head.out_features, head.bias is not None, device="meta")
    linear.weight, linear.bias = nn.Parameter(head.rows(), requires_grad=False), head.bias
    return linear


@torch.no_grad()
def side_by_side(model: Decoder) -> Iterator[nn.Module]:
    """Put q, k, v and gate, up side by side, in one Attention or MLP after the other, and hand each over."""
    for module in list(model.modules()):
        if isinstance(module, Attention):
            _together(module, *(name for name in ("q", "k", "v") if getattr(module, name) is not None))
            yield module
        elif isinstance(module, MLP):
            if module.gate is not None:
                _together(module, "gate", "up")
            yield module


def linears(owner: nn.Module) -> list[tuple[str, Linear]]:
    """The Linears of an Attention or MLP, as they are now."""
    return [(name, module) for name, module in owner.named_modules(remove_duplicate=False) if type(module) is Linear]


def widen(owner: nn.Module, name: str, linear: Linear) -> None:
    """Put a WideLinear in the place of a Linear where that is the faster."""
    if linear.weight.dtype in (torch.bfloat16, torch.float16) and not has_packing(linear.weight.dtype):
        wide = WideLinear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        wide.weight, wide.bias = linear.weight, linear.bias
        owner.set_submodule(name, wide)


def _together(owner: nn.Module, *names: str) -> None:
    """Put the Linears of these names side by side. They are asked in this order, one after the other."""
    parts = [owner.get_submodule(name) for name in names]
    joined = _join(parts)
    if joined is None:                                          # of several kinds: some were left out when quantising
        return
    sizes = [part.outputs if isinstance(part, QuantizedLinear) else len(part.get_parameter("weight")) for part in parts]
    whole = SideBySide(joined, sizes)
    for index, name in enumerate(names):
        setattr(owner, name, Part(whole, index))


def _join(parts: Sequence[nn.Module]) -> nn.Module | None:
    """One module whose outputs are those of all; None where they are of several kinds."""
    linears = [part for part in parts if type(part) is Linear]
    quantised = [part for part in parts if isinstance(part, QuantizedLinear)]
    if len(linears) == len(parts):
        weight = torch.cat([part.weight for part in linears])
        bias = _biases([part.bias for part in linears])
        whole = Linear(weight.shape[1], len(weight), bias is not None, device="meta")
        whole.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            whole.bias = nn.Parameter(bias, requires_grad=False)
        return whole
    if len(quantised) == len(parts) and len({(part.zero is None, part.group) for part in quantised}) == 1:
        for part in quantised:
            part.restore()
        zeros = [part.zero for part in quantised if part.zero is not None]
        return QuantizedLinear(torch.cat([part.packed for part in quantised]),
                               torch.cat([part.scale for part in quantised]), torch.cat(zeros) if zeros else None,
                               _biases([part.bias for part in quantised]))
    return None


def _biases(found: Sequence[Tensor | None]) -> Tensor | None:
    there = [bias for bias in found if bias is not None]
    assert len(there) in (0, len(found)), "q, k and v have biases alike"
    return torch.cat(there) if there else None
