"""bitsandbytes' layouts: blocks of a weight in 4 bits, or rows of it in 8.

    4 bits    w = a · map[q]       q of two neighbours share a byte, the first in its upper half; a is of 64 neighbours,
                                   which run through the weight row after row
              X.weight                                       (N K/2, 1)    q; perhaps as another dtype (quant_storage)
              X.weight.quant_map                             (16,)         the levels of nf4 or fp4
              X.weight.absmax                                (b,)          a, float32, or of double quantisation c:
              X.weight.nested_absmax, .nested_quant_map      (b/256,), (256,)      a = s · map'[c] + m
              X.weight.quant_state.bitsandbytes__nf4         bytes of JSON: the shape, the size of blocks, m
    8 bits    w = s q / 127        LLM.int8
              X.weight (N, K) int8,  X.SCB (N,) float32: s,  X.weight_format: 0, for rows

Activations that stand out are multiplied in 16 bits elsewhere, the others in 8 (llm_int8_threshold); not here.

Shapes: N outputs, K inputs, b blocks.   Dettmers et al. 2022 and 2023 (arXiv 2208.07339, 2305.14314); layers/nf4.py
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from checkpoints.names.reader import Reader, is_number
from checkpoints.storage.files import Stored, as_bytes, parse_json
from checkpoints.storage.quantized.fp8 import Scaled
from checkpoints.storage.quantized.parts import Layout, Packed, matrix, packed, part, whole
from nanollm.errors import CheckpointError

STATE = ".quant_state.bitsandbytes__"
KINDS = ("nf4", "fp4")
MADE = ("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant",
        "llm_int8_enable_fp32_cpu_offload", "llm_int8_has_fp16_weight", "llm_int8_skip_modules", "llm_int8_threshold",
        "load_in_4bit", "load_in_8bit", "modules_to_not_convert")
LARGEST = 100_000                                # bytes of the JSON of a weight
LONGEST = 4096                                   # numbers that share an a, or an s


@dataclass(frozen=True)
class Blocks(Packed):
    """A weight of 4 bits."""
    scales: Stored                               # (b,) a, or c
    levels: Stored                               # (16,)
    block: int                                   # weights that share an a
    nested: "Nested | None" = None

    def read_run(self, first: int, run: Tensor) -> None:
        """Blocks that the run touches are unpacked."""
        count = math.prod(self.shape)
        top, end = first // self.block, -(-(first + run.numel()) // self.block)
        low, high = top * self.block, min(end * self.block, count)
        codes = torch.empty(-(-high // 2) - low // 2, dtype=torch.uint8)
        self.codes.read_run(low // 2, codes)
        scales = torch.empty(end - top, dtype=self.scales.dtype)
        self.scales.read_run(top, scales)
        a = self.nested.numbers(scales, top) if self.nested else scales
        values = whole(self.levels)[torch.stack([codes >> 4, codes & 15], -1).flatten().int()]
        a = a.repeat_interleave(self.block)[: high - low]
        run.copy_((values[low % 2 :][: high - low] * a)[first - low :][: run.numel()].view(run.shape))


@dataclass(frozen=True)
class Nested:
    """Double quantisation: a = s map'[c] + m."""
    scales: Stored                               # (b / block,) s
    levels: Stored                               # (256,) map'
    block: int
    mean: float                                  # m

    def numbers(self, codes: Tensor, first: int) -> Tensor:
        """a of the blocks from the first-th on."""
        each = torch.arange(first, first + len(codes)) // self.block
        return whole(self.levels)[codes.int()] * whole(self.scales)[each] + torch.tensor(self.mean)


@dataclass(frozen=True)
class BitsAndBytes(Layout):
    """A folder in one of the two layouts, or in both."""
    bits: int
    NAME = "bitsandbytes"

    def __str__(self) -> str:
        return "4 bits in blocks" if self.bits == 4 else "8 bits with a scale a row"

    def plain(self, stored: Mapping[str, Stored], where: str) -> dict[str, Stored]:
        """X.weight in the place of its codes, scales and state. Raises CheckpointError."""
        plain = dict(stored)
        for name in stored:
            weight, _, kind = name.partition(STATE)
            if kind:
                for one in [f"{weight}.{end}" for end in (
                        "absmax", "quant_map", "nested_absmax", "nested_quant_map")] + [name]:
                    plain.pop(one, None)
                plain[weight] = _four(weight, kind, stored, where)
            elif name.endswith(".SCB"):
                module = name.removesuffix(".SCB")
                plain[f"{module}.weight"] = _eight(module, stored, where)
                for end in ("SCB", "weight_format"):
                    plain.pop(f"{module}.{end}", None)
        return plain


def _four(name: str, kind: str, stored: Mapping[str, Stored], where: str) -> Blocks:
    state = part(stored, name + STATE + kind, (torch.uint8,), where)
    if kind not in KINDS or state.size > LARGEST:
        raise CheckpointError(f"{where}: {name}{STATE}{kind} is of {state.size} bytes; expected "
                              f"{' or '.join(KINDS)}, and less than {LARGEST}")
    said = Reader(parse_json(bytes(as_bytes(whole(state))), f"{where}: {name}{STATE}{kind}"), f"{where}: {name}")
    shape, block = said.get("shape"), said.size("blocksize", most=LONGEST)
    good = isinstance(shape, list) and shape and all(type(one) is int and 0 < one < 2**31 for one in shape)
    if not good or block % 2:
        raise said.error("shape", "whole numbers, and an even blocksize")
    count = math.prod(shape)
    codes = stored.get(name)
    if codes is None or codes.size != -(-count // 2):
        raise CheckpointError(f"{where}: {name} is {'missing' if codes is None else f'{codes.size} bytes'}; expected "
                              f"{-(-count // 2)}, as its quant_state says that it is {tuple(shape)} in 4 bits")
    codes = dataclasses.replace(codes, dtype=torch.uint8, shape=(codes.size,))
    levels, b = part(stored, f"{name}.quant_map", (torch.float32,), where, (16,)), -(-count // block)
    if said.get("nested_blocksize", None) is None:
        scales, nested = part(stored, f"{name}.absmax", (torch.float32,), where, (b,)), None
    else:
        inner, mean = said.size("nested_blocksize", most=LONGEST), said.get("nested_offset")
        if not is_number(mean, -1e38):
            raise said.error("nested_offset", "a finite number")
        scales = part(stored, f"{name}.absmax", (torch.uint8,), where, (b,))
        nested = Nested(part(stored, f"{name}.nested_absmax", (torch.float32,), where, (-(-b // inner),)),
                        part(stored, f"{name}.nested_quant_map", (torch.float32,), where, (256,)), inner, mean)
    return Blocks(codes.file, torch.bfloat16, tuple(shape), codes.start, codes.size, codes, scales, levels, block,
                  nested)


def _eight(module: str, stored: Mapping[str, Stored], where: str) -> Scaled:
    codes = matrix(stored, f"{module}.weight", (torch.int8,), where)
    N, K = codes.shape
    scales = part(stored, f"{module}.SCB", (torch.float32, torch.float16, torch.bfloat16), where, (N,))
    if f"{module}.weight_format" in stored:
        layout = int(whole(part(stored, f"{module}.weight_format", (torch.uint8,), where, (), (1,))))
        if layout:
            raise CheckpointError(f"{where}: {module}.weight_format is {layout}; expected 0, rows as they are: the "
                                  "others are for one kind of GPU. Load it there and save it again")
    return packed(Scaled, (N, K), codes, scales, (1, K), None, 1 / 127)


def read(r: Reader) -> BitsAndBytes:
    """What a quantization_config says: nothing that the tensors do not."""
    four = r.get("load_in_4bit", False)
    r.must("bnb_4bit_quant_type", "fp4", *KINDS)
    r.close(MADE)
    return BitsAndBytes(4 if four else 8)
