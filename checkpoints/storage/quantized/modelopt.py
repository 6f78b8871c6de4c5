"""NVIDIA's ModelOpt: fp8 with a scale for a weight or a row (fp8.py), and nvfp4 (fp4.py). Its tensors tell which.

    FP8       w = s q          X.weight (N, K) float8_e4m3fn,  X.weight_scale () or (N,)
    NVFP4     w = f(q) s t     X.weight (N, K/2) uint8,  X.weight_scale (N, K/16) float8_e4m3fn,  X.weight_scale_2 ()

X.input_scale, k_scale and v_scale are of activations and the cache, and passed over. config.json says it in
quantization_config, in older folders without quant_method; still older ones have hf_quant_config.json beside it.

Of the other algorithms, AWQ's have a scale for the inputs besides (pre_quant_scale), and SVDQuant's another product.

Shapes: N outputs, K inputs.   https://github.com/NVIDIA/Model-Optimizer, 0.47
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from checkpoints.names.reader import Reader, brief
from checkpoints.storage.files import Stored
from checkpoints.storage.quantized import fp8
from checkpoints.storage.quantized.fp4 import Fp4
from checkpoints.storage.quantized.parts import Layout, matrix, packed, part
from nanollm.errors import CheckpointError

FILE = "hf_quant_config.json"
ALGORITHMS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "NVFP4", "W4A16_NVFP4")
MIXED = "MIXED_PRECISION"                        # one of these for each layer, in quantized_layers
MADE = ("config_groups", "ignore", "exclude_modules", "kv_cache_scheme", "kv_cache_quant_algo", "producer",
        "group_size", "modules_to_not_convert", "quant_method")


@dataclass(frozen=True)
class ModelOpt(Layout):
    """A folder of ModelOpt's."""
    algorithms: tuple[str, ...]
    others: fp8.Fp8                              # weights with scales in blocks, which another program made before
    NAME = "ModelOpt"

    def __str__(self) -> str:
        return " and ".join(self.algorithms)

    def plain(self, stored: Mapping[str, Stored], where: str) -> dict[str, Stored]:
        twice = [name for name in stored if name.endswith(".weight_scale_2")]
        plain = dict(stored)
        for name in twice:
            weight = name.removesuffix("_scale_2")
            plain[weight] = _nvfp4(weight, stored, where)
            del plain[name], plain[f"{weight}_scale"]
        return self.others.plain(plain, where)


def _nvfp4(name: str, stored: Mapping[str, Stored], where: str) -> Fp4:
    codes = matrix(stored, name, (torch.uint8,), where)
    if codes.shape[1] % 8:
        raise CheckpointError(f"{where}: {name} is {codes.dtype} {codes.shape}; expected a matrix (N, K/2), K a "
                              "multiple of 16")
    N, K = codes.shape[0], 2 * codes.shape[1]
    scales = part(stored, f"{name}_scale", (torch.float8_e4m3fn,), where, (N, K // 16))
    return packed(Fp4, (N, K), codes, scales, part(stored, f"{name}_scale_2", (torch.float32,), where, (), (1,)))


def is_it(found: dict[str, Any]) -> bool:
    """Whether a quantization_config is ModelOpt's, whatever it says of the method."""
    return "quant_algo" in found


def read(r: Reader) -> ModelOpt:
    """What a quantization_config says. Raises ConfigError for an algorithm that is not read."""
    r.get("quant_algo")
    r.must("quant_algo", *ALGORITHMS, MIXED)
    algorithms = [r.get("quant_algo")]
    layers = r.get("quantized_layers", None)
    if algorithms == [MIXED]:
        each = layers.values() if isinstance(layers, dict) else ()
        algorithms = [one.get("quant_algo") if isinstance(one, dict) else one for one in each]
        if not algorithms or not all(one in ALGORITHMS for one in algorithms):
            raise r.error("quantized_layers", f"{', '.join(map(brief, ALGORITHMS))} for each layer")
    r.must("group_size", 16, None)
    r.must("moe_quant_algo", None, "NVFP4")
    r.close((*MADE, "weight_block_size", "fmt", "activation_scheme", "scale_fmt"))
    others = fp8.read(r.of({key: value for key, value in r.values.items() if key in (
        "weight_block_size", "fmt", "activation_scheme", "scale_fmt")}))
    return ModelOpt(tuple(sorted(set(algorithms))), others)


def of_file(values: dict[str, Any]) -> dict[str, Any]:
    """The quantization_config that a hf_quant_config.json says."""
    inside = values.get("quantization")
    return {**(inside if isinstance(inside, dict) else {}), "producer": values.get("producer")}
