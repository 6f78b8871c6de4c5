"""MLX's layout: w = s q + t, and s and t belong to a group of inputs. Any weight may be kept so, the embedding too.

    X.weight    (N, K b/32) uint32    q of b bits, 2 3 4 5 6 8, the first in the lowest bits
    X.scales    (N, K/g)              s, in the dtype of the model
    X.biases    (N, K/g)              t; X.bias, without an s behind it, is what it always is

    config.json: "quantization": {"bits": 4, "group_size": 64, "model.layers.0.self_attn.q_proj": {"bits": 8, …}, …}

Experts are in one tensor, X.mlp.switch_mlp.up_proj (E, N, …), of which each is given the name that it has elsewhere,
X.mlp.experts.0.up_proj ….

A name may stand there with bits and a group of its own, or with false: it is not quantised. "mode" is "affine", which
is the above, or fp4.py's "mxfp4" (X.scales bytes of exponents, 32 neighbours) and "nvfp4" (float8_e4m3fn, 16).

s and t are rounded by themselves, so −t/s is no whole number z: such weights have no place in our int4, and are read as
what they stand for.

Shapes: N outputs, K inputs, E experts.   https://github.com/ml-explore/mlx, mx.quantize
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from checkpoints.names.reader import Reader
from checkpoints.storage.files import Stored
from checkpoints.storage.quantized.fp4 import POWERS, Fp4
from checkpoints.storage.quantized.parts import FLOATS, Layout, Packed, matrix, packed, part, rows_of, unpacked
from nanollm.errors import CheckpointError

BITS = (2, 3, 4, 5, 6, 8)
STACKED = ".switch_mlp."
MIXTRAL = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}       # its own names
MOST = 10_000                                    # experts
FLOAT = {"mxfp4": (32, POWERS), "nvfp4": (16, torch.float8_e4m3fn)}     # inputs of a group, what its byte is


@dataclass(frozen=True)
class Affine(Packed):
    """A matrix (N, K)."""
    scales: Stored                               # (N, G)
    biases: Stored                               # (N, G)
    bits: int

    def rows(self, top: int, end: int) -> Tensor:
        s, t = (rows_of(one, top, end).float()[..., None] for one in (self.scales, self.biases))
        codes = unpacked(rows_of(self.codes, top, end), self.bits).unflatten(1, (s.shape[1], -1))
        return (codes.float() * s + t).flatten(1)


@dataclass(frozen=True)
class Kind:
    """How a weight is kept."""
    bits: int
    group: int
    mode: str

    def __str__(self) -> str:
        return f"{self.bits} bits in groups of {self.group}" if self.mode == "affine" else self.mode


@dataclass(frozen=True)
class Mlx(Layout):
    """A folder in this layout."""
    usual: Kind
    own: Mapping[str, Kind | None]               # of modules by name; None: not quantised
    NAME = "MLX"

    def __str__(self) -> str:
        return str(self.usual)

    def plain(self, stored: Mapping[str, Stored], where: str) -> dict[str, Stored]:
        """X.weight in the place of its codes, scales and biases; stacked experts one by one. Raises CheckpointError."""
        stored, own = dict(stored), dict(self.own)
        for name in [name for name, one in stored.items() if STACKED in name and len(one.shape) == 3]:
            module, _, end = name.rpartition(".")
            for expert, one in _experts(module, stored.pop(name)).items():
                stored[f"{expert}.{end}"] = one
                if module in own:
                    own[expert] = own[module]
        plain = dict(stored)
        for name in stored:
            module = name.removesuffix(".scales")
            if module == name or f"{module}.weight" not in stored:
                continue
            kind = own.get(module, self.usual)
            if kind is None:
                raise CheckpointError(f"{where}: {name} is stored; config.json says that {module} is not quantised")
            plain[f"{module}.weight"] = _weight(module, kind, stored, where)
            for end in ("scales", "biases"):
                plain.pop(f"{module}.{end}", None)
        return plain


def _experts(module: str, stacked: Stored) -> dict[str, Stored]:
    """Each expert's part of a tensor (E, N, …), by the name that the expert's module has elsewhere."""
    before, _, name = module.partition(STACKED)
    name = MIXTRAL.get(name, name) if before.endswith("block_sparse_moe") else name
    (E, *shape), each = stacked.shape, stacked.size // max(stacked.shape[0], 1)
    if not 0 < E <= MOST:
        raise CheckpointError(f"{stacked.file}: {module}: {E} experts; expected 1 to {MOST}")
    return {f"{before}.experts.{e}.{name}": dataclasses.replace(
        stacked, shape=tuple(shape), start=stacked.start + e * each, size=each) for e in range(E)}


def _weight(module: str, kind: Kind, stored: Mapping[str, Stored], where: str) -> Packed:
    codes = matrix(stored, f"{module}.weight", (torch.uint32,), where)
    if codes.shape[1] * 32 % (kind.bits * kind.group):
        raise CheckpointError(f"{where}: {module}.weight is {codes.dtype} {codes.shape}; expected a matrix, "
                              f"{kind}, as config.json says")
    N, K = codes.shape[0], codes.shape[1] * 32 // kind.bits
    shape = N, K // kind.group
    if kind.mode in FLOAT:
        scales = dataclasses.replace(part(stored, f"{module}.scales", (torch.uint8,), where, shape),
                                     dtype=FLOAT[kind.mode][1])
        return packed(Fp4, (N, K), dataclasses.replace(codes, dtype=torch.uint8, shape=(N, K // 2)), scales)
    scales, biases = (part(stored, f"{module}.{end}", FLOATS, where, shape) for end in ("scales", "biases"))
    return packed(Affine, (N, K), dataclasses.replace(codes, dtype=torch.int32), scales, biases, kind.bits)


def read(r: Reader) -> Mlx:
    """What config.json says under "quantization"."""
    usual = _kind(r)
    own: dict[str, Kind | None] = {}
    for name, value in r.values.items():
        if value is False or isinstance(value, dict):
            inside: dict[str, Any] = value or {}
            own[name] = _kind(r.of({"bits": usual.bits, "group_size": usual.group, "mode": usual.mode, **inside},
                                   f"{r.prefix}{name}."), close=True) if inside else None
    r.close((*own, "quant_method", *(name for name, value in r.values.items() if value is True)))
    return Mlx(usual, own)


def _kind(r: Reader, close: bool = False) -> Kind:
    mode = r.must("mode", "affine", *FLOAT)
    bits = r.must("bits", *(BITS if mode == "affine" else (4,)))
    group = r.size("group_size")
    if mode in FLOAT and group != FLOAT[mode][0]:
        raise r.error("group_size", f"{FLOAT[mode][0]}, which is {mode}'s")
    if close:
        r.close()
    return Kind(bits, group, mode)
