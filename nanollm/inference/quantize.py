"""Weights in 8 or 4 bits. Each new token reads every weight once, so fewer bytes are a faster answer.

    8 bits    q = round(w / s)                s = max |w| / 127 of an output row                            w ≈ s q
    4 bits    q = round(w / s) + z in 0 … 15  s = (max − min) / 15 of a group of 32, 64, 128 inputs        w ≈ s (q − z)
                                              z = round(−min / s), min ≤ 0 ≤ max: a weight of 0 stays 0

No weight moves by more than s/2. Scales stay float32: those of a float16 model would overflow or vanish in float16.
Eight 4-bit numbers share an int32, the first in the lowest bits, so 16 bytes are 32 neighbours along the input and
never leave their group:

    bits     31 … 28   …   11 … 8   7 … 4   3 … 0         bytes a weight: 8 bits 1, 4 bits ½ + 5/group (s and z)
    input      7       …      2       1       0

A third kind, NF4, has a file of its own, layers/nf4.py: it is slower, and for what stays frozen while adapters learn.
Where a gradient passes, a weight is made again in the backward pass, see layers/frozen.py, and the kernels rest.

Shapes: N outputs, K inputs, G groups of K/G inputs.
    packed (N, K) int8 or (N, K/8) int32;   s (N, 1) or (N, G) float32;   z (N, G) int8, or None for 8 bits.
    Experts are stacked, so each of these has E in front, and an expert is run by its number.
"""

import threading
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanollm.errors import InputError
from nanollm.inference import cpu_products as cpu
from nanollm.layers import nf4
from nanollm.layers.frozen import frozen_linear
from nanollm.layers.linear import Linear
from nanollm.layers.moe import Experts, SplitExperts
from nanollm.layers.nf4 import NF4, NF4Linear
from nanollm.model import Decoder
from nanollm.ops import accelerated

GROUPS = (32, 64, 128)
SLAB = 1 << 18                  # numbers quantised at a time, so that a processor's cache holds what is between
LEFT_ALONE = ("head", "router", "shared_gate", "dt_proj")       # few weights, much effect; Mamba reads dt_proj.weight
BITS = {"int8": 8, "int4": 4}   # by the names that commands have for them
KINDS = (*BITS, "nf4")
Some = TypeVar("Some", Tensor, Tensor | None)
Quantised = tuple[Tensor, Tensor, Tensor | None]                # packed, s, z
Packed = Quantised | NF4
ORDERING = threading.Lock()     # held while codes are put into another order: one for all, as a module must be copied


def quantize_weight(weight: Tensor, bits: int, group: int = 128) -> Quantised:
    """weight (N, K), or (E, N, K) → packed, s, z. The group is for 4 bits only. Raises InputError for what cannot be
    quantised."""
    check(weight, bits, group, "the weight")
    need_finite(weight, "the weight")
    out = room(tuple(weight.shape), bits, group, weight.device)
    for e, one in enumerate(weight) if weight.ndim == 3 else [(None, weight)]:
        quantize_into(out, one.detach(), bits, group, e)
    return out


def room(shape: tuple[int, ...], bits: int, group: int, device: str | torch.device) -> Quantised:
    """packed, s, z for a weight of this shape, (N, K) or (E, N, K), with nothing in them yet."""
    *rows, K = shape
    if bits == 8:
        packed, groups = torch.empty(shape, dtype=torch.int8, device=device), 1
    else:
        packed, groups = torch.empty(*rows, K // 8, dtype=torch.int32, device=device), K // group
    scale = torch.empty(*rows, groups, device=device)
    return packed, scale, None if bits == 8 else torch.empty_like(scale, dtype=torch.int8)


def quantize_into(out: Quantised, weight: Tensor, bits: int, group: int, expert: int | None = None) -> None:
    """Fill packed, s, z, or what is an expert's in them, from a weight (N, K), a slab of rows at a time."""
    rows = max(1, SLAB // weight.shape[1])
    for first in range(0, len(weight), rows):
        for part, found in zip(out, _quantize_rows(weight[first : first + rows], bits, group), strict=True):
            if part is not None and found is not None:
                of(expert, part)[first : first + rows] = found


def _quantize_rows(rows: Tensor, bits: int, group: int) -> Quantised:
    w, tiny = rows.float(), torch.finfo(torch.float32).tiny
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
    """Numbers 0 … 15, (…, K) int32 → (…, K/8) int32."""
    shifts = 4 * torch.arange(8, dtype=torch.int32, device=codes.device)
    return (codes.unflatten(-1, (-1, 8)) << shifts).sum(-1, dtype=torch.int32)


def unpack(packed: Tensor) -> Tensor:
    """The inverse of `pack`. >> brings the sign along, the mask takes it off."""
    return (packed[..., None] >> 4 * torch.arange(8, dtype=torch.int32, device=packed.device) & 15).flatten(-2)


def dequantize(packed: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """packed, s, z → the weight (…, N, K), float32."""
    if zero is None:
        return packed.float() * scale
    codes = unpack(packed).unflatten(-1, (scale.shape[-1], -1))                 # (…, N, G, K/G)
    return ((codes - zero[..., None]).float() * scale[..., None]).flatten(-2)


def dequantized(dtype: torch.dtype, packed: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """The same, rounded to dtype: what frozen.py makes twice."""
    return dequantize(packed, scale, zero).to(dtype)


@accelerated
def quantized_linear(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None) -> Tensor:
    """x (…, K) → x Wᵀ + b (…, N), W rounded to the dtype of x."""
    return F.linear(x, dequantize(packed, scale, zero).to(x.dtype), bias)


class QuantizedLinear(nn.Module):
    """A Linear whose weight is quantised, or the E of one place in the experts. Nothing in it is trained.

    On a CPU few rows go through torch's packed kernels (cpu_products.py); for many the weight is made anew, which is
    faster. Of 4 bits the kernels want the codes in an order of their own, which then takes the place of ours: `restore`
    puts ours back, before the module is moved, saved or loaded. Threads may share a module: the first one orders, the
    others wait for it.
    """
    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    bias: Tensor | None

    def __init__(self, packed: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None = None) -> None:
        super().__init__()
        for name, value in (("packed", packed), ("scale", scale), ("zero", zero), ("bias", bias)):
            self.register_buffer(name, value)
        self.outputs, self.inputs = packed.shape[-2], packed.shape[-1] * (1 if zero is None else 8)
        self.group = self.inputs // scale.shape[-1]
        # packed and scales as torch's kernel wants them: one attribute, so that a thread sees both or neither
        self.ordered: tuple[Tensor, Tensor] | None = None
        self.register_state_dict_pre_hook(restored)
        self.register_load_state_dict_pre_hook(restored)

    def forward(self, x: Tensor, expert: int | None = None) -> Tensor:          # (…, K) → (…, N)
        bits = 8 if self.zero is None else 4
        bias = of(expert, self.bias)
        # torch.compile takes the definition: it does not follow how a kernel is tried
        may = x.is_cpu and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if may and cpu.fits(bits, self.outputs, self.inputs, self.group):
            is_ordered = bits == 4 and self.ordered is not None                 # to put ours back takes longer
            if is_ordered or x.numel() <= cpu.few(x.dtype) * self.inputs:
                y = self._rows(x.reshape(-1, self.inputs).contiguous(), expert).view(*x.shape[:-1], self.outputs)
            else:
                stored = of(expert, self.packed), of(expert, self.scale), of(expert, self.zero)
                y = quantized_linear(x.float(), *stored, None).to(x.dtype)
            return y if bias is None else y + bias
        packed = self.packed if self.ordered is None else self.restore()
        stored = of(expert, packed), of(expert, self.scale), of(expert, self.zero)
        if x.requires_grad and torch.is_grad_enabled():
            return frozen_linear(x, bias, dequantized, *(part for part in stored if part is not None))
        return quantized_linear(x, *stored, bias)

    def _rows(self, x: Tensor, expert: int | None) -> Tensor:                   # (M, K) → (M, N), without the bias
        packed, scales = self.ordered or self._order(x.dtype)
        if scales.dtype != x.dtype:
            packed, scales = self._order(x.dtype)
        packed, scales = of(expert, packed), of(expert, scales)
        if self.zero is None:
            return cpu.rows8(x, packed, scales, of(expert, self.scale))
        return cpu.rows4(x, packed, self.group, scales)

    def _order(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        with ORDERING:
            if self.ordered is None and self.zero is not None:
                self.packed = each(lambda one: cpu.order4(unpack(one)), self.packed)
            scales = cpu.scales8(self.scale, dtype) if self.zero is None else cpu.scales4(self.scale, self.zero, dtype)
            self.ordered = self.packed, scales
            return self.ordered

    def restore(self) -> Tensor:
        """Put the codes back in our order, and return them."""
        with ORDERING:
            if self.ordered is not None and self.zero is not None:
                self.packed = each(lambda one: pack(cpu.codes4(one, self.group)), self.packed)
            self.ordered = None
            return self.packed

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, K), or (E, N, K)."""
        return (*self.packed.shape[:-2], self.outputs, self.inputs)

    def dense(self) -> Tensor:
        """The weight, (N, K) or (E, N, K), float32."""
        return dequantize(self.restore(), self.scale, self.zero)

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
        experts = f"experts={len(self.packed)}, " if self.packed.ndim == 3 else ""
        sizes = f"in_features={self.inputs}, out_features={self.outputs}"
        return f"{experts}{sizes}, {bits}, bias={self.bias is not None}"


def restored(module: QuantizedLinear, *_: object) -> None:
    """`restore`, as a hook that can be pickled."""
    module.restore()


def of(expert: int | None, parts: Some) -> Some:
    """What is an expert's; None: there are no experts."""
    return parts if parts is None or expert is None else parts.select(0, expert)


def each(change: Callable[[Tensor], Tensor], packed: Tensor) -> Tensor:
    """A weight changed, or those of all experts one by one."""
    return change(packed) if packed.ndim == 2 else torch.stack([change(one) for one in packed])


class QuantizedExperts(SplitExperts):
    """Experts whose weights are QuantizedLinears, or NF4Linears."""


# ---- a model

class Plan(NamedTuple):
    """What of a model is quantised, and how. In NF4 bits and group mean nothing."""
    bits: int
    group: int
    modules: list[str]
    nf4: bool = False

    def room(self, shape: tuple[int, ...], device: str | torch.device) -> Packed:
        """What a weight (N, K), or (E, N, K), becomes, with nothing in it yet."""
        return nf4.room(shape, device) if self.nf4 else room(shape, self.bits, self.group, device)

    def fill(self, out: Packed, weight: Tensor, expert: int | None = None) -> None:
        """Quantise a weight (N, K) into `out`, or into what is an expert's in it."""
        if not isinstance(out, NF4):
            return quantize_into(out, weight, self.bits, self.group, expert)
        for part, found in zip(out, nf4.quantize(weight), strict=True):
            of(expert, part).copy_(found)

    def weights(self, model: Decoder) -> list[str]:
        """The names of the parameters that will be quantised."""
        return [f"{name}.{leaf}" for name in self.modules for leaf in leaves(model.get_submodule(name))]


def quantize(model: Decoder, bits: int = 8, group: int | None = None, skip: Collection[str] = LEFT_ALONE) -> Decoder:
    """Replace the Linears and the experts of a model in place, and return it. Norms and the embedding stay.

    group: of inputs that share a scale in 4 bits; None is the largest that divides them all. skip: parts of names,
    "head" or "layers.0": a Linear whose name has one of them between its dots stays as it is. Besides the model there
    are never more than the weights of one module in memory. Raises InputError, before anything is changed, for bits
    other than 8 and 4, and for a weight that is not finite or that the groups do not divide, by its name.
    """
    apply(model, choose(model, bits, group, skip))
    return model


def apply(model: Decoder, plan: Plan) -> None:
    """Quantise what the plan names, in place, a module at a time. On the meta device there is room and no values.
    Raises InputError, before anything is changed, for a weight that is not finite."""
    for name in plan.weights(model):
        if not model.get_parameter(name).is_meta:
            need_finite(model.get_parameter(name), name.removesuffix(".weight"))
    for name in plan.modules:
        module, found = model.get_submodule(name), {}
        for leaf in leaves(module):
            weight = module.get_parameter(leaf).detach()
            found[leaf] = plan.room(tuple(weight.shape), weight.device)
            for e, one in () if weight.is_meta else enumerate(weight) if weight.ndim == 3 else [(None, weight)]:
                plan.fill(found[leaf], one, e)
        replace(model, name, found)


def quantize_as(model: Decoder, kind: str) -> None:
    """`apply` the plan of one of KINDS."""
    apply(model, plan_for(model, kind))


def choose(model: Decoder, bits: int, group: int | None = None, skip: Collection[str] = LEFT_ALONE) -> Plan:
    """What `quantize` replaces; the model may be on the meta device. Raises InputError as it does, but for values."""
    found = Plan(bits, group or 0, eligible(model, skip))
    weights = {name: model.get_parameter(name) for name in found.weights(model)}
    if group is None:
        divide = (g for g in reversed(GROUPS) if all(one.shape[-1] % g == 0 for one in weights.values()))
        found = found._replace(group=next(divide, GROUPS[0]))
    for name, weight in weights.items():
        check(weight, bits, found.group, name.removesuffix(".weight"))
    return found


def plan_for(model: Decoder, kind: str, group: int | None = None) -> Plan:
    """The plan for one of KINDS, by its name. Raises InputError as `choose` does; NF4 takes any shape."""
    return Plan(0, 0, eligible(model, LEFT_ALONE), nf4=True) if kind == "nf4" else choose(model, BITS[kind], group)


def eligible(model: Decoder, skip: Collection[str]) -> list[str]:
    """The modules that can be quantised, without those that are skipped."""
    return [name for name, module in model.named_modules() if leaves(module) and not skipped(name, skip)]


def skipped(name: str, skip: Collection[str]) -> bool:
    """Whether a module's name has one of these parts between its dots."""
    return any(f".{part}." in f".{name}." for part in skip)


def leaves(module: nn.Module) -> tuple[str, ...]:
    """The weights of a module that can be quantised; none of any other."""
    if isinstance(module, Experts):
        return module.leaves
    return ("weight",) if type(module) is Linear else ()        # a router or a head does more than multiply


def replace(model: Decoder, name: str, weights: Mapping[str, Packed]) -> None:
    """Put a quantised module in the place of the Linear or the Experts of this name."""
    old = model.get_submodule(name)
    if isinstance(old, Experts):
        parts = {leaf: linear(old.get_parameter(leaf), weights[leaf], getattr(old, f"{leaf}_bias", None))
                 for leaf in old.leaves}
        new: nn.Module = QuantizedExperts(old.config, **parts)
    else:
        assert isinstance(old, Linear), "as chosen"
        new = linear(old.weight, weights["weight"], old.bias)
    model.set_submodule(name, new.train(old.training))


def quantised(weight: Tensor, bias: Tensor | None, kind: str) -> QuantizedLinear | NF4Linear:
    """A Linear with this weight (N, K) in one of KINDS; of int4 with the largest group that divides K."""
    group = next((g for g in reversed(GROUPS) if weight.shape[-1] % g == 0), GROUPS[0])
    plan = Plan(BITS.get(kind, 0), group, [], nf4=kind == "nf4")
    if not plan.nf4:
        check(weight, plan.bits, group, "the weight")
    out = plan.room(tuple(weight.shape), weight.device)
    plan.fill(out, weight)
    return linear(weight, out, bias)


def linear(weight: Tensor, quantised: Packed, bias: Tensor | None) -> QuantizedLinear | NF4Linear:
    """The module that has a weight quantised, with a Linear's bias."""
    bias = None if bias is None else bias.detach()
    if isinstance(quantised, NF4):
        return NF4Linear(weight.shape[-2], weight.shape[-1], quantised, bias)
    return QuantizedLinear(*quantised, bias)


def check(weight: Tensor, bits: int, group: int, name: str) -> None:
    """Raise InputError, which begins with `name`, for a weight (…, K) whose shape cannot be quantised so."""
    if bits not in (8, 4):
        raise InputError(f"{name}: {bits} bits, expected 8 or 4")
    if bits == 4 and group not in GROUPS:
        raise InputError(f"{name}: groups of {group}, expected {', '.join(map(str, GROUPS))}")
    if bits == 4 and weight.shape[-1] % group:
        fitting = [str(one) for one in GROUPS if weight.shape[-1] % one == 0]
        advice = f"groups of {' and '.join(fitting)} divide them" if fitting else "no group divides them: take 8 bits"
        raise InputError(f"{name}: {weight.shape[-1]} inputs, expected a multiple of the group of {group}; {advice}")


def need_finite(weight: Tensor, name: str) -> None:
    """Raise InputError, which begins with `name`, for a weight that holds a NaN or an infinity."""
    if not torch.isfinite(weight).all():
        raise InputError(f"{name}: {int((~torch.isfinite(weight)).sum())} of {weight.numel()} weights are not finite")
