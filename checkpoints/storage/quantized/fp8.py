"""Eight bits with a scale: w = s q, or s (q − z). q is a float8_e4m3fn, or a whole number, each in a byte of its own.

    X.weight             (N, K)                 float8_e4m3fn or int8
    X.weight_scale_inv   (⌈N/128⌉, ⌈K/128⌉)     s, for each block of 128 × 128; those at the edges are cut off:
                                                DeepSeek-V3, R1, Qwen3-…-FP8 (s is the inverse of what w was scaled by)
    X.weight_scale       ()  or  (1,)           s of the whole weight: AutoFP8, ModelOpt, compressed-tensors
                         (N, 1)  or  (N,)       of a row: FBGEMM, compressed-tensors
                         (N, K/g)               of g inputs of a row: compressed-tensors

s is float32, bfloat16, float16 or, where scale_fmt is "ue8m0", a power of two in a byte (float8_e8m0fnu).

What such a folder computes elsewhere has activations in 8 bits as well, with scales found as it goes ("dynamic") or
stored beside the weights ("static"). Weights alone are read here; a warning counts the others.

Shapes: N outputs, K inputs.   float8_e4m3fn: Micikevicius et al. 2022 (arXiv 2209.05433)
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from checkpoints.names.reader import Reader
from checkpoints.storage.files import Stored
from checkpoints.storage.quantized.parts import (
    FLOATS,
    Layout,
    Packed,
    matrix,
    packed,
    part,
    rows_of,
    without_activations,
)

SCALES = (*FLOATS, torch.float8_e8m0fnu)
Block = tuple[int, int]                          # rows and columns that share a scale


@dataclass(frozen=True)
class Scaled(Packed):
    """A matrix (N, K) with a scale, and perhaps a zero point, for each block."""
    scales: Stored
    block: Block
    zeros: Stored | None = None
    factor: float = 1.0                          # times s; bitsandbytes 1/127

    def rows(self, top: int, end: int) -> Tensor:
        codes = rows_of(self.codes, top, end).float()
        if self.zeros:
            codes -= self._spread(self.zeros, top, end)
        return codes * self._spread(self.scales, top, end) * self.factor

    def _spread(self, small: Stored, top: int, end: int) -> Tensor:
        """Rows of one number for each block → one for each weight, or for each row."""
        (rows, columns), width = self.block, self.shape[1]
        across, above, below = -(-width // columns), top // rows, -(-end // rows)
        found = torch.empty(below - above, across, dtype=small.dtype)
        small.read_run(above * across, found)
        each = found.float()[torch.arange(top, end) // rows - above]     # for each row of codes its row of scales
        return each if across == 1 else each.repeat_interleave(columns, 1)[:, :width]


@dataclass(frozen=True)
class Fp8(Layout):
    """A folder of fp8 weights. block None: a scale for the whole weight, or for each row of it."""
    block: Block | None
    NAME = "fp8"

    def __str__(self) -> str:
        return "8 bits" + (f" in blocks of {self.block[0]} × {self.block[1]}" if self.block else "")

    def plain(self, stored: Mapping[str, Stored], where: str) -> dict[str, Stored]:
        plain = without_activations(stored, where)
        for name in stored:
            scale = next((f"{name}{end}" for end in ("_scale_inv", "_scale") if f"{name}{end}" in stored), None)
            if name.endswith(".weight") and scale:
                plain[name] = scaled(name, scale, stored, self.block, where)
                del plain[scale]
        return plain


def scaled(name: str, scale: str, stored: Mapping[str, Stored], block: Block | None, where: str) -> Scaled:
    """The weight of this name, with a scale a block; block None: as many as there are scales."""
    codes = matrix(stored, name, (torch.float8_e4m3fn,), where)
    N, K = codes.shape
    if block is None:
        scales = part(stored, scale, SCALES, where, (), (1,), (1, 1), (N,), (N, 1))
        return packed(Scaled, (N, K), codes, scales, (N, K) if scales.shape in ((), (1,), (1, 1)) else (1, K))
    grid = -(-N // block[0]), -(-K // block[1])
    return packed(Scaled, (N, K), codes, part(stored, scale, SCALES, where, grid), block)


def read(r: Reader) -> Fp8:
    """What a quantization_config says: of fp8, or of fbgemm_fp8, which has a scale a row."""
    r.must("fmt", "e4m3", "float8_e4m3fn")
    r.must("activation_scheme", "dynamic", "static")
    sizes = r.get("weight_block_size", None)
    pair = isinstance(sizes, list) and len(sizes) == 2
    if sizes is not None and not (pair and all(type(size) is int and 0 < size < 2**31 for size in sizes)):
        raise r.error("weight_block_size", "two whole numbers, rows and columns that share a scale")
    r.close(("modules_to_not_convert", "ignored_layers", "scale_fmt", "dequantize", "activation_scale_ub",
             "kv_cache_scheme"))
    return Fp8((sizes[0], sizes[1]) if sizes else None)
