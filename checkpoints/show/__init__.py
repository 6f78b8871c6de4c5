"""What a checkpoint is, as a person would draw it: its layers by kind, how each is wired, its matrices, and its costs.

    python -m checkpoints.show FOLDER           a model folder of any layout, a config.json, params.json or *.gguf,
                                                owner/name on the hub, or the name of a preset

No weight is read, and nothing is computed twice: shapes are those of the model on the meta device (one layer of each
kind), bytes on disk those in the headers of the files, bytes of the cache those of `new_state` without memory, FLOPs
those of nanollm/training/flops.py. How the picture is drawn: show/drawing.py. In what the model differs from Llama:
show/words.py.

    parameters      active: all but the experts that a token is not sent to
    cache           grows: what the next token adds, at this context. The rest does not grow: windows that are full,
                    the states of scans, and one slot a layer where padding goes
    FLOPs           2 a multiply-add, forward only. decode: of the last token of the context; prefill: of a prompt as
                    long, divided by its tokens
"""

import json
import math
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from checkpoints import layouts
from checkpoints.layouts import NOTHING_SPECIAL, Asked, hub
from checkpoints.names import table
from checkpoints.show.drawing import Kind, draw, kinds_of
from checkpoints.show.words import different
from checkpoints.source import config_of, said_dtype, stored_as
from checkpoints.storage import gguf
from checkpoints.storage.files import Stored
from nanollm import presets
from nanollm.cli import LARGE
from nanollm.config import ModelConfig, MoE
from nanollm.config.positions import places
from nanollm.errors import ConfigError, InputError, counted
from nanollm.layers import MODULES
from nanollm.training import flops as speed

CONTEXT = 4096                                              # tokens that the costs are for, where nothing else is said
UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""))


class Costs(NamedTuple):
    """What is said at the head of the file, in numbers; bytes are those of a single sequence."""
    parameters: int
    active: int
    grows: int                                              # bytes that one more token adds to the cache
    cache: int                                              # bytes of the whole cache
    decode: float                                           # FLOPs
    prefill: float


def costs(config: ModelConfig, kinds: list[Kind], context: int, dtype: torch.dtype) -> Costs:
    """dtype is that of the activations, which is what keys and values are kept in."""
    around = sum(p.numel() for p in kinds[0].around.values())
    parameters = around + sum(kind.count * sum(p.numel() for p in kind.parameters.values()) for kind in kinds)
    idle = sum(kind.count * _idle(kind) for kind in kinds)
    cache, longer = (sum(kind.count * _bytes(_state(kind, length, dtype)) for kind in kinds)
                     for length in (context, context + 1))
    decode, prefill = speed.decode_flops(config, context), speed.prefill_flops(config, context)
    return Costs(parameters, parameters - idle, longer - cache, cache, decode, prefill)


def _idle(kind: Kind) -> int:
    """Parameters of the experts that a token is not sent to."""
    ffn = kind.layer.ffn
    if not isinstance(ffn, MoE):
        return 0
    experts = sum(p.numel() for name, p in kind.parameters.items() if name.startswith("ffn.experts."))
    return experts * (ffn.experts - ffn.top_k) // ffn.experts


def _state(kind: Kind, length: int, dtype: torch.dtype) -> Any:
    """What one layer remembers of a single sequence, without memory."""
    mixer = kind.layer.mixer
    return MODULES[type(mixer)].new_state(mixer, 1, length, dtype, torch.device("meta"))


def _bytes(state: Any) -> int:
    """Of all tensors in a state, and in the states in it."""
    if isinstance(state, Tensor):
        return state.nbytes
    return sum(map(_bytes, state if isinstance(state, (list, tuple)) else getattr(state, "__dict__", {}).values()))


def usual_context(config: ModelConfig) -> int:
    """The context that is drawn where none is asked for."""
    return min(CONTEXT, places(config.positions) or config.context or CONTEXT)


def describe(config: ModelConfig, context: int | None = None, dtype: torch.dtype = torch.bfloat16,
             weights: str | None = None) -> str:
    """The picture, at most 100 columns wide. `weights` says what is stored; None: they are counted as dtype.

    Raises InputError for more context than the model has positions, ConfigError for sizes beyond any memory."""
    kinds, context, cost = _measured(config, context, dtype)
    name = str(dtype).removeprefix("torch.")
    active = ""
    if cost.active < cost.parameters:
        active = f", of which {cost.active:,} ({billions(cost.active)}) are active for a token"
    fixed = cost.cache - context * cost.grows
    rows = {
        "parameters": f"{cost.parameters:,} ({billions(cost.parameters)}){active}",
        "weights": weights or f"{amount(cost.parameters * dtype.itemsize)}B in {name}",
        "cache": f"{cost.grows:,} bytes a token and {fixed:,} that do not grow: "
                 f"{amount(cost.cache)}B for {context:,} tokens in {name}",
        "FLOPs": f"decode {amount(cost.decode)} for the last of {context:,} tokens; "
                 f"prefill {amount(cost.prefill)} a token of all of them",
    }
    lines = draw(config, kinds) + [""] + [f"{what:12}{said}" for what, said in rows.items()]
    return "\n".join([*lines, "", "Different from Llama", textwrap.indent("\n".join(different(config, kinds)), "  ")])


def _measured(config: ModelConfig, context: int | None, dtype: torch.dtype) -> tuple[list[Kind], int, Costs]:
    context = usual_context(config) if context is None else context
    if not 1 <= context <= (places(config.positions) or LARGE):
        raise InputError(f"--context {context}: expected 1 to {places(config.positions) or LARGE} tokens")
    try:
        kinds = kinds_of(config)
    except RuntimeError as error:                           # torch's word for sizes whose product exceeds 64 bits
        raise ConfigError(f"a tensor beyond any memory: {error}") from None
    return kinds, context, costs(config, kinds, context, dtype)


def facts(config: ModelConfig, context: int | None = None, dtype: torch.dtype = torch.bfloat16,
          weights: str | None = None) -> str:
    """The same for machines, as JSON."""
    kinds, context, cost = _measured(config, context, dtype)
    said = {
        "context": context, "dtype": str(dtype).removeprefix("torch."), "stored": weights,
        "different": [" ".join(line.split()) for line in different(config, kinds)], "config": config.to_dict(),
    }
    return json.dumps({**cost._asdict(), **said}, indent=2, ensure_ascii=False)


def amount(number: float) -> str:
    """Three digits and a unit: 8030261248 → 8.03 G."""
    size, unit = next((size, unit) for size, unit in UNITS if number >= 0.9995 * size or size == 1)
    return f"{number / size:.3g} {unit}"


def billions(number: int) -> str:
    """Parameters are counted in billions: 8030261248 → 8.03 B."""
    return f"{number / 1e9:.2f} B" if number >= 0.9995e9 else amount(number).rstrip()


def stored_type(one: Stored) -> str:
    """What lies in the file: a dtype, a GGUF's own type (Q4_K, F32), or so many bits a number."""
    if isinstance(one, gguf.Blocked):
        return gguf.dequantizable()[one.kind]
    numbers = math.prod(one.shape)
    return table.short(one.dtype) if one.size == numbers * one.dtype.itemsize else f"{8 * one.size / numbers:.3g} bits"


# ---- where it comes from

class Found(NamedTuple):
    """A model to draw."""
    config: ModelConfig
    dtype: torch.dtype                                      # of the activations
    weights: str | None                                     # what is stored


def find(source: str, asked: Asked = NOTHING_SPECIAL) -> Found:
    """A preset, or what a folder, a config.json or the hub has. Raises ConfigError or CheckpointError."""
    if source.strip() and "/" not in source and not Path(source).exists():
        try:
            return Found(presets.preset(source), torch.bfloat16, None)
        except ConfigError as error:
            raise ConfigError(f"{source}: no such file or folder, and {error}") from None
    found = layouts.describe(hub.local_path(source, asked.allow_pickle, weights=False), asked)
    config, values, stored = config_of(found, asked.ignore)[1], found.values, found.stored
    held: Counter[torch.dtype] = Counter()                  # bytes
    kinds: Counter[str] = Counter()
    for tensor in stored.values():
        held[tensor.dtype] += tensor.size
        kinds[stored_type(tensor)] += tensor.size
    usual = next((dtype for dtype, _ in held.most_common() if dtype in table.READABLE), torch.bfloat16)
    parts = ", ".join(f"{amount(size)}B of {kind}" for kind, size in kinds.most_common())
    used = {part.file for tensor in stored.values() for part in getattr(tensor, "parts", (tensor,))}
    where = f" in {counted(len(stored), 'tensor')} and {len(used)} file(s)"
    kept = stored_as(found)
    parts = f"{kept}: {parts}" if kept else parts
    return Found(config, said_dtype(values) or usual, parts + where if stored else None)
