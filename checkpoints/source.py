"""A model where it lies: found in a folder, understood, and planned, without a byte of its weights read.

    folder ──→ what describes it, and where its tensors are (layouts/)
           ──→ ModelConfig and family (names/reader.py, families/)       Decoder on the meta device ─┐
           ──→ headers of its files ─────────────────────────────────────────────────────────────────┴─ steps

What comes out fits: every parameter has its tensor and every tensor its parameter, in the right shape. If not, the
error has the whole list. load() fills a model from it, convert.py writes another folder from it, inspect.py and
compare.py look at it.

A folder may hold tensors of several dtypes: a float32 head in a bfloat16 model. Which one the model is computed in is
one rule, for all that read folders:

    1. what config.json says (`dtype`, `torch_dtype`), as transformers takes it
    2. where it says nothing, the dtype of most elements of the matrices

Every parameter is cast to it, but for the float32 islands, which their modules name (FLOAT32): these stay as stored.
convert.py casts nothing that it was not asked to: what it writes is each tensor in its own dtype.
"""

import dataclasses
import functools
import math
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from checkpoints import layouts, packing
from checkpoints.families import Family, read_config
from checkpoints.layouts.original import with_rope_layout
from checkpoints.names import prefixes, table
from checkpoints.storage import files, quantized, stream
from checkpoints.storage.quantized.integers import Integers, Ints
from nanollm.config import ModelConfig
from nanollm.errors import CheckpointError, ConfigError, counted
from nanollm.inference.quantize import Packed, Plan, leaves, replace
from nanollm.model import Decoder


@dataclass(frozen=True)
class Source:
    """A model on disk, and how it is read."""
    folder: Path
    layout: str                                  # of layouts.LAYOUTS
    values: dict[str, Any]                       # config.json as it is; of another layout, what a config.json would say
    family: Family
    names: table.Table
    model: Decoder                               # on the meta device
    steps: list[table.Step]
    stored: dict[str, files.Stored]
    ignore: tuple[str, ...]
    inside: Path | None                          # the file that has a tokenizer inside, a GGUF

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @property
    def name(self) -> Path:
        """What it is called: a GGUF by its file, for a folder may have several."""
        return self.inside or self.folder

    def parameters(self) -> dict[str, torch.Tensor]:
        """Names and shapes, each parameter once: of tied ones the first."""
        return dict(self.model.named_parameters())

    @functools.cached_property
    def working_dtype(self) -> torch.dtype:
        """What the model is computed in, where nothing else is asked for: the rule at the head of the file."""
        said = said_dtype(self.values)
        return said or majority(self.stored[name] for step in self.steps for name in step.theirs)

    @functools.cached_property
    def stored_dtypes(self) -> dict[str, torch.dtype]:
        """The dtype of each parameter on disk; of one whose parts are stored in several, one that holds them all."""
        found: dict[str, torch.dtype] = {}
        for step in self.steps:
            kinds = {self.stored[name].dtype for name in step.theirs}
            found |= dict.fromkeys(step.ours, functools.reduce(torch.promote_types, kinds))
        return found

    @functools.cached_property
    def integers(self) -> Integers | None:
        """How weights are kept, where they are stored as whole numbers."""
        return next((one.how for one in self.stored.values() if isinstance(one, Ints)), None)

    def stored_so(self) -> Plan | None:
        """What stays as it is stored; None where nothing is stored as whole numbers. A warning counts what does not."""
        if self.integers is None:
            return None
        plan = packing.stored_so(self.model, self.steps, self.stored)
        kept = set(plan.weights(self.model))
        others = [name for step in self.steps if kept.isdisjoint(step.ours) for name in step.theirs
                  if isinstance(self.stored[name], Ints)]
        if others:
            warnings.warn(f"{self.folder}: {self.integers}: {counted(len(others), 'weight')} "
                          f"{'is' if len(others) == 1 else 'are'} not kept so, but read as what they stand for: "
                          f"{others[0]}{' …' if len(others) > 1 else ''}", stacklevel=2)
        return plan

    def dtype(self, name: str, wanted: torch.dtype | None) -> torch.dtype:
        """What a parameter is kept as: the working dtype, or the wanted one. An island stays as it is stored, and is
        float32 at least where a dtype is wanted."""
        owner, _, leaf = name.rpartition(".")
        if leaf not in getattr(self.model.get_submodule(owner), "FLOAT32", ()):
            return wanted or self.working_dtype
        return torch.promote_types(wanted, torch.float32) if wanted else self.stored_dtypes[name]

    def fill(self, dtype: torch.dtype | None, device: str | torch.device = "cpu", plan: Plan | None = None) -> Decoder:
        """The model, which has been on the meta device, in memory and in eval mode. dtype None: the working dtype.

        What `plan` has is quantised as it comes in, from the values that it would have without; what is stored in 8 or
        4 bits stays so. Without a plan every weight is what it stands for."""
        weights = set(plan.weights(self.model)) if plan else set()
        for name, parameter in self.parameters().items():
            owner, _, leaf = name.rpartition(".")
            if name in weights:
                continue
            kept = torch.empty(parameter.shape, dtype=self.dtype(name, dtype), device=device)
            setattr(self.model.get_submodule(owner), leaf, nn.Parameter(kept))
        self.model.tie()
        parameters = {name: parameter.data for name, parameter in self.model.named_parameters()}
        packed: dict[str, Packed] = {}
        if plan and not self.integers:           # all of it before the first value: what comes and goes leaves no holes
            packed = {name: plan.room(tuple(parameters[name].shape), device) for name in plan.weights(self.model)}
        scratch = packing.Scratch(device)
        for step in self.steps:
            if self.integers and not weights.isdisjoint(step.ours):
                packed |= packing.take_step(step, self.stored, parameters, device)
            elif plan and not weights.isdisjoint(step.ours):
                packing.load_step(step, plan, packed, self.stored, parameters, lambda name: self.dtype(name, dtype),
                                  scratch)
            else:
                stream.load_step(step, self.stored, parameters)
        for name in plan.modules if plan else ():
            own = leaves(self.model.get_submodule(name))
            replace(self.model, name, {leaf: packed[f"{name}.{leaf}"] for leaf in own})
        return self.model.eval()


def said_dtype(values: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype that a config.json says, of a multimodal model that of its language model; None: none that is read."""
    names = {table.short(dtype): dtype for dtype in table.READABLE}
    places = [each for each in (values, values.get("text_config")) if isinstance(each, dict)]
    told = [each.get(key) for each in places for key in ("dtype", "torch_dtype")]
    found = (names.get(word.removeprefix("torch.")) for word in told if isinstance(word, str))
    return next((dtype for dtype in found if dtype is not None), None)


def majority(tensors: Iterable[table.Header]) -> torch.dtype:
    """The dtype of most elements of the matrices; where there are none, of all."""
    elements: Counter[torch.dtype] = Counter()
    for one in sorted(tensors, key=lambda one: len(one.shape) < 2):
        if len(one.shape) >= 2 or not elements:
            elements[one.dtype] += math.prod(one.shape)
    return elements.most_common(1)[0][0]


def open_source(path: Path, ignore: Collection[str] = (), family: str | None = None, allow_pickle: bool = False,
                instead: Mapping[str, files.Stored] | None = None) -> Source:
    """The model in a folder, or the one that a file (params.json, *.gguf) belongs to.

    `family` is a model_type in place of the one that is said, for folders that say none. `instead` are tensors in the
    place of the folder's own. Raises ConfigError or CheckpointError; nothing was read or allocated then."""
    ignore = (ignore,) if isinstance(ignore, str) else tuple(ignore)
    return understand(layouts.find(path, layouts.Asked(family, allow_pickle, ignore)), ignore, instead or {})


def understand(found: layouts.Found, ignore: tuple[str, ...],
               instead: Mapping[str, files.Stored] = MappingProxyType({})) -> Source:
    """The same for what was found already. An adapter beside the weights is warned of: transformers would apply it."""
    if found.layout == "hf" and (found.folder / "adapter_config.json").exists():
        warnings.warn(f"{found.folder}: adapter_config.json lies beside the weights: it is not applied; transformers "
                      "applies it where peft is installed. Merge it, or move it away", stacklevel=2)
    values, how = quantized.plain_config(found.values, found.where)
    stored = quantized.plain_tensors(found.stored, how, str(found.folder))
    if not stored:
        raise CheckpointError(f"{found.folder}: no tensors in any file")
    kind, config = config_of(found, ignore)
    stored = prefixes.unwrapped(stored, found.tables or kind.tables(config), str(found.folder))
    stored = _language_model(stored, kind, config, found.folder)
    stored = _replaced(stored, instead, found.tables or kind.tables(config), config.tied)
    stored, model, names, steps = _plan(kind, found, config, stored, ignore)
    _warn_of_idle(ignore, found)
    return Source(found.folder, found.layout, values, kind, names, model, steps, stored, ignore, found.inside)


def _warn_of_idle(ignore: Collection[str], found: layouts.Found) -> None:
    """One warning with the names to ignore that nothing has."""
    def names(values: Any) -> Iterator[str]:               # of keys, also of objects inside: rope_scaling.factor
        for key, value in values.items() if isinstance(values, dict) else ():
            yield key
            yield from (f"{key}.{inner}" for inner in names(value))

    keys = list(names(found.values))
    idle = [name for name in ignore if name not in found.stored
            and not any(one == name or one.endswith(f".{name}") for one in (*keys, *found.stored))]
    if idle:
        warnings.warn(f"{found.where}: to ignore {', '.join(idle)} changes nothing: no key and no tensor has that name",
                      stacklevel=2)


def _replaced(stored: dict[str, files.Stored], instead: Mapping[str, files.Stored], tables: Iterable[table.Table],
              tied: bool) -> dict[str, files.Stored]:
    """The tensors with others in the place of some. A head that was tied to an embedding stays what it was."""
    new = {_in_base(name, stored): one for name, one in instead.items()}
    for names in tables if tied else ():
        embed, head = (names[one].theirs[0] + ".weight" for one in ("embed", "head"))
        if embed in new and embed in stored and head not in new:
            new[head] = stored[embed]
    return stored | new


def _in_base(name: str, stored: Collection[str]) -> str:
    """The name of the stored tensor that another tool calls `name`: what stands before it may differ."""
    alike = [one for one in stored if one.endswith(f".{name}") or name.endswith(f".{one}")]
    return alike[0] if name not in stored and len(alike) == 1 else name


def config_of(found: layouts.Found, ignore: tuple[str, ...] = ()) -> tuple[Family, ModelConfig]:
    """The family and the config of what was found, without a look at its tensors. Raises ConfigError."""
    values = quantized.plain_config(found.values, found.where)[0]
    kind, config = read_config(values, found.where, ignore, most=min(len(found.stored) or 10_000, 10_000))
    return kind, with_rope_layout(config, "interleaved") if found.interleaved else config


def stored_as(found: layouts.Found) -> quantized.Layout | None:
    """How weights are stored, where that is in few bits."""
    return quantized.plain_config(found.values, found.where)[1]


def _language_model(stored: dict[str, files.Stored], family: Family, config: ModelConfig,
                    folder: Path) -> dict[str, files.Stored]:
    """The tensors without those of a multimodal model's other towers, and of a layer that predicts ahead.

    A warning counts what is left out."""
    marks = [mark.replace("{i}", str(len(config.layers))) for mark in family.ahead.split()]
    ahead = [mark if mark.endswith(".") else mark.rsplit(".", 2)[0] + "." for mark in marks
             if mark.endswith(".") or mark in stored]
    spare = (*family.left_out, *ahead)
    towers = {prefix: [one for name, one in stored.items() if name.startswith(prefix)] for prefix in spare}
    told = [f"{prefix}… ({counted(len(tower), 'tensor')}, {sum(one.size for one in tower):,} bytes)"
            for prefix, tower in towers.items() if tower]
    if told:
        warnings.warn(f"{folder}: the language model is loaded; left out: {', '.join(told)}", stacklevel=2)
    return {name: one for name, one in stored.items() if not name.startswith(spare)}


def _plan(family: Family, found: layouts.Found, config: ModelConfig, stored: dict[str, files.Stored],
          ignore: tuple[str, ...]) -> tuple[dict[str, files.Stored], Decoder, table.Table, list[table.Step]]:
    """The tensors, the model without memory, and how it will be filled. Raises CheckpointError if it cannot be."""
    model = _on_meta(config, found.where)
    parameters = dict(model.named_parameters())

    def lacking(names: table.Table) -> int:
        return len(table.missing(table.expand(names, parameters, config), stored))

    def unlike(names: table.Table) -> tuple[int, int]:           # two tables may differ in nothing but arrangements
        return lacking(names), len(table.reshaped(table.expand(names, parameters, config), parameters, stored))

    tables, where = found.tables or family.tables(config), str(found.inside or found.folder)
    names = min(tables, key=unlike) if len(tables) > 1 else tables[0]
    head, embed = (names[one].theirs[0] + ".weight" for one in ("head", "embed"))
    if lacking(names):
        needed = {name for step in table.expand(names, parameters, config) for name in step.theirs}
        whole = prefixes.of_whole_model(stored, needed, embed, where)
        if whole.keys() != stored.keys() and not config.tied and head not in whole:
            raise CheckpointError(f"{where}: a base model that was saved alone, without {head}, which "
                                  f"{found.said_by} does not tie to the embedding; transformers would draw a random one"
                                  ". Save the model with its head")
        stored = whole
        prefixes.need_one_way(stored, needed, tables, where)
    if config.tied and head in stored and embed not in stored:   # safetensors' save_model keeps one name of the two
        stored = {embed if name == head else name: one for name, one in stored.items()}
    if config.tied and head in stored:           # stored although tied: a copy is passed over, another head is kept
        if files.equal_bytes(stored[head], stored[embed]):
            ignore = (*ignore, head)
        else:
            warnings.warn(f"{where}: tied by {found.said_by}, but {head} is not the embedding; "
                          "it is kept, and the model is untied", stacklevel=2)
            model = _on_meta(dataclasses.replace(config, tied=False), found.where)
            parameters = dict(model.named_parameters())
    steps = table.expand(names, parameters, model.config)
    stored = quantized.as_stored(stored, [name for step in steps for name in step.theirs
                                          if isinstance(stored.get(name), quantized.Packed)
                                          and packing.by_columns(step, parameters)])
    stored = quantized.without_idle_biases(stored, {name for step in steps for name in step.theirs}, where)
    table.check(steps, parameters, stored, family.ignorable | found.ignorable, ignore, where, found.said_by)
    return stored, model, names, steps


def _on_meta(config: ModelConfig, where: str) -> Decoder:
    try:
        with torch.device("meta"):
            return Decoder(config)
    except RuntimeError as error:                # torch's word for sizes whose product no 64-bit number holds
        raise ConfigError(f"{where}: a tensor beyond any memory: {error}") from None
