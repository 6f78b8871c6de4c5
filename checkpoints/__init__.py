"""Checkpoints: Hugging Face model folders in and out, through one table of names a family.

    model = checkpoints.load("meta-llama/Llama-3.2-1B")       # or a folder
    checkpoints.save(model, "out")                            # which transformers loads

    config.json ── Reader ──→ ModelConfig ──→ Decoder on the meta device ─┐
    headers of the files ─────────────────────────────────────────────────┴─ plan ──→ memory, one tensor at a time

Nothing is allocated before the plan holds: every parameter has its tensor and every tensor its parameter, in the right
shape. Values are checked as they are read; a NaN or an infinity is an error with a name. All errors are NanollmErrors.

    files.py   what is on disk          reader.py, rope.py   config.json, every key accounted for
    ops.py     arrangements, both ways  expert_ops.py        of stacked experts
    table.py   names, both ways         quantized.py         8 and 4 bits, read as the weights that they stand for
    writing.py a folder or none at all  hub.py               owner/name → folder          families/   one file a lineage
"""

import dataclasses
import shutil
import warnings
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from checkpoints import files, hub, quantized, table, writing
from checkpoints.families import FAMILIES, Family, read_config, write_config
from nanollm.config import ModelConfig
from nanollm.errors import CheckpointError, ConfigError, InputError
from nanollm.model import Decoder

__all__ = ["load", "save", "Origin"]


@dataclass(frozen=True)
class Origin:
    """Where a model was loaded from, so that it is written back the same way. It stands at `model.origin`."""
    folder: Path
    values: dict[str, Any]                       # config.json as it was
    family: Family
    names: table.Table
    ignore: tuple[str, ...]


def load(
    source: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu", ignore: Collection[str] = ()
) -> Decoder:
    """The model in a folder or on the hub, in eval mode. dtype None keeps each tensor as it is stored; what is stored in fewer than 16 bits
    becomes bfloat16. Of a multimodal model it is the language model, and a warning says what was left out.

    `ignore` names config keys and tensors to pass over, one by one. Raises ConfigError or CheckpointError, and then
    nothing was allocated, unless it is for a value that is not finite; InputError if dtype is not of floats."""
    if dtype not in (None, *table.READABLE):
        raise InputError(f"dtype is {dtype}; expected one of {', '.join(map(table.short, table.READABLE))}")
    folder = hub.local_folder(source)
    ignore = (ignore,) if isinstance(ignore, str) else tuple(ignore)
    values, block = quantized.plain_config(files.read_json(folder / "config.json", largest=10_000_000), str(folder / "config.json"))
    stored = quantized.plain_tensors(files.read_folder(folder), block, str(folder))
    family, config = read_config(values, str(folder / "config.json"), ignore, most=min(len(stored), 10_000))
    stored = _language_model(stored, family, config, folder)
    model, names, steps = _plan(family, config, stored, ignore, folder)

    parameters = dict(model.named_parameters())
    for step in steps:                           # from here on there is memory
        for name in step.ours:
            owner, _, leaf = name.rpartition(".")
            wide = dtype is not None and leaf in getattr(model.get_submodule(owner), "FLOAT32", ())
            kind = torch.promote_types(dtype, torch.float32) if wide else dtype or stored[step.theirs[0]].dtype
            kept = torch.empty_like(parameters[name], dtype=kind, device=device)
            setattr(model.get_submodule(owner), leaf, nn.Parameter(kept))
    model.tie()
    parameters = {name: parameter.data for name, parameter in model.named_parameters()}

    def put(name: str, tensor: Tensor) -> None:
        quantized.read_into(stored[name], tensor)
        _need_finite(name, tensor, folder)

    for step in steps:
        step.load(put, parameters)
    model.origin = Origin(folder, values, family, names, ignore)
    return model.eval()


def config(source: str | Path) -> ModelConfig:
    """What the model in a folder or on the hub is, without its weights. Raises ConfigError or CheckpointError."""
    path = hub.local_folder(source, ("config.json",)) / "config.json"
    return read_config(quantized.plain_config(files.read_json(path, largest=10_000_000), str(path))[0], str(path))[1]


def save(model: Decoder, folder: str | Path, *, shard_bytes: int = 5_000_000_000) -> None:
    """Write a Hugging Face folder: config.json, weights, and the tokenizer files of the folder the model came from.

    A loaded model keeps its config.json, but for what changed. Another is written as the first family that can express it.
    `folder` must not exist, or be empty; it appears whole, or not at all. Raises ConfigError or CheckpointError."""
    origin: Origin | None = getattr(model, "origin", None)
    # a compiled part carries a prefix of torch's
    parameters = {name.replace("_orig_mod.", ""): parameter.data for name, parameter in model.named_parameters()}
    values, names = _config_to_write(model.config, origin)
    kinds: Counter[str] = Counter()
    for parameter in parameters.values():
        kinds[table.short(parameter.dtype)] += parameter.numel()
    values |= {key: kinds.most_common(1)[0][0] for key in ("dtype", "torch_dtype") if key in values}

    steps = table.expand(names, parameters, model.config)
    shapes = {name: parameter.to("meta") for name, parameter in parameters.items()}
    tensors = {theirs: tensor for step in steps for theirs, tensor in step.save(shapes).items()}
    source = {theirs: step for step in steps for theirs in step.theirs}

    def get(name: str) -> Tensor:
        tensor = source[name].save(parameters)[name]
        _need_finite(name, tensor, Path(folder))
        return tensor

    with writing.new_folder(Path(folder)) as draft:
        writing.write_json(draft / "config.json", values)
        writing.write_folder(draft, tensors, get, shard_bytes)
        if origin and not origin.folder.is_dir():
            warnings.warn(f"{origin.folder}: gone, so {folder} is written without tokenizer")
        for path in [path for pattern in hub.COMPANIONS for path in origin.folder.glob(pattern)] if origin else []:
            shutil.copyfile(path, draft / path.name)


def _language_model(stored: dict[str, files.Stored], family: Family, config: ModelConfig, folder: Path) -> dict[str, files.Stored]:
    """The tensors without those of a multimodal model's other towers, and of a layer that predicts ahead, which are counted in a warning."""
    mark = family.ahead.replace("{i}", str(len(config.layers)))
    spare = (*family.left_out, *([mark.rsplit(".", 2)[0] + "."] if mark in stored else []))
    towers = {prefix: [one for name, one in stored.items() if name.startswith(prefix)] for prefix in spare}
    told = [f"{prefix}… ({len(tower)} tensors, {sum(one.size for one in tower):,} bytes)" for prefix, tower in towers.items() if tower]
    if told:
        warnings.warn(f"{folder}: the language model is loaded; left out: {', '.join(told)}")
    return {name: one for name, one in stored.items() if not name.startswith(spare)}


def _plan(
    family: Family, config: ModelConfig, stored: dict[str, files.Stored], ignore: tuple[str, ...], folder: Path
) -> tuple[Decoder, table.Table, list[table.Step]]:
    """The model without memory, and how it will be filled. Raises CheckpointError if it cannot be."""
    model = _on_meta(config, folder)
    parameters = dict(model.named_parameters())
    names = min(family.tables, key=lambda one: len(table.missing(table.expand(one, parameters, config), stored)))
    head, embed = (names[one].theirs[0] + ".weight" for one in ("head", "embed"))
    if config.tied and head in stored:           # stored although tied: a copy is passed over, another head is kept
        if embed in stored and files.equal_bytes(stored[head], stored[embed]):
            ignore = (*ignore, head)
        else:
            warnings.warn(f"{folder}: tied by config.json, but {head} is not the embedding; it is kept, and the model is untied")
            model = _on_meta(dataclasses.replace(config, tied=False), folder)
            parameters = dict(model.named_parameters())
    steps = table.expand(names, parameters, model.config)
    table.check(steps, parameters, stored, family.ignorable, ignore, str(folder))
    return model, names, steps


def _on_meta(config: ModelConfig, folder: Path) -> Decoder:
    try:
        with torch.device("meta"):
            return Decoder(config)
    except RuntimeError as error:                # torch's word for sizes whose product no 64-bit number holds
        raise ConfigError(f"{folder / 'config.json'}: a tensor beyond any memory: {error}") from None


def _config_to_write(config: ModelConfig, origin: Origin | None) -> tuple[dict[str, Any], table.Table]:
    """config.json for this model, and its tensors' names. What did not change since it was loaded is written as it was."""
    if origin is None:
        family, values = write_config(config)
        return values, family.tables[0]
    if origin.family.left_out:                   # a text model now, and a config.json that claims no tower
        family, values = write_config(config, FAMILIES[origin.family.name])
        said = (origin.values.get("text_config") or {}) | origin.values
        return values | {key: said[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in said}, family.tables[0]
    values = dict(origin.values)
    before = read_config(values, ignore=origin.ignore)[1]
    if before != config:
        old, new = write_config(before, origin.family)[1], write_config(config, origin.family)[1]
        values |= {key: new[key] for key in new if new[key] != old[key]}
        if read_config(values, ignore=origin.ignore)[1] != config:
            raise ConfigError(f"{origin.folder / 'config.json'}: cannot be changed to say what the model is now")
    return values, origin.names


def _need_finite(name: str, tensor: Tensor, where: Path) -> None:
    """Never judged by the logits: PyTorch's fused attention turns a NaN in q or k into finite numbers on a CPU."""
    if tensor.numel() and not all(torch.isfinite(end) for end in torch.aminmax(tensor)):     # NaN goes through both
        raise CheckpointError(f"{where}: {name} holds a NaN or an infinity as {table.short(tensor.dtype)}")
