"""What is written for a model: the JSON that describes it, the names of its tensors, and the files that belong to it.

    to        config               tensors                                    what loads it
    hf        config.json          model.safetensors, or shards and index     transformers, vLLM, llama.cpp's converter
    nanollm   config.json          the same files, with our own names         nanollm: any model that can be built here
    meta      params.json          consolidated.00.pth                        Meta's published code; Llama
    mistral   params.json          consolidated.safetensors                   Mistral's published code; Mistral, Mixtral
    gguf      model.gguf           the same file (layouts/gguf_export.py)     llama.cpp

nanollm loads them all. A model that came from a Hugging Face folder keeps its config.json, but for what changed. Any
other is written by its family, or else by the first family that can say all of it.
"""

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints import companions, layouts
from checkpoints.families import FAMILIES, Family, difference, read_config, write_config
from checkpoints.families.family import TOKENS
from checkpoints.families.nanollm import NANOLLM
from checkpoints.layouts import gguf_export, gguf_tokens
from checkpoints.layouts.original import (
    NAMES,
    SINGLE,
    for_heads_in,
    read_params,
    rope_layout,
    steps_of,
    with_rope_layout,
    write_params,
)
from checkpoints.names import table
from checkpoints.names.reader import Reader
from checkpoints.source import Source, majority
from checkpoints.storage import gguf_writing, pickles, stream, writing
from checkpoints.storage.files import Stored
from nanollm.config import Attention, ModelConfig, Rope
from nanollm.errors import ConfigError, TokenizerError

FORMATS = ("hf", "nanollm", "meta", "mistral", "gguf")


@dataclass(frozen=True)
class Origin:
    """Where a model was loaded from, so that it is written back the same way: `model.origin`."""
    folder: Path
    layout: str
    values: dict[str, Any]                       # config.json as it was
    family: Family
    names: table.Table
    ignore: tuple[str, ...]
    inside: Path | None = None                   # the file that has a tokenizer inside, a GGUF
    used: frozenset[str] = frozenset()           # the files in which its tensors are


def origin_of(source: Source) -> Origin:
    """Of a model in our own layout the folder that it was made from, if config.json says so.

    Raises ConfigError if what it says is no such thing."""
    was = source.values.get("was") if source.family is NANOLLM else None
    used = frozenset(part.file.name for one in source.stored.values() for part in getattr(one, "parts", (one,)))
    if was is None:
        return Origin(source.folder, source.layout, source.values, source.family, source.names, source.ignore,
                      source.inside, used)
    r = Reader(was if isinstance(was, dict) else {}, str(source.folder / "config.json"), prefix="was.")
    values, table_number, ignore = r.get("config"), r.get("names"), r.get("ignore")
    if not isinstance(values, dict) or not isinstance(ignore, list) or not all(isinstance(key, str) for key in ignore):
        raise r.error("config", "a config.json, and ignore a list of names")
    family, config = read_config(values, r.where, ignore)
    tables = family.tables(config)
    if type(table_number) is not int or not 0 <= table_number < len(tables):
        raise r.error("names", f"a number below {len(tables)}, of one of the tables of {family.name}")
    return Origin(source.folder, "hf", values, family, tables[table_number], tuple(ignore), used=used)


@dataclass(frozen=True)
class Export:
    """A model as it will be written."""
    to: str
    values: dict[str, Any]                       # of config.json or params.json
    steps: list[table.Step]
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]      # in the order in which shards are filled

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, without headers."""
        return sum(writing.nbytes(*one) for one in self.tensors.values())

    def lay_out(self, draft: Path, shard_bytes: int) -> dict[str, Stored]:
        """Write what describes the model, and make room for its tensors. Where each goes."""
        writing.write_json(draft / ("params.json" if self.to in ("meta", "mistral") else "config.json"), self.values)
        if self.to == "meta":
            return pickles.lay_out(draft / "consolidated.00.pth", self.tensors)
        if self.to == "mistral":
            return writing.lay_out(draft, self.tensors, self.nbytes, SINGLE)
        return writing.lay_out(draft, self.tensors, shard_bytes)

    def parts_of(self, name: str) -> tuple[str, ...]:
        """The tensors that are written in the place of one that a step makes."""
        return (name,)

    def changes(self, step: table.Step) -> bool:
        """Whether what a step writes is more than its parameters, arranged and cast."""
        return False

    def save_step(self, step: table.Step, parameters: Mapping[str, Tensor], places: Mapping[str, Stored],
                  out: stream.Writer) -> None:
        """Write what a step makes where it goes."""
        stream.save_step(step, parameters, places, out)

    def same_step(self, step: table.Step, parameters: Mapping[str, Tensor],
                  stored: Mapping[str, Stored]) -> Iterator[tuple[str, bool]]:
        """For each piece of a step, whether it is stored as it should be."""
        return stream.same_step(step, parameters, stored)


@dataclass(frozen=True)
class GgufExport(Export):
    """A model as one file for llama.cpp."""
    described: gguf_export.Described
    kinds: Mapping[str, str]                     # tensor → its type in the file
    origin: Origin | None
    rows: int                                    # of the embedding

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in their types of GGUF."""
        return sum(gguf_writing.nbytes(self.kinds[name], shape) for name, (_, shape) in self.tensors.items())

    def lay_out(self, draft: Path, shard_bytes: int) -> dict[str, Stored]:
        """Write model.gguf up to its tensors, with the tokenizer inside. Where each tensor goes."""
        tokenizer = None
        try:
            if self.origin:
                tokenizer = layouts.read_tokenizer(self.origin.inside or self.origin.folder)
        except TokenizerError as error:
            none = f"model.gguf is written without a tokenizer, so llama.cpp cannot run it: {error}"
            warnings.warn(none, stacklevel=3)
        name = self.origin.folder.resolve().name if self.origin else self.described.kind
        shapes = {name: shape for name, (_, shape) in self.tensors.items()}
        return gguf_export.lay_out(draft, self.described, name, tokenizer, self.kinds, shapes, self.rows)


def layout_for(config: ModelConfig, origin: Origin | None = None) -> tuple[str, str]:
    """The layout that `save` writes, "hf" or "nanollm", and why it is our own, in words, where it is."""
    try:
        _hf(config, origin)
    except ConfigError as error:
        return "nanollm", " ".join(str(error).split())
    return "hf", ""


def layout_in_words(config: ModelConfig, origin: Origin | None = None) -> str:
    """The same, for a person."""
    layout, reason = layout_for(config, origin)
    if layout == "hf":
        return "a Hugging Face folder, which transformers loads too"
    return (f"in nanollm's own layout, which checkpoints.load, generate.py and --init read and transformers does not: "
            f"{reason}")


def plan_export(config: ModelConfig, parameters: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype],
                origin: Origin | None, to: str = "hf", working: torch.dtype | None = None,
                quantized: str | None = None) -> Export:
    """What will be written. `parameters` may be on the meta device; `dtypes` are what they are written as, `working`
    what config.json says that the model is computed in, by default what most of the weights are; `quantized` the type
    of a GGUF's matrices, where it is none of torch's.

    Raises ConfigError where the format `to` cannot express the model."""
    if to == "gguf":
        return _gguf(config, parameters, dtypes, origin, quantized)
    if to == "hf":
        values, names = _hf(config, origin)
    elif to == "nanollm":
        values, names = _nanollm(config, origin)
    else:
        values, names = _original(config, origin, to)
    working = working or majority(torch.empty(one.shape, dtype=dtypes[name], device="meta")
                                  for name, one in parameters.items())
    if values.pop("auto_map", None) is not None and origin is not None:
        warnings.warn(f"{origin.folder}: auto_map is left out of config.json, as the .py files that it names are not "
                      "copied", stacklevel=2)
    values |= {key: table.short(working) for key in ("dtype", "torch_dtype") if key in values}
    steps = (steps_of if to in ("meta", "mistral") else table.expand)(names, parameters, config)
    tensors = {theirs: (functools.reduce(torch.promote_types, [dtypes[name] for name in step.ours]), shape)
               for step in steps for theirs, shape in step.shapes(parameters).items()}
    return Export(to, values, steps, tensors)


def _hf(config: ModelConfig, origin: Origin | None) -> tuple[dict[str, Any], table.Table]:
    if origin is None or origin.family is NANOLLM:
        ropes = {layer.mixer.rope for layer in config.layers if isinstance(layer.mixer, Attention)}
        # a model of Meta's, kept under our names: heads of which all channels turn have halves in a Llama
        with contextlib.suppress(ConfigError):
            turned = {isinstance(rope, Rope) and (rope.layout, rope.fraction) == ("interleaved", 1.0) for rope in ropes}
            if turned == {True}:
                half = with_rope_layout(config, "half")
                family, values = write_config(half, FAMILIES["llama"])
                return values, for_heads_in(family.tables(half)[0], "interleaved", "half")
        family, values = write_config(config)
        return values, family.tables(config)[0]
    if origin.layout != "hf":
        half = with_rope_layout(config, "half")
        family, values = write_config(half, origin.family)
        values |= companions.token_ids(origin.folder, origin.layout, origin.values, config.vocab)
        return values, for_heads_in(family.tables(half)[0], rope_layout(config), "half")
    if origin.family.left_out:                   # a text model now, and a config.json that claims no tower
        family, values = write_config(config, FAMILIES[origin.family.saved_as(config)])
        said = (origin.values.get("text_config") or {}) | origin.values
        ids = {key: said[key] for key in TOKENS if key in said}
        return values | ids, family.tables(config)[0]
    values = dict(origin.values)
    before = read_config(values, ignore=origin.ignore)[1]
    if before != config:
        old, new = write_config(before, origin.family)[1], write_config(config, origin.family)[1]
        changed = {key: new[key] for key in new if key not in old or new[key] != old[key]}
        if "rope_parameters" in values and "rope_scaling" not in values:       # transformers 5's dialect: it stays so
            changed.pop("rope_scaling", None)
        values |= {_name_in(values, key, origin.family): value for key, value in changed.items()}
        values = {key: value for key, value in values.items() if key in new or key not in old}  # what no longer stands
        if read_config(values, ignore=origin.ignore)[1] != config:
            raise ConfigError(f"{origin.folder / 'config.json'}: cannot be changed to say what the model is now")
    return values, origin.names


def _name_in(values: Mapping[str, Any], key: str, family: Family) -> str:
    """What a config.json calls a key: some have an older name, n_layer for num_hidden_layers."""
    older = getattr(family.keys.get(key), "also", ())
    return key if key in values else next((name for name in older if name in values), key)


def peft_tables(config: ModelConfig, origin: Origin | None) -> tuple[table.Table, ...]:
    """The tables with the names that transformers has for a model's tensors, and so peft for its adapters'."""
    if origin is not None and origin.layout == "hf" and origin.family is not NANOLLM:
        return origin.family.in_memory(config) if origin.family.in_memory else origin.family.tables(config)
    try:
        values, names = _hf(config, origin)
    except ConfigError:
        return NANOLLM.tables(config)
    return names, *FAMILIES[values["model_type"]].tables(config)


def _nanollm(config: ModelConfig, origin: Origin | None) -> tuple[dict[str, Any], table.Table]:
    was = {}
    if origin and origin.layout == "hf" and origin.family is not NANOLLM:
        tables = origin.family.tables(read_config(origin.values, ignore=origin.ignore)[1])
        number = next(number for number, names in enumerate(tables) if names == origin.names)
        was = {"was": {"config": origin.values, "names": number, "ignore": list(origin.ignore)}}
    return NANOLLM.write(config) | was, NANOLLM.tables(config)[0]


def _original(config: ModelConfig, origin: Origin | None, to: str) -> tuple[dict[str, Any], table.Table]:
    if origin and origin.family is not NANOLLM:
        family = origin.family
    else:
        family = write_config(with_rope_layout(config, "half"))[0]
    expected = ("llama",) if to == "meta" else ("mistral", "mixtral")
    if family.name not in expected:
        raise ConfigError(f"a {family.name} model has no {to} layout; it is one of {' and '.join(expected)}")
    params = write_params(with_rope_layout(config, "interleaved"), family.name)
    again = read_config(read_params(params, f"as {to}", family.name, config.vocab, config.tied))[1]
    if again.context != config.context:
        warnings.warn(f"params.json has no key for the context of Meta's models: it is {config.context} here, and "
                      f"whoever reads it will take it for {again.context}", stacklevel=2)
    kept = dataclasses.replace(with_rope_layout(config, "half"), context=again.context)
    if again != kept:
        raise ConfigError(f"params.json cannot say what the model is: {difference(kept, again, 'config')}")
    return params, for_heads_in(NAMES, rope_layout(config), "interleaved")


def _gguf(config: ModelConfig, parameters: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype],
          origin: Origin | None, quantized: str | None) -> Export:
    half = with_rope_layout(config, "half")
    known = origin.family if origin and origin.family is not NANOLLM else None
    family, values = write_config(half, known)
    where = str(origin.folder) if origin else "model"
    described = gguf_export.describe(config, parameters, family, values, where)
    kinds: dict[str, str] = {}
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for step in described.steps:
        wanted = quantized or gguf_export.KINDS[dtypes[step.ours[0]]]
        for name, shape in step.shapes(parameters).items():
            kinds[name] = gguf_writing.kind_of(name, shape, wanted)
            tensors[name] = gguf_writing.DTYPES[kinds[name]], shape
    return GgufExport("gguf", described.keys, described.steps, tensors, described, kinds, origin, config.vocab)


def need_companions(origin: Origin | None) -> None:
    """Raises CheckpointError if a file that `copy_companions` would copy is none, or cannot be read: to be asked before
    the first weight is written."""
    if origin is not None and not origin.inside and origin.folder.is_dir():
        companions.need_readable(origin.folder, origin.layout)


def copy_companions(origin: Origin | None, draft: Path, folder: Path, written: Export) -> None:
    """The tokenizer and what else belongs to the model, from where it came from. Warnings say what stays behind."""
    if origin is None:
        return
    if not origin.folder.is_dir():
        warnings.warn(f"{origin.folder}: gone, so {folder} is written without tokenizer", stacklevel=2)
        return
    ids = {key: written.values[key] for key in TOKENS if written.values.get(key) is not None}
    if origin.inside:
        try:
            if gguf_tokens.write(origin.inside, draft):
                return
        except TokenizerError as error:
            warnings.warn(f"{folder} is written without tokenizer: {error}", stacklevel=2)
            return
        if not companions.found_in(origin.folder, origin.layout).keys() & {"tokenizer.json", "tokenizer.model"}:
            warnings.warn(f"{folder} is written without tokenizer: {origin.inside} has none inside", stacklevel=2)
    companions.copy(origin.folder, origin.layout, draft, {} if origin.layout == "hf" else ids)
    if behind := companions.left_behind(origin.folder, origin.used):
        warnings.warn(f"{origin.folder}: not copied to {folder}: {behind}", stacklevel=2)
