"""Weights in 8 or 4 bits. Each new token reads every weight once, so fewer bytes are a faster answer.

    8 bits    q = round(w / s)                s = max |w| / 127 of an output row                            w ≈ s q
    4 bits    q = round(w / s) + z in 0 … 15  s = (max − min) / 15 of a group of 32, 64, 128 inputs        w ≈ s (q − z)
                                              z = round(−min / s), min ≤ 0 ≤ max: a weight of 0 stays 0

No weight moves by more than s/2. Scales stay float32: those of a float16 model would overflow or vanish in float16.
Eight 4-bit numbers share an int32, the first in the lowest bits, so 16 bytes are 32 neighbours along the input and
never leave their group:

    bits     31 … 28   …   11 … 8   7 … 4   3 … 0         bytes a weight: 8 bits 1, 4 bits ½ + 5/group (s and z)
    input      7       …      2       1       0

Shapes: N outputs, K inputs, G groups of K/G inputs.
    packed (N, K) int8 or (N, K/8) int32;   s (N, 1) or (N, G) float32;   z (N, G) int8, or None for 8 bits.
"""

import threading
from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanollm.errors import InputError
from nanollm.inference import cpu_products as cpu
from nanollm.layers.linear import Linear
from nanollm.model import Decoder
from nanollm.ops import accelerated

GROUPS = (32, 64, 128)
LEFT_ALONE = ("head", "router", "shared_gate", "dt_proj")       # few weights, much effect; Mamba reads dt_proj.weight
ORDERING = threading.Lock()     # held while codes are put into another order: one for all, as a module must be copied


def quantize_weight(weight: Tensor, bits: int, group: int = 128) -> tuple[Tensor, Tensor, Tensor | None]:
    """weight (N, K) → packed, s, z. The group is for 4 bits only. Raises InputError for what cannot be quantised."""
    check(weight, bits, group, "the weight")
    w, tiny = weight.detach().float(), torch.finfo(torch.float32).tiny
    if bits == 8:
        scale = (w.abs().amax(1, keepdim=True) / 127).clamp(min=tiny)           # a row of zeros has a scale too
        return (w / scale).round().clamp(-127, 127).to(torch.int8), scale, None
    w = w.unflatten(1, (-1, group))                                             # (N, G, K/G)
    low, high = w.amin(2).clamp(max=0), w.amax(2).clamp(min=0)
    scale = (high / 15 - low / 15).clamp(min=tiny)                              # high - low may overflow
    zero = (-low / scale).round()
    codes = ((w / scale[..., None]).round() + zero[..., None]).clamp(0, 15)
    return pack(codes.flatten(1).to(torch.int32)), scale, zero.to(torch.int8)


def pack(codes: Tensor) -> Tensor:
    """Numbers 0 … 15, (N, K) int32 → (N, K/8) int32."""
    shifts = 4 * torch.arange(8, dtype=torch.int32, device=codes.device)
    return (codes.unflatten(1, (-1, 8)) << shifts).sum(2, dtype=torch.int32)


def unpack(packed: Tensor) -> Tensor:
    """The inverse of `pack`. >> brings the sign along, the mask takes it off."""
    return (packed[..., None] >> 4 * torch.arange(8, dtype=torch.int32, device=packed.device) & 15).flatten(1)


def dequantize(packed: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """packed, s, z → the weight (N, K), float32."""
    if zero is None:
        return packed.float() * scale
    codes = unpack(packed).unflatten(1, (scale.shape[1], -1))                   # (N, G, K/G)
    return ((codes - zero[..., None]).float() * scale[..., None]).flatten(1)


@accelerated
def quantized_linear(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None) -> Tensor:
    """x (…, K) → x Wᵀ + b (…, N), W rounded to the dtype of x."""
    return F.linear(x, dequantize(packed, scale, zero).to(x.dtype), bias)


class QuantizedLinear(nn.Module):
    """A Linear whose weight is quantised. Nothing in it is trained.

    On a CPU it runs torch's packed kernels (cpu_products.py). Of 4 bits they want the codes in an order of their own,
    which then takes the place of ours: `restore` puts ours back, before the module is moved, saved or loaded. Threads
    may share a module: the first one orders, the others wait for it.
    """
    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    bias: Tensor | None

    def __init__(self, packed: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None = None) -> None:
        super().__init__()
        for name, value in (("packed", packed), ("scale", scale), ("zero", zero), ("bias", bias)):
            self.register_buffer(name, value)
        self.outputs, self.inputs = len(packed), packed.shape[1] * (1 if zero is None else 8)
        self.group = self.inputs // scale.shape[1]
        # packed and scales as torch's kernel wants them: one attribute, so that a thread sees both or neither
        self.ordered: tuple[Tensor, Tensor] | None = None
        self.register_state_dict_pre_hook(lambda module, prefix, keep_vars: module.restore())
        self.register_load_state_dict_pre_hook(lambda module, *_: module.restore())

    def forward(self, x: Tensor) -> Tensor:                     # (…, K) → (…, N)
        bits = 8 if self.zero is None else 4
        if x.is_cpu and not torch.is_grad_enabled() and cpu.fits(bits, self.outputs, self.inputs, self.group):
            y = self._rows(x.reshape(-1, self.inputs).contiguous()).view(*x.shape[:-1], self.outputs)
            return y if self.bias is None else y + self.bias
        return quantized_linear(x, self.restore(), self.scale, self.zero, self.bias)

    def _rows(self, x: Tensor) -> Tensor:                       # (M, K) → (M, N), without the bias
        ordered = self.ordered
        if ordered is None or ordered[1].dtype != x.dtype:
            ordered = self._order(x.dtype)
        if self.zero is None:
            return cpu.rows8(x, *ordered)
        return cpu.rows4(x, ordered[0], self.group, ordered[1])

    def _order(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        with ORDERING:
            if self.ordered is None and self.zero is not None:
                self.packed = cpu.order4(unpack(self.packed))
            scales = cpu.scales8(self.scale, dtype) if self.zero is None else cpu.scales4(self.scale, self.zero, dtype)
            self.ordered = self.packed, scales
            return self.ordered

    def restore(self) -> Tensor:
        """Put the codes back in our order, and return them."""
        with ORDERING:
            if self.ordered is not None and self.zero is not None:
                self.packed = pack(cpu.codes4(self.packed, self.group))
            self.ordered = None
            return self.packed

    def _apply(self, fn: Callable, recurse: bool = True) -> "QuantizedLinear":
        """What .to(), .cuda() and .bfloat16() call. The last would round the scales."""
        self.restore()
        scale = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != torch.float32:
            self.scale = scale.to(self.scale.device)
        return self

    def extra_repr(self) -> str:
        bits = "bits=8" if self.zero is None else f"bits=4, group={self.group}"
        return f"in_features={self.inputs}, out_features={self.outputs}, {bits}, bias={self.bias is not None}"


def quantize(model: Decoder, bits: int = 8, group: int | None = None, skip: Collection[str] = LEFT_ALONE) -> Decoder:
    """Replace the Linears of a model in place, and return it. Norms, embedding and stacked experts are no Linears.

    group: of inputs that share a scale in 4 bits; None is the largest that divides them all. skip: parts of names,
    "head" or "layers.0": a Linear whose name has one of them between its dots stays as it is. Besides the model there
    is never more than one weight in memory. Raises InputError, before anything is changed, for bits other than 8 and 4,
    and for a weight that is not finite or that the groups do not divide, by its name.
    """
    def skipped(name: str) -> bool:
        return any(f".{part}." in f".{name}." for part in skip)

    chosen = [name for name, module in model.named_modules() if type(module) is Linear and not skipped(name)]
    if group is None:
        widths = [model.get_parameter(f"{name}.weight").shape[1] for name in chosen]
        group = next((g for g in reversed(GROUPS) if all(width % g == 0 for width in widths)), GROUPS[0])
    for name in chosen:
        check(model.get_parameter(f"{name}.weight"), bits, group, name)
    for name in chosen:
        owner, _, own_name = name.rpartition(".")
        old = model.get_submodule(name)
        assert isinstance(old, Linear), "as chosen"
        bias = None if old.bias is None else old.bias.detach()
        new = QuantizedLinear(*quantize_weight(old.weight, bits, group), bias)
        setattr(model.get_submodule(owner), own_name, new.train(old.training))
    return model


def check(weight: Tensor, bits: int, group: int, name: str) -> None:
    """Raise InputError, which begins with `name`, for a weight (N, K) that cannot be quantised so."""
    if bits not in (8, 4):
        raise InputError(f"{name}: {bits} bits, expected 8 or 4")
    if bits == 4 and group not in GROUPS:
        raise InputError(f"{name}: groups of {group}, expected {', '.join(map(str, GROUPS))}")
    if bits == 4 and weight.shape[1] % group:
        raise InputError(f"{name}: {weight.shape[1]} inputs, expected a multiple of the group of {group}")
    if not torch.isfinite(weight).all():
        raise InputError(f"{name}: {int((~torch.isfinite(weight)).sum())} of {weight.numel()} weights are not finite")
