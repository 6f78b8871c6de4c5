"""AWQ's layout, as AutoAWQ writes it ("version": "gemm"): 4 bits, the matrix turned over, outputs shuffled in a word.

    w[n, k] = s[g, n] (q[k, n] − z[g, n])        g = k // group_size

    qweight   (K, N/8) int32     q, packed along the outputs: of 8 neighbours n the word has, from its lowest bits on,
    qzeros    (G, N/8) int32     z, likewise                                          those of n = 0 2 4 6 1 3 5 7
    scales    (G, N) float16     s

AWQ scales activations before it rounds; the scales are folded into what stands before a layer, so none is left here.

Shapes: N outputs, K inputs, G groups.   Lin et al. 2023 (arXiv 2306.00978); https://github.com/casper-hansen/AutoAWQ
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from checkpoints.names.reader import Reader
from checkpoints.storage.files import Stored
from checkpoints.storage.quantized.integers import Integers, Ints
from checkpoints.storage.quantized.parts import (
    FLOATS,
    Held,
    Layout,
    matrix,
    packed,
    part,
    rows_of,
    turned,
    unpacked,
    whole,
)
from nanollm.errors import CheckpointError

PLACES = (0, 4, 1, 5, 2, 6, 3, 7)                # where in a word n = 0 … 7 stand
SLAB = 1 << 20                                   # numbers that are unpacked at a time
MADE = ("backend", "do_fuse", "exllama_config", "fuse_max_seq_len", "modules_to_fuse", "modules_to_not_convert",
        "zero_point", "format")


@dataclass(frozen=True)
class Awq(Layout):
    """A folder in this layout."""
    group: int | None                            # None: a row
    NAME = "AWQ"

    def __str__(self) -> str:
        return str(Integers(4, self.group, False))

    def plain(self, stored: Mapping[str, Stored], where: str) -> dict[str, Stored]:
        plain = dict(stored)
        for name in stored:
            if name.endswith(".qweight"):
                module = name.removesuffix(".qweight")
                for one in ("qweight", "qzeros", "scales"):
                    plain.pop(f"{module}.{one}", None)
                plain[f"{module}.weight"] = self._weight(module, stored, where)
        return plain

    def _weight(self, module: str, stored: Mapping[str, Stored], where: str) -> Ints:
        codes = matrix(stored, f"{module}.qweight", (torch.int32,), where)
        K, N = codes.shape[0], codes.shape[1] * 8
        group = self.group or K
        if K % group or K % 8:
            raise CheckpointError(f"{where}: {module}.qweight is {codes.shape}; expected (K, N/8), K a multiple of the "
                                  f"group of {group}, as config.json says")
        G = K // group
        scales = part(stored, f"{module}.scales", FLOATS, where, (G, N))
        zeros = part(stored, f"{module}.qzeros", (torch.int32,), where, (G, N // 8))
        return packed(Ints, (N, K), Codes(codes.file, torch.int32, (N, K // 8), codes.start, codes.size, codes),
                      turned(scales), Zeros(zeros.file, torch.int8, (N, G), zeros.start, zeros.size, zeros),
                      Integers(4, None if G == 1 else group, False))


@dataclass(frozen=True)
class Codes(Held):
    """q (N, K/8), eight inputs a word as everywhere else, of words (K, N/8)."""

    def make(self) -> Tensor:
        """int32 (N, K/8): the words turned over and put in order, a slab of inputs at a time."""
        (N, words), each = self.shape, max(1, SLAB // self.shape[0] // 8)       # words of a row that are made at a time
        out = torch.empty(N, words, dtype=torch.int32)
        shifts = 4 * torch.arange(8, dtype=torch.int32)[:, None]
        for first in range(0, words, each):
            theirs = rows_of(self.of, 8 * first, 8 * min(first + each, words)).unflatten(0, (-1, 8))
            for n, place in enumerate(PLACES):
                ours = ((theirs >> 4 * place & 15) << shifts).sum(1, dtype=torch.int32)            # (each, N/8)
                out[n::8, first : first + each] = ours.T
        return out


@dataclass(frozen=True)
class Zeros(Held):
    """z (N, G), of words (G, N/8)."""

    def make(self) -> Tensor:
        return in_order(whole(self.of)).to(torch.int8).T.contiguous()


def in_order(words: Tensor) -> Tensor:
    """(R, N/8) int32 → (R, N) int32."""
    return unpacked(words, 4).unflatten(1, (-1, 8))[..., PLACES].flatten(1)


def read(r: Reader) -> Awq:
    """What a quantization_config says. Raises ConfigError for packings other than gemm."""
    r.must("bits", 4)
    r.must("w_bit", 4)
    r.must("version", "gemm", "GEMM")
    key = "q_group_size" if "q_group_size" in r.values else "group_size"         # of AutoAWQ's own quant_config.json
    found = Awq(None if r.get(key, 128) == -1 else r.size(key, 128))
    r.close(MADE)
    return found
