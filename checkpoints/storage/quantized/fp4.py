"""Four bits, of which one is a sign, two an exponent: w = f(q) s, or f(q) s t. Two q share a byte, the low half first.

    f(q)    0 ½ 1 1½ 2 3 4 6, and from 8 on the same with a minus        OCP Microscaling Formats 1.0, §5.3.3 and 5.4.1

    mxfp4    s = 2^(e−127), a byte e for 32 neighbours
             gpt-oss                X_blocks   (E, R, K/32, 16)      X_scales              (E, R, K/32)
                                    X itself is (E, K, R), each expert transposed
             compressed-tensors     X.weight_packed   (N, K/2)       X.weight_scale        (N, K/32)
    nvfp4    s is a float8_e4m3fn for 16 neighbours; t, a float32, is one for the whole weight
             ModelOpt               X.weight          (N, K/2)       X.weight_scale        (N, K/16)
                                                                     X.weight_scale_2      ()            t
             compressed-tensors     X.weight_packed   (N, K/2)       X.weight_scale        (N, K/16)
                                                                     X.weight_global_scale (1,)          1/t

Shapes: N outputs, K inputs, E experts, R rows of an expert's matrix.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from checkpoints.names.reader import Reader
from checkpoints.storage.files import Stored
from checkpoints.storage.quantized.parts import Layout, Packed, packed, rows_of, whole
from nanollm.errors import CheckpointError

POWERS = torch.float8_e8m0fnu                    # a byte e stands for 2^(e−127), and 255 for a NaN
LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


@dataclass(frozen=True)
class Fp4(Packed):
    """A matrix (N, K)."""
    scales: Stored                               # (N, K/32) of POWERS, or (N, K/16) float8_e4m3fn
    second: Stored | None = None                 # t, one number
    inverse: bool = False                        # what is stored is 1/t

    def rows(self, top: int, end: int) -> Tensor:
        scales = rows_of(self.scales, top, end).float()
        if self.second:
            t = whole(self.second).float().view(())
            scales = scales / t if self.inverse else scales * t
        codes = rows_of(self.codes, top, end).unflatten(1, (scales.shape[1], -1))
        return (values(codes) * scales[..., None]).flatten(1)


@dataclass(frozen=True)
class Mxfp4(Packed):
    """Experts (E, K, R), each stored as its transpose in groups of 32."""
    scales: Stored

    def read_run(self, first: int, run: Tensor) -> None:
        """Of each expert that the run touches, the groups of 32 inputs are unpacked that it touches."""
        (_, K, R), out = self.shape, run.view(-1)
        done = 0
        while done < out.numel():
            e, inside = divmod(first + done, K * R)
            count = min(K * R - inside, out.numel() - done)
            low = inside // R // 32
            high = (inside + count - 1) // R // 32 + 1
            codes = torch.empty(R, K // 32, 16, dtype=torch.uint8)
            powers = torch.empty(R, K // 32, dtype=POWERS)
            self.codes.read_run(e * codes.numel(), codes)
            self.scales.read_run(e * powers.numel(), powers)
            found = values(codes[:, low:high]) * powers[:, low:high].float()[..., None]
            out[done : done + count].copy_(found.flatten(1).T.flatten()[inside - low * 32 * R :][:count])
            done += count


def values(codes: Tensor) -> Tensor:
    """Bytes (…, C) → f(q) (…, 2 C) float32."""
    return torch.tensor(LEVELS)[torch.stack([codes & 15, codes >> 4], -1).flatten(-2).int()]


@dataclass(frozen=True)
class GptOss(Layout):
    """A folder of gpt-oss."""
    NAME = "mxfp4"

    def __str__(self) -> str:
        return "4 bits in groups of 32"

    def plain(self, stored: Mapping[str, Stored], where: str) -> dict[str, Stored]:
        return experts(stored, where)


def experts(stored: Mapping[str, Stored], where: str) -> dict[str, Stored]:
    """Every tensor by its own name: X in place of X_blocks and X_scales."""
    plain = dict(stored)
    for name, codes in stored.items():
        weight = name.removesuffix("_blocks")
        if weight == name or f"{weight}_scales" not in stored or codes.dtype != torch.uint8:
            continue
        scales = stored[f"{weight}_scales"]
        if scales.dtype != torch.uint8 or len(scales.shape) != 3 or codes.shape != (*scales.shape, 16):
            raise CheckpointError(f"{where}: {name} is {codes.shape} with scales {scales.dtype} {scales.shape}; "
                                  f"expected (E, R, G, 16) with bytes (E, R, G)")
        E, R, G = scales.shape
        plain[weight] = packed(Mxfp4, (E, 32 * G, R), codes, dataclasses.replace(scales, dtype=POWERS))
        del plain[name], plain[f"{weight}_scales"]
    return plain


def read(r: Reader) -> GptOss:
    r.close(("modules_to_not_convert", "dequantize"))
    return GptOss()
