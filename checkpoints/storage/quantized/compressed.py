"""compressed-tensors, which llm-compressor writes: w = s (q − z). What q is, the tensors of a weight tell.

    pack-quantized         X.weight_packed       (N, K b/32) int32    q of 2 to 8 bits, the first in the lowest bits
                           X.weight_scale        (N, G)               s of a group of K/G inputs; G = 1: of a row
                           X.weight_zero_point   (⌈N b/32⌉, G) int32  z, packed down the rows; not there: z = 2^(b−1)
                           X.weight_g_idx        (K,)                 the group of each input, of "actorder": "group"
                           X.weight_shape        (2,)                 N, K
    float-quantized        X.weight, X.weight_scale                   fp8.py: a scale for all, a row, a block, a group
    int-quantized          the same, X.weight of int8                 with X.weight_zero_point of that shape, or none
    naive-quantized        either of the two
    nvfp4-pack-quantized   X.weight_packed uint8, X.weight_scale, X.weight_global_scale                       fp4.py
    mxfp4-pack-quantized   X.weight_packed uint8, X.weight_scale of bytes                                     fp4.py

The library writes the same whole numbers with the signs of two's complement, q − 2^(b−1) and z − 2^(b−1), and adds
2^(b−1) as it packs. config_groups says in which ways weights are kept: of a weight one of them fits its shapes, and
where two do (4 bits or 8 of half as many inputs), weight_shape tells.

Shapes: N outputs, K inputs, G groups of K/G inputs.   https://github.com/vllm-project/compressed-tensors, 0.20
"""

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from checkpoints.names.reader import Reader
from checkpoints.storage.files import Stored
from checkpoints.storage.quantized.fp4 import POWERS, Fp4
from checkpoints.storage.quantized.fp8 import SCALES, Scaled
from checkpoints.storage.quantized.integers import Integers, Ints
from checkpoints.storage.quantized.parts import (
    FLOATS,
    Layout,
    matrix,
    must_be,
    packed,
    part,
    rows_of,
    unpacked,
    whole,
    without_activations,
)
from nanollm.errors import CheckpointError

METHOD, FORMAT = "compressed-tensors", "pack-quantized"
FORMATS = (FORMAT, "float-quantized", "int-quantized", "naive-quantized", "nvfp4-pack-quantized",
           "mxfp4-pack-quantized", "mixed-precision")
PACKED, SCALE, ZERO, SHAPE, ORDER = "_packed", "_scale", "_zero_point", "_shape", "_g_idx"     # behind a weight's name
INSIDE = ("observer", "observer_kwargs", "zp_dtype", "scale_dtype", "targets", "ignore", "version", "weights",
          "input_activations", "output_activations", "kv_cache_scheme", "global_compression_ratio",
          "quantization_status")                 # how it was made, of values that are no weights, or said by the files


@dataclass(frozen=True)
class Scheme:
    """A way in which weights are kept: one of config_groups."""
    bits: int
    type: str                                    # "int" or "float"
    strategy: str                                # what shares a scale
    group: int | None                            # inputs of "group" and "tensor_group"
    block: tuple[int, int] | None                # rows and columns of "block"
    symmetric: bool
    order: bool                                  # inputs are in an order of their own

    def __str__(self) -> str:
        if self.type == "int":
            return str(self.integers)
        return {4: "fp4", 8: "fp8"}[self.bits] + f", a scale a {self.strategy}"

    @property
    def integers(self) -> Integers:
        return Integers(self.bits, self.group, self.symmetric)


@dataclass(frozen=True)
class CompressedTensors(Layout):
    """A folder in this layout."""
    schemes: tuple[Scheme, ...]
    NAME = METHOD

    def __str__(self) -> str:
        return " and ".join(dict.fromkeys(map(str, self.schemes)))

    def plain(self, stored: Mapping[str, Stored], where: str) -> dict[str, Stored]:
        """Every tensor by the name of what it stands for: X.weight in place of its parts. Raises CheckpointError."""
        plain = without_activations(stored, where)
        for name, codes in stored.items():
            weight, bare = name.removesuffix(PACKED), name.endswith(".weight") and name + SCALE in stored
            if not bare and not name.endswith(f".weight{PACKED}"):
                continue
            for part_ in (PACKED, SCALE, ZERO, SHAPE, ORDER, "_global_scale"):
                plain.pop(weight + part_, None)
            if bare:
                plain[weight] = _bytes(weight, stored, self.schemes, where)
            elif codes.dtype == torch.uint8:
                plain[weight] = _fp4(weight, stored, self.schemes, where)
            else:
                plain[weight] = _ints(weight, codes, stored, self.schemes, where)
        return plain


def config(how: Integers, ignore: list[str]) -> dict[str, Any]:
    """The quantization_config of a folder that we write; `ignore` names the Linears that are not quantised."""
    weights = {"num_bits": how.bits, "type": "int", "symmetric": how.symmetric, "dynamic": False,
               "strategy": "channel" if how.group is None else "group", "group_size": how.group}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None,
             "format": FORMAT}
    return {"quant_method": METHOD, "format": FORMAT, "quantization_status": "compressed", "ignore": ignore,
            "kv_cache_scheme": None, "config_groups": {"group_0": group}}


def read(r: Reader) -> CompressedTensors:
    """What a quantization_config says. Raises ConfigError for what is not read: another format, a rotation of the
    inputs, weights that are sparse."""
    must_be(r, "format", *FORMATS)
    r.must("transform_config", None, {})
    sparse = r.inside("sparsity_config")
    if sparse and sparse.get("format", None) != "dense":
        raise sparse.error("format", "'dense', as weights that are sparse on disk are not read")
    groups = r.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(one, dict) for one in groups.values()):
        raise r.error("config_groups", "an object of objects")
    schemes = []
    for name, group in groups.items():
        inner = r.of(group, f"{r.prefix}config_groups.{name}.")
        inner.must("format", None, *FORMATS)
        if not isinstance(inner.get("weights"), dict):
            raise inner.error("weights", "an object")
        schemes.append(_scheme(r.of(group["weights"], f"{inner.prefix}weights.")))
        inner.close(INSIDE)
    r.close(INSIDE)
    return CompressedTensors(tuple(dict.fromkeys(schemes)))


def _scheme(w: Reader) -> Scheme:
    must_be(w, "type", "int", "float")
    real = w.get("type") == "float"
    must_be(w, "num_bits", *((4, 8) if real else (2, 3, 4, 5, 6, 7, 8)))
    must_be(w, "strategy", *{4: ("group", "tensor_group"), 8: ("tensor", "channel", "block", "group")}[
        w.get("num_bits")] if real else ("group", "channel", "tensor"))
    w.must("dynamic", False)
    w.must("actorder", None, "static", "weight", "group", "dynamic")
    strategy, sizes = w.get("strategy"), w.get("block_structure", None)
    grouped = strategy in ("group", "tensor_group")
    size = w.size("group_size", None) if grouped else w.must("group_size", None, -1) and None
    if grouped and size is None:
        raise w.error("group_size", "a number of inputs")
    pair = isinstance(sizes, list) and len(sizes) == 2
    if strategy == "block" and not (pair and all(type(one) is int and 0 < one < 2**31 for one in sizes)):
        raise w.error("block_structure", "two whole numbers, rows and columns that share a scale")
    found = Scheme(w.get("num_bits"), w.get("type"), strategy, size, tuple(sizes) if strategy == "block" else None,
                   w.flag("symmetric", True), w.get("actorder", None) in ("group", "dynamic"))
    w.close(INSIDE)
    return found


# ---- the tensors

def _of_type(name: str, schemes: tuple[Scheme, ...], kind: str, bits: range, where: str) -> list[Scheme]:
    found = [one for one in schemes if one.type == kind and one.bits in bits]
    if not found:
        raise CheckpointError(f"{where}: {name} is stored as {kind} of {bits[-1]} bits; config.json says that weights "
                              f"have {CompressedTensors(schemes)}")
    return found


def _bytes(name: str, stored: Mapping[str, Stored], schemes: tuple[Scheme, ...], where: str) -> Scaled:
    """A weight with a byte for each q."""
    codes = matrix(stored, name, (torch.float8_e4m3fn, torch.int8), where)
    real = codes.dtype == torch.float8_e4m3fn
    fitting = _of_type(name, schemes, "float" if real else "int", range(8, 9) if real else range(2, 9), where)
    N, K = codes.shape
    shapes = [_shapes(N, K, one) for one in fitting]
    scales = part(stored, name + SCALE, SCALES, where, *itertools.chain(*shapes))
    one = next(one for one, each in zip(fitting, shapes, strict=True) if scales.shape in each)
    zeros = stored.get(name + ZERO)
    if not one.symmetric or zeros is not None:
        zeros = part(stored, name + ZERO, (torch.int8, codes.dtype, *FLOATS), where, scales.shape)
    return packed(Scaled, (N, K), codes, scales, _block(N, K, one), zeros)


def _block(N: int, K: int, scheme: Scheme) -> tuple[int, int]:
    """Rows and columns that share a scale."""
    blocks = {"tensor": (N, K), "channel": (1, K), "block": scheme.block or (1, 1)}
    return blocks.get(scheme.strategy, (1, scheme.group or K))


def _shapes(N: int, K: int, scheme: Scheme) -> list[tuple[int, ...]]:
    """The shapes that scales may have: sizes of 1 may be left off."""
    rows, columns = _block(N, K, scheme)
    grid = -(-N // rows), -(-K // columns)
    return [grid, *([grid[:1]] if grid[1] == 1 else []), *([()] if grid == (1, 1) else [])]


def _fp4(name: str, stored: Mapping[str, Stored], schemes: tuple[Scheme, ...], where: str) -> Fp4:
    fitting = {one.group for one in _of_type(name, schemes, "float", range(4, 5), where)}
    codes = matrix(stored, name + PACKED, (torch.uint8,), where)
    N, K = codes.shape[0], 2 * codes.shape[1]
    shapes = [(N, K // group) for group in fitting if group and K % group == 0]
    scales = part(stored, name + SCALE, (torch.uint8, torch.float8_e4m3fn), where, *(shapes or [(N, 0)]))
    if scales.dtype == torch.uint8:
        return packed(Fp4, (N, K), codes, dataclasses.replace(scales, dtype=POWERS))
    one = part(stored, f"{name}_global_scale", (torch.float32,), where, (), (1,))
    return packed(Fp4, (N, K), codes, scales, one, inverse=True)


def _ints(name: str, codes: Stored, stored: Mapping[str, Stored], schemes: tuple[Scheme, ...], where: str) -> Ints:
    wanted = _of_type(name, schemes, "int", range(2, 9), where)
    tried: list[Ints] = []
    problem: CheckpointError | None = None
    for scheme in wanted:
        try:
            tried.append(_of_scheme(name, codes, stored, scheme, where))
        except CheckpointError as error:
            problem = problem or error
    if len(tried) > 1:
        shape = tuple(whole(part(stored, name + SHAPE, (torch.int64, torch.int32), where, (2,))).tolist())
        tried = [one for one in tried if one.shape == shape]
    if not tried:
        raise problem or CheckpointError(f"{where}: {name}: {name + SHAPE} fits no way that config.json says")
    return tried[0]


def _of_scheme(name: str, codes: Stored, stored: Mapping[str, Stored], scheme: Scheme, where: str) -> Ints:
    def wrong(part_: str, expected: str) -> CheckpointError:
        one = stored.get(name + part_)
        found = "missing" if one is None else f"{one.dtype} {one.shape}"
        return CheckpointError(f"{where}: {name}{part_} is {found}; expected {expected}, "
                               f"as config.json says that weights have {how}")

    how = scheme.integers
    if codes.dtype != torch.int32 or len(codes.shape) != 2:
        raise wrong(PACKED, "int32 of two dimensions")
    N, K = codes.shape[0], codes.shape[1] * 32 // how.bits
    scales, zeros, order = (stored.get(name + end) for end in (SCALE, ZERO, ORDER))
    groups = 1 if how.group is None else K // how.group
    if not groups or K % groups or scales is None or scales.dtype not in FLOATS or scales.shape != (N, groups):
        raise wrong(SCALE, f"floats {(N, groups)}")
    if scheme.order and (order is None or order.dtype != torch.int32 or order.shape != (K,)):
        raise wrong(ORDER, f"int32 {(K,)}")
    if how.symmetric:
        found = None
    elif zeros is None or zeros.dtype != torch.int32 or zeros.shape != (-(-N * how.bits // 32), groups):
        raise wrong(ZERO, f"int32 {(-(-N * how.bits // 32), groups)}")
    else:
        small = torch.int8 if how.bits < 8 else torch.int16                     # 0 … 255 are no int8
        found = Zeros(zeros.file, small, (N, groups), zeros.start, zeros.size, zeros, how.bits)
    return packed(Ints, (N, K), codes, scales, found, how, order)


@dataclass(frozen=True)
class Zeros(Stored):
    """z (N, G), of words down the rows: 32 rows are b words."""
    words: Stored
    bits: int

    def read_run(self, first: int, run: Tensor) -> None:
        groups = self.shape[1]
        top, end = first // groups, -(-(first + run.numel()) // groups)
        above, below = top // 32, min(-(-end // 32) * self.bits, self.words.shape[0])
        words = rows_of(self.words, above * self.bits, below).T
        words = torch.nn.functional.pad(words, (0, -words.shape[1] % self.bits))
        rows = unpacked(words.contiguous(), self.bits).T                        # rows from above · 32 on
        run.copy_(rows[top - above * 32 :].flatten()[first - top * groups :][: run.numel()].view(run.shape))


def packed_down(zeros: Tensor, bits: int) -> Tensor:
    """z (N, G) → words (⌈N b/32⌉, G) int32, as they are stored. b divides 32."""
    each = 32 // bits
    full = torch.nn.functional.pad(zeros.T.to(torch.int32), (0, -len(zeros) % each)).unflatten(1, (-1, each))
    return (full << bits * torch.arange(each, dtype=torch.int32)).sum(-1, dtype=torch.int32).T.contiguous()
