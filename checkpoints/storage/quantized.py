"""Quantised folders, read as the weights that they encode. Only this file knows that a tensor has fewer bits on disk.

    fp8      w = q · s              X.weight             (N, K)               float8_e4m3fn
                                    X.weight_scale_inv   (⌈N/128⌉, ⌈K/128⌉)   float32: s, for each block of 128 × 128;
                                                                              those at the edges are cut off
             DeepSeek-V3, R1, Qwen3-…-FP8; s is the inverse of what w was scaled by
    mxfp4    w = f(q) · 2^(e−127)   X_blocks             (E, R, K/32, 16)     two 4-bit q a byte, low half first
                                    X_scales             (E, R, K/32)         bytes: e, for 32 neighbours
             gpt-oss; X itself is (E, K, R), each expert transposed
             f(q)    0 ½ 1 1½ 2 3 4 6, and from 8 on the same with a minus: 1 bit sign, 2 exponent, 1 fraction
                                                         OCP Microscaling Formats 1.0, §5.3.3 and 5.4.1

    pack-quantized     whole numbers of 8 and 4 bits    compressed-tensors': compressed.py

`plain_config` takes the quantization_config out of a config, and `plain_tensors` puts one name, X, in the place of two;
what follows, tables and ops, has a bfloat16 tensor. It is made when it is read, a run at a time, and never all of it in
float32. A model is saved as what it is then: bfloat16, or what `dtype` asked for, and no quantization_config. Whole
numbers can stay what they are: checkpoints/packing.py.

Shapes: N outputs, K inputs, E experts, R rows of an expert's matrix.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints.names.reader import Reader, brief
from checkpoints.storage import compressed
from checkpoints.storage.compressed import Integers
from checkpoints.storage.files import Stored
from nanollm.errors import CheckpointError, ConfigError

WRITE = ('python -c "import transformers as t; t.AutoModelForCausalLM.from_pretrained(\'FOLDER\'{options})'
         '.save_pretrained(\'OUT\'{saved})"')
UPLOAD = "Take the unquantised upload, of which this was made"
# what others call their ways of storing fewer bits: the name that people know, and what works to undo it
METHODS = {
    "bitsandbytes": ("bitsandbytes", "Where bitsandbytes and accelerate are installed: " + WRITE.format(
        options=").dequantize(", saved=", save_original_format=False") + "; or take the unquantised upload"),
    "compressed-tensors": ("compressed-tensors", "Where compressed-tensors is installed: " + WRITE.format(
        options=", quantization_config=t.CompressedTensorsConfig(dequantize=True)", saved="")
        + "; or take the unquantised upload"),
    "gptq": ("GPTQ", UPLOAD), "awq": ("AWQ", UPLOAD), "auto-round": ("AutoRound", UPLOAD),
    "modelopt": ("NVIDIA's ModelOpt", UPLOAD), "fbgemm_fp8": ("FBGEMM's fp8", UPLOAD),
    "mlx": ("MLX", "On a Mac: mlx_lm.convert --hf-path FOLDER --mlx-path OUT --dequantize; "
                   "or take the unquantised upload"),
}
MARKS = {  # how such a tensor's name ends, where config.json does not say it
    ".qweight": "GPTQ or AWQ", ".weight_packed": "compressed-tensors", ".weight.absmax": "bitsandbytes",
    ".SCB": "bitsandbytes",
}
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


@dataclass(frozen=True)
class Packed(Stored):
    """A weight that is two stored tensors. shape is its own, dtype bfloat16; file, start, size are those of `codes`."""
    codes: Stored
    scales: Stored

    def run_dtype(self, wanted: torch.dtype) -> torch.dtype:
        return wanted                            # rounded once, to what is wanted


# ---- what is there

def plain_config(values: dict[str, Any],
                 where: str = "config.json") -> tuple[dict[str, Any], tuple[int, int] | Integers | None]:
    """config.json without its quantization_config, and the blocks of fp8 weights, or how whole numbers are kept.

    Raises ConfigError for others."""
    mlx = values.get("quantization")
    if isinstance(mlx, dict) and "bits" in mlx:
        raise _unread(where, "quantization", mlx, "mlx")
    key = next((key for key in ("quantization_config", "compression_config") if values.get(key) is not None), None)
    plain = {name: value for name, value in values.items() if name != "quantization_config"}
    if key is None:
        return plain, None
    found, block = values[key], None
    if not isinstance(found, dict):
        raise ConfigError(f"{where}: {key} is {brief(found)}; expected an object")
    r = Reader(found, where, prefix=f"{key}.")
    method, producer = r.get("quant_method", None), found.get("producer")
    if method == compressed.METHOD and key == "quantization_config":
        try:
            return plain, compressed.read(r)
        except ConfigError as error:
            raise ConfigError(f"{error}. Read of compressed-tensors are weights of 8 and 4 bits, {compressed.FORMAT}. "
                              f"{_undo(method, where)}") from None
    if method not in ("fp8", "mxfp4"):
        named = producer.get("name") if method is None and isinstance(producer, dict) else method
        raise _unread(where, f"{key}.quant_method", method, named)
    try:
        block = _block(r) if method == "fp8" else None
        r.close(("modules_to_not_convert", "scale_fmt", "dequantize"))
    except ConfigError as error:
        raise ConfigError(f"{error}. Read are fp8 in blocks, and mxfp4. {UPLOAD}") from None
    return plain, block


def _block(r: Reader) -> tuple[int, int]:
    """Rows and columns that share a scale of fp8. Raises ConfigError where scales are stored in another way."""
    r.must("fmt", "e4m3")
    r.must("activation_scheme", "dynamic")               # with another, activations have stored scales
    sizes = r.get("weight_block_size")
    pair = isinstance(sizes, list) and len(sizes) == 2
    if not pair or not all(type(size) is int and 0 < size < 2**31 for size in sizes):
        raise r.error("weight_block_size", "two whole numbers, rows and columns that share a scale")
    return sizes[0], sizes[1]


def _unread(where: str, key: str, value: Any, method: Any) -> ConfigError:
    name = METHODS.get(method, (brief(method),))[0] if isinstance(method, str) else "an unknown way"
    return ConfigError(f"{where}: {key} is {brief(value)}: weights quantised by {name}, which are not read here; read "
                       f"are fp8 in blocks, mxfp4, and compressed-tensors' whole numbers. {_undo(method, where)}")


def _undo(method: Any, where: str) -> str:
    """What to do about weights that are not read, the config.json `where` says so of."""
    undo = METHODS.get(method, ("", UPLOAD))[1] if isinstance(method, str) else UPLOAD
    return undo.replace("FOLDER", str(Path(where).parent))


def plain_tensors(stored: Mapping[str, Stored], how: tuple[int, int] | Integers | None,
                  where: str = "weights") -> dict[str, Stored]:
    """Every tensor by the name of what it stands for. `how` is that of `plain_config`; None: nothing is fp8."""
    if isinstance(how, Integers):
        return compressed.plain_tensors(stored, how, where)
    for mark, method in MARKS.items():
        if marked := next((name for name in stored if name.endswith(mark)), None):
            raise CheckpointError(f"{where}: {marked}: weights quantised by {method}, which are not read here. "
                                  f"{UPLOAD}")
    plain = dict(stored)
    for name, one in stored.items():
        if how and name.endswith(".weight_scale_inv") and (weight := name.removesuffix("_scale_inv")) in stored:
            plain[weight] = _fp8(weight, stored[weight], one, how, where)
            del plain[name]
        scales = name.removesuffix("blocks") + "scales"
        if name.endswith("_blocks") and scales in stored and one.dtype == torch.uint8:
            plain[name.removesuffix("_blocks")] = _mxfp4(name, one, stored[scales], where)
            del plain[name], plain[scales]
    return plain


def _fp8(name: str, codes: Stored, scales: Stored, block: tuple[int, int], where: str) -> Packed:
    if codes.dtype != torch.float8_e4m3fn or scales.dtype != torch.float32 or len(codes.shape) != 2:
        raise CheckpointError(f"{where}: {name} is {codes.dtype} {codes.shape} with scales of {scales.dtype}; "
                              f"expected a matrix of float8_e4m3fn with float32")
    grid = tuple(-(-size // part) for size, part in zip(codes.shape, block, strict=True))
    if scales.shape != grid:
        raise CheckpointError(f"{where}: {name} {codes.shape} has scales {scales.shape}; "
                              f"expected {grid}, one for {block[0]} × {block[1]}")
    return Fp8(codes.file, torch.bfloat16, codes.shape, codes.start, codes.size, codes, scales, block)


def _mxfp4(name: str, codes: Stored, scales: Stored, where: str) -> Packed:
    if scales.dtype != torch.uint8 or len(scales.shape) != 3 or codes.shape != (*scales.shape, 16):
        raise CheckpointError(f"{where}: {name} is {codes.shape} with scales {scales.dtype} {scales.shape}; "
                              f"expected (E, R, G, 16) with bytes (E, R, G)")
    E, R, G = scales.shape
    return Mxfp4(codes.file, torch.bfloat16, (E, 32 * G, R), codes.start, codes.size, codes, scales)


# ---- the numbers

@dataclass(frozen=True)
class Fp8(Packed):
    """A matrix (N, K) of fp8 with a scale for each block."""
    block: tuple[int, int]                       # rows and columns that share a scale

    def read_run(self, first: int, run: Tensor) -> None:
        """The rows that the run touches are unpacked."""
        width, (rows, columns) = self.shape[1], self.block
        top, end = first // width, -(-(first + run.numel()) // width)
        codes = torch.empty(end - top, width, dtype=self.codes.dtype)
        self.codes.read_run(top * width, codes)
        above, below = top // rows, -(-end // rows)                          # rows of scales
        scales = torch.empty(below - above, self.scales.shape[1], dtype=self.scales.dtype)
        self.scales.read_run(above * self.scales.shape[1], scales)
        each = (torch.arange(top, end) // rows) - above                      # for each row of codes its row of scales
        whole = codes.float() * scales[each].repeat_interleave(columns, 1)[:, :width]
        run.copy_(whole.flatten()[first - top * width :][: run.numel()].view(run.shape))


@dataclass(frozen=True)
class Mxfp4(Packed):
    """Experts (E, K, R), each stored as its transpose in groups of 32."""

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
            powers = torch.empty(R, K // 32, dtype=torch.uint8)
            self.codes.read_run(e * codes.numel(), codes)
            self.scales.read_run(e * powers.numel(), powers)
            whole = unpacked(codes[:, low:high], powers[:, low:high]).T.flatten()
            out[done : done + count].copy_(whole[inside - low * 32 * R :][:count])
            done += count


def unpacked(codes: Tensor, powers: Tensor) -> Tensor:
    """Of one expert of mxfp4: bytes (R, G, 16) and (R, G) → (R, 32 G) float32."""
    halves = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)              # (R, G, 32)
    return torch.ldexp(torch.tensor(FP4)[halves.int()], powers.int()[..., None] - 127).flatten(-2)
