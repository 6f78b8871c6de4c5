"""compressed-tensors' "pack-quantized" layout, which llm-compressor writes: weights of 8 or 4 bits as whole numbers.

    w = s (q − z)      X.weight_packed       (N, K b/32) int32    q of b bits, 32/b a word, the first in the lowest bits
                       X.weight_scale        (N, G)               s of a group of K/G inputs; G = 1: of a row
                       X.weight_zero_point   (⌈N b/32⌉, G) int32  z, packed down the rows; not there where z = 2^(b−1)
                       X.weight_shape        (2,)                 N, K; not read, as config.json says so too

The library writes the same numbers with the signs of two's complement, q − 2^(b−1) and z − 2^(b−1), and adds 2^(b−1) as
it packs.

Each of the parts has the rows of the weight X.weight, so what moves rows of a weight (names/ops.py) moves theirs.

Shapes: N outputs, K inputs, G groups of K/G inputs.   https://github.com/vllm-project/compressed-tensors, 0.20
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from checkpoints.names.reader import Reader
from checkpoints.storage.files import Stored
from nanollm.errors import CheckpointError

METHOD, FORMAT = "compressed-tensors", "pack-quantized"
PACKED, SCALE, ZERO, SHAPE = "_packed", "_scale", "_zero_point", "_shape"       # what a weight's name has after it
INSIDE = ("observer", "observer_kwargs", "zp_dtype", "scale_dtype", "targets", "ignore", "version", "weights",
          "global_compression_ratio", "quantization_status")                    # how it was made, or said by the files


@dataclass(frozen=True)
class Integers:
    """How all weights of a folder are kept."""
    bits: int
    group: int | None                            # inputs that share s and z; None: a row
    symmetric: bool                              # without z

    def __str__(self) -> str:
        group = "with a scale a row" if self.group is None else f"in groups of {self.group}"
        return f"{self.bits} bits {group}" + ("" if self.symmetric else ", with zero points")

    def config(self, ignore: list[str]) -> dict[str, Any]:
        """The quantization_config that says so; `ignore` names the Linears that are not quantised."""
        weights = {"num_bits": self.bits, "type": "int", "symmetric": self.symmetric, "dynamic": False,
                   "strategy": "channel" if self.group is None else "group", "group_size": self.group}
        group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None,
                 "format": FORMAT}
        return {"quant_method": METHOD, "format": FORMAT, "quantization_status": "compressed", "ignore": ignore,
                "kv_cache_scheme": None, "config_groups": {"group_0": group}}


def read(r: Reader) -> Integers:
    """What a quantization_config says. Raises ConfigError for what is not read: another format, activations in fewer
    bits, an order of the inputs, several kinds of weights in one folder."""
    r.get("quant_method"), r.get("format")
    _must_be(r, "format", FORMAT)
    for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        r.must(key, None, {})
    groups = r.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1 or not isinstance(next(iter(groups.values())), dict):
        raise r.error("config_groups", "one group, as all weights are kept in one way")
    (name, group), = groups.items()
    inner = Reader(group, r.where, prefix=f"{r.prefix}config_groups.{name}.")
    for key in ("input_activations", "output_activations"):
        inner.must(key, None)
    inner.must("format", None, FORMAT)
    if not isinstance(inner.get("weights"), dict):
        raise inner.error("weights", "an object")
    w = Reader(group["weights"], r.where, prefix=f"{inner.prefix}weights.")
    _must_be(w, "num_bits", 4, 8)
    _must_be(w, "type", "int")
    _must_be(w, "strategy", "group", "channel")
    w.must("dynamic", False)
    w.must("block_structure", None)
    w.must("actorder", None, "static", "weight")         # another has the inputs in an order of its own
    size = w.size("group_size", None) if w.get("strategy") == "group" else w.must("group_size", None, -1) and None
    if w.get("strategy") == "group" and size is None:
        raise w.error("group_size", "a number of inputs")
    found = Integers(w.get("num_bits"), size, w.flag("symmetric", True))
    for each in (r, inner, w):
        each.close(INSIDE)
    return found


def _must_be(r: Reader, key: str, *implemented: Any) -> None:
    """As r.must, of a key that has to be there."""
    r.get(key)
    r.must(key, *implemented)


# ---- the tensors

@dataclass(frozen=True)
class Zeros(Stored):
    """z (N, G), of words that hold those of 32/b rows each."""
    words: Stored
    bits: int

    def read_run(self, first: int, run: Tensor) -> None:
        groups, each = self.shape[1], 32 // self.bits
        top, end = first // groups, -(-(first + run.numel()) // groups)
        above = top // each
        words = torch.empty(-(-end // each) - above, groups, dtype=torch.int32)
        self.words.read_run(above * groups, words)
        whole = _unpacked(words.T.contiguous(), self.bits).T                    # rows from above · each on
        run.copy_(whole[top - above * each :].flatten()[first - top * groups :][: run.numel()].view(run.shape))


@dataclass(frozen=True)
class Ints(Stored):
    """A weight (N, K), which reads as what it stands for; file, start and size are those of its codes."""
    codes: Stored                                # (N, K b/32)
    scales: Stored                               # (N, G)
    zeros: Zeros | None                          # (N, G)
    how: Integers

    def run_dtype(self, wanted: torch.dtype) -> torch.dtype:
        return wanted                            # rounded once, to what is wanted

    def read_run(self, first: int, run: Tensor) -> None:
        """The rows that the run touches are unpacked."""
        width, groups = self.shape[1], self.scales.shape[1]
        top, end = first // width, -(-(first + run.numel()) // width)

        def rows(part: Stored) -> Tensor:
            found = torch.empty(end - top, part.shape[1], dtype=part.dtype)
            part.read_run(top * part.shape[1], found)
            return found

        codes = _unpacked(rows(self.codes), self.how.bits).unflatten(1, (groups, -1))
        zeros = rows(self.zeros)[..., None] if self.zeros else 1 << self.how.bits - 1
        whole = ((codes - zeros).float() * rows(self.scales).float()[..., None]).flatten()
        run.copy_(whole[first - top * width :][: run.numel()].view(run.shape))


def _unpacked(words: Tensor, bits: int) -> Tensor:
    """(…, C) int32 → (…, 32/b C) int32. >> brings the sign along, the mask takes it off."""
    shifts = bits * torch.arange(32 // bits, dtype=torch.int32)
    return (words[..., None] >> shifts & (1 << bits) - 1).flatten(-2)


def packed_down(zeros: Tensor, bits: int) -> Tensor:
    """z (N, G) → words (⌈N b/32⌉, G) int32, as they are stored."""
    each = 32 // bits
    full = torch.nn.functional.pad(zeros.T.to(torch.int32), (0, -len(zeros) % each)).unflatten(1, (-1, each))
    return (full << bits * torch.arange(each, dtype=torch.int32)).sum(-1, dtype=torch.int32).T.contiguous()


def plain_tensors(stored: Mapping[str, Stored], how: Integers, where: str) -> dict[str, Stored]:
    """Every tensor by the name of what it stands for: X.weight in place of its parts. Raises CheckpointError."""
    plain = dict(stored)
    for name, codes in stored.items():
        weight = name.removesuffix(PACKED)
        if not name.endswith(f".weight{PACKED}"):
            continue
        if f"{weight}_g_idx" in stored:
            raise CheckpointError(f"{where}: {weight}_g_idx: inputs in an order of their own, which are not read here")
        for part in (PACKED, SCALE, ZERO, SHAPE):
            plain.pop(weight + part, None)
        plain[weight] = _weight(weight, codes, stored, how, where)
    return plain


def _weight(name: str, codes: Stored, stored: Mapping[str, Stored], how: Integers, where: str) -> Ints:
    def wrong(part: str, one: Stored | None, expected: str) -> CheckpointError:
        found = "missing" if one is None else f"{one.dtype} {one.shape}"
        return CheckpointError(f"{where}: {name}{part} is {found}; expected {expected}, "
                               f"as config.json says that weights have {how}")

    if codes.dtype != torch.int32 or len(codes.shape) != 2:
        raise wrong(PACKED, codes, "int32 of two dimensions")
    N, K = codes.shape[0], codes.shape[1] * (32 // how.bits)
    scales, zeros = stored.get(name + SCALE), stored.get(name + ZERO)
    groups = 1 if how.group is None else K // how.group
    if scales is None or not scales.dtype.is_floating_point or scales.shape != (N, groups) or K != K // groups * groups:
        raise wrong(SCALE, scales, f"floats {(N, groups)}")
    if how.symmetric:
        found = None
    elif zeros is None or zeros.dtype != torch.int32 or zeros.shape != (-(-N * how.bits // 32), groups):
        raise wrong(ZERO, zeros, f"int32 {(-(-N * how.bits // 32), groups)}")
    else:
        small = torch.int8 if how.bits == 4 else torch.int16                    # 0 … 255 are no int8
        found = Zeros(zeros.file, small, (N, groups), zeros.start, zeros.size, zeros, how.bits)
    return Ints(codes.file, torch.bfloat16, (N, K), codes.start, codes.size, codes, scales, found, how)
