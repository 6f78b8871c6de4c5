"""Quantised folders, read as the weights that they encode. Only these files know that a tensor has fewer bits on disk.

    fp8.py           fp8 with a scale for a weight, a row, a block     DeepSeek, Qwen3-…-FP8, AutoFP8, FBGEMM
    fp4.py           mxfp4, nvfp4                                      gpt-oss
    integers.py      whole numbers of few bits: what these bring into one form:
      compressed.py    compressed-tensors, with its fp8 and fp4 too    llm-compressor
      gptq.py          GPTQ, and AutoRound
      awq.py           AWQ
    bnb.py           bitsandbytes' nf4, fp4, int8
    modelopt.py      ModelOpt's fp8 and nvfp4                          NVIDIA's uploads
    mlx.py           MLX
    parts.py         what they share

`plain_config` takes the quantization_config out of a config and gives the layout that it says; `plain_tensors` puts one
name, X, in the place of several. What follows, tables and ops, has a bfloat16 tensor. It is made when it is read, a
run at a time, and never all of it in float32. A model is saved as what it is then: bfloat16, or what `dtype` asked for,
and no quantization_config. Whole numbers can stay what they are: checkpoints/packing.py.

Values between the weights, which such folders have in few bits elsewhere, are not rounded here: their scales are passed
over, and a warning says so.
"""

import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from checkpoints.names.reader import Reader, brief, brief_list
from checkpoints.storage import files
from checkpoints.storage.files import Stored
from checkpoints.storage.quantized import awq, bnb, compressed, fp4, fp8, gptq, mlx, modelopt
from checkpoints.storage.quantized.parts import AsStored, Layout, Packed, packed, whole
from nanollm.errors import CheckpointError, ConfigError, counted

__all__ = ["Layout", "Packed", "as_stored", "beside", "plain_config", "plain_tensors", "without_idle_biases"]
KEYS = ("quantization_config", "compression_config")
UPLOAD = "Take the unquantised upload, of which this was made"
WRITE = ('python -c "import transformers as t; t.AutoModelForCausalLM.from_pretrained(\'FOLDER\'{options})'
         '.save_pretrained(\'OUT\'{saved})"')
UNDO = {  # what works where a variant is not read, by the method
    "bitsandbytes": "Where bitsandbytes and accelerate are installed: " + WRITE.format(
        options=").dequantize(", saved=", save_original_format=False") + "; or take the unquantised upload",
    "compressed-tensors": "Where compressed-tensors is installed: " + WRITE.format(
        options=", quantization_config=t.CompressedTensorsConfig(dequantize=True)", saved="")
        + "; or take the unquantised upload",
    "mlx": "On a Mac: mlx_lm.convert --hf-path FOLDER --mlx-path OUT --dequantize; or take the unquantised upload",
}
MARKS = {  # how such a tensor's name ends, where config.json does not say it
    ".qweight": "GPTQ or AWQ", ".weight_packed": "compressed-tensors", ".weight.absmax": "bitsandbytes",
    ".SCB": "bitsandbytes", ".weight_scale_2": "ModelOpt",
}


# what quant_method says → what reads the rest, and what is read of it
READ: dict[str, tuple[Callable[[Reader], Layout], str]] = {
    "fp8": (fp8.read, "fp8 (e4m3) with a scale for a weight, a row or a block"),
    "fbgemm_fp8": (fp8.read, "fp8 (e4m3) with a scale for a row"),
    "mxfp4": (fp4.read, "gpt-oss's mxfp4"),
    "gptq": (gptq.read, "GPTQ of 2 to 8 bits in the formats gptq and gptq_v2"),
    "awq": (awq.read, "AWQ of 4 bits in the version gemm"),
    **dict.fromkeys(("auto-round", "intel/auto-round"), (
        gptq.read_autoround, f"whole numbers, packed as {', '.join((*gptq.PACKINGS, *gptq.OF_AWQ))}")),
    "bitsandbytes": (bnb.read, "nf4, fp4 and int8"),
    "modelopt": (modelopt.read, f"{', '.join(modelopt.ALGORITHMS)}, and {modelopt.MIXED} of these"),
    "compressed-tensors": (compressed.read, ", ".join(compressed.FORMATS)),
    "mlx": (mlx.read, "affine of 2, 3, 4, 5, 6 and 8 bits, mxfp4 and nvfp4"),
}
# files beside config.json that say it in older folders
BESIDE: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    modelopt.FILE: modelopt.of_file,
    "quantize_config.json": lambda values: {"quant_method": "gptq", **values},
    "quant_config.json": lambda values: {"quant_method": "awq", **values},
}


def beside(folder: Path, values: dict[str, Any]) -> dict[str, Any]:
    """config.json with what a file beside it says of its weights, where it says nothing itself."""
    if any(values.get(key) is not None for key in (*KEYS, "quantization")):
        return values
    for name, said in BESIDE.items():
        if (folder / name).is_file():
            return {**values, "quantization_config": said(files.read_json(folder / name))}
    return values


# ---- what is there

def plain_config(values: dict[str, Any], where: str = "config.json") -> tuple[dict[str, Any], Layout | None]:
    """config.json without its quantization_config, and the layout that it says; None: weights are plain.

    Raises ConfigError for a layout, or a variant of one, that is not read."""
    inner = values.get("text_config")
    if isinstance(inner, dict) and inner.get(KEYS[0]) is not None and values.get(KEYS[0]) is None:
        inner, layout = plain_config(inner, where)          # of a multimodal model's language model
        return {**values, "text_config": inner}, layout
    key, found = _said(values, where)
    plain = {name: value for name, value in values.items() if name not in KEYS and name != key}
    if found is None:
        return plain, None
    method = _method(key, found)
    if not isinstance(method, str) or method not in READ:
        raise ConfigError(f"{where}: {key}.quant_method is {brief(method)}: weights quantised in a way that is not "
                          f"read here; read are {', '.join(map(brief, READ))}. {UPLOAD}")
    read, what = READ[method]
    r = Reader(found, where, prefix=f"{key}.")
    r.seen.add("quant_method")
    try:
        return plain, read(r)
    except ConfigError as error:
        undo = UNDO.get(method, UPLOAD).replace("FOLDER", str(Path(where).parent))
        raise ConfigError(f"{error}. Read of {method} are: {what}. {undo}") from None


def _said(values: dict[str, Any], where: str) -> tuple[str, dict[str, Any] | None]:
    """The key that says how weights are quantised, and what it says. MLX writes one of its own, and the same again."""
    mlx_ = values.get("quantization")
    if isinstance(mlx_, dict) and "bits" in mlx_:
        return "quantization", mlx_
    key = next((key for key in KEYS if values.get(key) is not None), KEYS[0])
    found = values.get(key)
    if found is not None and not isinstance(found, dict):
        raise ConfigError(f"{where}: {key} is {brief(found)}; expected an object")
    return key, found or None


def _method(key: str, found: dict[str, Any]) -> Any:
    """What quant_method says, or would say: some programs leave it away."""
    if key == "quantization":
        return "mlx"
    if modelopt.is_it(found):
        return "modelopt"
    if "quant_method" not in found and ("load_in_4bit" in found or "load_in_8bit" in found):
        return "bitsandbytes"
    return found.get("quant_method", compressed.METHOD if key == "compression_config" else None)


def plain_tensors(stored: Mapping[str, Stored], how: Layout | None, where: str = "weights") -> dict[str, Stored]:
    """Every tensor by the name of what it stands for. `how` is that of `plain_config`; None: all are plain."""
    plain = fp4.experts(stored, where) if how is None else how.plain(stored, where)
    for mark, method in MARKS.items():
        if marked := next((name for name in plain if name.endswith(mark)), None):
            raise CheckpointError(f"{where}: {marked}: weights quantised by {method}, of which config.json says "
                                  f"{'nothing' if how is None else 'another layout'}: it lacks the "
                                  f"quantization_config of the upload. {UPLOAD}, or its config.json")
    return plain


def as_stored(stored: Mapping[str, Stored], over: Collection[str]) -> dict[str, Stored]:
    """The tensors; those in `over` are quantised, and turned over as the family's own folders have them."""
    return {**stored, **{name: packed(AsStored, one.shape[::-1], one) for name in over
                         if len((one := stored[name]).shape) == 2}}


def without_idle_biases(stored: Mapping[str, Stored], needed: Collection[str], where: str) -> dict[str, Stored]:
    """The tensors without biases that the model has not and that are all zeros: AutoGPTQ writes them beside every
    weight. A warning counts them."""
    idle = [name for name, one in stored.items() if name.endswith(".bias") and name not in needed
            and isinstance(stored.get(name.removesuffix("bias") + "weight"), Packed)
            and one.size < 1 << 24 and not whole(one).count_nonzero()]
    if idle:
        warnings.warn(f"{where}: passed over, as they are zeros and the model has none there: "
                      f"{counted(len(idle), 'vector')} of biases ({brief_list(idle, 2)})", stacklevel=2)
    return {name: one for name, one in stored.items() if name not in idle}
