"""Checkpoints: model folders in and out, through one table of names a family.

    model = checkpoints.load("meta-llama/Llama-3.2-1B")       # or a folder, a params.json, a *.gguf
    checkpoints.save(model, "out")                            # a Hugging Face folder, which transformers loads

    config.json ── Reader ──→ ModelConfig ──→ Decoder on the meta device ─┐
    headers of the files ─────────────────────────────────────────────────┴─ plan ──→ memory, one tensor at a time

Nothing is allocated before the plan holds: every parameter has its tensor and every tensor its parameter, in the right
shape. Values are checked as they are read; a NaN or an infinity is an error with a name. All errors are NanollmErrors.

    storage/     bytes on disk: files.py safetensors, pickles.py, gguf.py, quantized/ 8 and 4 bits; stream.py moves
                 them, writing.py makes a folder or none at all
    layouts/     which files of a folder are the model, and what they say it is; hub.py fetches them
    names/       table.py which tensor is which parameter, both ways; ops.py, expert_ops.py how it is arranged;
                 prefixes.py what tools put before the names;
                 reader.py, rope.py config.json, every key accounted for
    families/    one file a lineage
    source.py    a folder, understood and planned          export.py, companions.py    what is written
    parts.py     one rank's part of a folder, for tensor parallelism
    packing.py   weights in 8 and 4 bits, on their way in  compressing.py              and out
    adapters/    peft's folders, in and out
    flatten/     one model as one file
    commands     python -m checkpoints.convert   .inspect   .compare   .show   .flatten
"""

import sys
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path

from nanollm.cli import quiet_ctrl_c

if sys.argv[0] == "-m":         # Python is on its way to one of the commands
    quiet_ctrl_c()

import torch
from torch import Tensor

from checkpoints import layouts
from checkpoints.adapters import reading
from checkpoints.adapters import writing as adapter_writing
from checkpoints.export import Origin, copy_companions, layout_for, need_companions, origin_of, plan_export
from checkpoints.layouts import hub
from checkpoints.names import table
from checkpoints.source import config_of, open_source
from checkpoints.storage import stream, writing
from nanollm.config import ModelConfig
from nanollm.errors import CheckpointError, InputError, counted
from nanollm.inference.quantize import KINDS, plan_for
from nanollm.model import Decoder
from nanollm.text.tokenizer import Tokenizer
from nanollm.training.lora import loras

__all__ = ["load", "save", "save_adapter", "tokenizer", "Origin"]


def load(source: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu",
         ignore: Collection[str] = (), quantize: str | None = None, group: int | None = None,
         adapter: str | Path | None = None) -> Decoder:
    """The model in a folder or on the hub, in eval mode.

    dtype None is what config.json says, or else what most of the weights are stored in (source.py); what is stored in
    fewer than 16 bits becomes bfloat16. Of a multimodal model it is the language model, and a warning says what was
    left out. Layouts other than Hugging Face's are read too (checkpoints/layouts); pickles are not, see `python -m
    checkpoints.convert`.

    `quantize`, "int8" or "int4", keeps the weights of Linears and experts in 8 or 4 bits, 4 in groups of 32, 64 or 128
    inputs (nanollm/inference/quantize.py); "nf4" in NF4, for tuning (nanollm/layers/nf4.py). They are quantised as they
    come in: there is memory for what is kept, and for the largest tensor, or expert. A folder whose weights are stored
    in 8 or 4 bits (convert --quantize) keeps them.

    `adapter` is a folder of peft's, which is put beside the weights (nanollm/training/lora.py), in float32, also where
    they are quantised. lora.merge(model) puts it into them.

    `ignore` names config keys and tensors to pass over, one by one. Raises ConfigError or CheckpointError, and then
    nothing was allocated, unless it is for a value that is not finite; InputError if dtype is not of floats, or for
    what cannot be quantised so."""
    if quantize not in (None, *KINDS):
        raise InputError(f"quantize is {quantize!r}; expected {', '.join(KINDS)}, or None")
    if group is not None and quantize != "int4":
        raise InputError(f"group is {group}, and quantize {quantize!r}: groups go with int4")
    if dtype not in (None, *table.READABLE):
        raise InputError(f"dtype is {dtype}; expected one of {', '.join(map(table.short, table.READABLE))}")
    folder = None if adapter is None else reading.read(Path(adapter))
    found = open_source(hub.local_path(source), ignore, instead=folder.whole if folder else None)
    if quantize and found.integers:
        raise InputError(f"{found.folder}: its weights have {found.integers} already; load it without quantize, or "
                         "take the folder that it was made from")
    plan = plan_for(found.model, quantize, group) if quantize else found.stored_so()
    added = reading.fit(folder, found) if folder else None
    model = found.fill(dtype, device, plan)      # from here on there is memory
    model.origin = origin_of(found)  # type: ignore[assignment]  # nn.Module declares tensors and modules only
    return added.beside(model) if added else model


def config(source: str | Path) -> ModelConfig:
    """What the model in a folder or on the hub is, without its weights. Raises ConfigError or CheckpointError."""
    found = layouts.describe(hub.local_path(source, weights=False))
    return config_of(found)[1]


def tokenizer(source: str | Path) -> Tokenizer:
    """The tokenizer of a model in a folder or on the hub; of a GGUF the one inside the file. Raises TokenizerError."""
    return layouts.read_tokenizer(hub.local_path(source))


def save(model: Decoder, folder: str | Path, *, shard_bytes: int = 5_000_000_000) -> None:
    """Write a Hugging Face folder: config.json, weights, and the tokenizer files of the folder the model came from.

    A loaded model keeps its config.json, but for what changed. Another is written as the first of a few families that
    can express it (families.TRAINED_HERE). What no family can say is written in nanollm's own layout, which `load`
    reads, and a warning says so. A prepared or quantised model runs, but is not saved: its weights are packed.

    `folder` must not exist, or be empty; it appears whole, or not at all. Raises CheckpointError."""
    origin: Origin | None = getattr(model, "origin", None)
    # a compiled part carries a prefix of torch's
    parameters = {name.replace("_orig_mod.", ""): parameter.data for name, parameter in model.named_parameters()}
    _need_parameters(model, parameters, Path(folder))
    layout, reason = layout_for(model.config, origin)
    if reason:
        own = f"{folder}: written in nanollm's own layout, which transformers does not read: {reason}"
        warnings.warn(own, stacklevel=2)
    need_companions(origin)
    dtypes = {name: parameter.dtype for name, parameter in parameters.items()}
    written = plan_export(model.config, parameters, dtypes, origin, layout)
    with writing.new_folder(Path(folder)) as draft:
        stored = written.lay_out(draft, shard_bytes)
        with stream.Writer() as out:
            for step in written.steps:
                stream.save_step(step, parameters, stored, out)
        copy_companions(origin, draft, Path(folder), written)


def save_adapter(model: Decoder, folder: str | Path, *, base: str | None = None) -> None:
    """Write the adapters of a model as a folder that peft loads: PeftModel.from_pretrained(transformers_model, folder).

    `base` is the model that adapter_config.json names, by default the folder that this one was loaded from. What else
    is trained (requires_grad) is written whole, as modules_to_save. `folder` must not exist, or be empty; it appears
    whole, or not at all. Raises InputError or CheckpointError."""
    adapter_writing.save(model, Path(folder), base)


def _need_parameters(model: Decoder, parameters: Mapping[str, Tensor], folder: Path) -> None:
    """Raises CheckpointError unless the model has the parameters that its config describes, and no others."""
    with torch.device("meta"):
        described = dict(Decoder(model.config).named_parameters())         # of tied ones the first, as in `parameters`
    # the head of a prepared model keeps its name, but is empty
    lacking = [name for name, one in described.items() if name not in parameters or parameters[name].shape != one.shape]
    if loras(model):
        raise CheckpointError(f"{folder}: not written: the model has adapters beside its weights; save_adapter writes "
                              "them, and lora.merge(model) puts them into the weights")
    if lacking:
        raise CheckpointError(
            f"{folder}: not written: of the {counted(len(described), 'parameter')} that the model's config describes "
            f"{len(lacking)} are missing or have another shape, the first is {lacking[0]}. A prepared or quantised "
            "model runs, but its packed weights cannot be saved: save before prepare() or quantize()")
    if extra := [name for name in parameters if name not in described]:
        raise CheckpointError(
            f"{folder}: not written: the model has {counted(len(extra), 'parameter')} that its config does not "
            f"describe, the first is {extra[0]}. Remove what was added to the model, or describe it in model.config")
