"""Writing a GGUF: its header first, then each tensor at its place, packed as it comes.

    F32 F16 BF16    the numbers themselves
    Q8_0            blocks of 32 numbers of a row: d = max|x| / 127 in float16, then round(x / d) in 8 bits

The gguf package's writer writes the header, as it knows the format's types and its padding. The tensors follow in any
order, a run at a time, as in writing.py: so no more than a run of one tensor is in memory.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from checkpoints.storage import gguf
from checkpoints.storage.files import Stored, as_bytes

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "Q8_0": torch.float32}
BLOCK = 32                                       # numbers that share a scale in Q8_0


@dataclass(frozen=True)
class Target(Stored):
    """Where a tensor goes. dtype is that of a run before it is packed."""
    kind: str                                    # of DTYPES
    added: float                                 # added to every number: 1 to the gains of Gemma's norms

    def packed(self, first: int, run: Tensor) -> tuple[int, memoryview]:
        """The byte of the file where a run that begins with the first-th number goes, and what is written there."""
        values = run + self.added if self.added else run
        if self.kind != "Q8_0":
            return self.start + first * self.dtype.itemsize, as_bytes(values)
        from gguf import GGMLQuantizationType, quants
        blocks = quants.quantize(values.numpy().reshape(1, -1), GGMLQuantizationType.Q8_0)
        return self.start + first // BLOCK * (BLOCK + 2), blocks.reshape(-1).data

    def holds(self, first: int, run: Tensor) -> bool:
        """Whether the file has there what `packed` says."""
        at, data = self.packed(first, run)
        with open(self.file, "rb") as file:
            file.seek(at)
            return file.read(data.nbytes) == data


def lay_out(path: Path, architecture: str, keys: Mapping[str, Any], kinds: Mapping[str, str],
            shapes: Mapping[str, tuple[int, ...]], norm_offset: float) -> dict[str, Stored]:
    """Write the header of a new file and make room behind it. Where each tensor goes; nothing is written there yet."""
    package = gguf.package(path)
    w = package.GGUFWriter(path, architecture)
    for key, value in keys.items():
        add = {bool: w.add_bool, int: w.add_uint32, float: w.add_float32, str: w.add_string, list: w.add_array}
        add[type(value)](key, value)
    for name, kind in kinds.items():
        dtype = package.GGMLQuantizationType[kind]
        w.add_tensor_info(name, shapes[name], np.float32, nbytes(kind, shapes[name]), dtype)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_ti_data_to_file()
    w.close()
    header = gguf.read_header(path)
    places: dict[str, Stored] = {}
    end = header.data
    for entry in header.entries:
        kind, size = kinds[entry.name], nbytes(kinds[entry.name], entry.shape)
        start, end = header.data + entry.offset, header.data + entry.offset + size
        added = norm_offset if entry.name.endswith("norm.weight") else 0.0
        places[entry.name] = Target(path, DTYPES[kind], entry.shape, start, size, kind, added)
    with open(path, "r+b") as file:
        file.truncate(-(-end // 32) * 32)        # padded to the alignment, as every tensor is
    return places


def nbytes(kind: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of this type and shape."""
    count = math.prod(shape)
    return count // BLOCK * (BLOCK + 2) if kind == "Q8_0" else count * DTYPES[kind].itemsize


def kind_of(name: str, shape: tuple[int, ...], wanted: str) -> str:
    """The type of a tensor, as llama.cpp's converter chooses: vectors, routers and biases stay exact; rows that are no
    multiple of a block are F16."""
    if len(shape) == 1 or name.endswith((".bias", "ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight")):
        return "F32"
    return "F16" if wanted == "Q8_0" and shape[-1] % BLOCK else wanted
