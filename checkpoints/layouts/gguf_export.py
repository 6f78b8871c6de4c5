"""A model as a GGUF, which llama.cpp runs: its keys, its tensors and its tokenizer in one file, model.gguf.

The keys say what a config.json would: KEYS has those that are plain numbers, and `keys_of` works out the others (a
scaling of RoPE, how much of a head turns). Before anything is written, keys and tensors are read back (gguf_names.py).
A model that does not come back as it was is refused, and the error names what a GGUF cannot say. Numbers are compared
as float32, which is what the file holds.

    Llama, Mistral, Mixtral     rows of q and k in the order in which neighbours turn
    Gemma                       1 is added to the gains of norms
    Llama 3.1's scaling         a tensor rope_freqs of divisors         LongRoPE: rope_factors_long and _short
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from checkpoints.families import Family, difference, read_config
from checkpoints.layouts import gguf_tokens_export
from checkpoints.layouts.gguf_names import ARCHITECTURES, FREQS, LAYER, LONG, RMS, SHORT, Architecture, read_metadata
from checkpoints.layouts.original import RopeLayout, for_heads_in, rope_layout, with_rope_layout
from checkpoints.names import table
from checkpoints.names.table import Step
from checkpoints.storage import gguf_writing
from checkpoints.storage.files import Stored, as_bytes
from checkpoints.storage.gguf import shortest
from nanollm.config import Attention, ModelConfig, Rope
from nanollm.errors import CheckpointError, ConfigError
from nanollm.layers.rope import frequencies
from nanollm.text.tokenizer import Tokenizer

FILE = "model.gguf"
FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}                       # general.file_type
KINDS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
KEYS = {  # key of the architecture: keys of config.json, of which the first that is there is taken
    "block_count": ("num_hidden_layers",), "context_length": ("max_position_embeddings",),
    "embedding_length": ("hidden_size",), "attention.head_count": ("num_attention_heads",),
    "feed_forward_length": ("intermediate_size", "shared_expert_intermediate_size", "moe_intermediate_size"),
    "attention.head_count_kv": ("num_key_value_heads",), RMS: ("rms_norm_eps",), LAYER: ("layer_norm_eps",),
    "rope.freq_base": ("rope_theta",), "rope.freq_base_swa": ("rope_local_base_freq",),
    "attention.sliding_window": ("sliding_window",), "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",), "vocab_size": ("vocab_size",),
    "expert_count": ("num_local_experts", "num_experts"), "expert_used_count": ("num_experts_per_tok",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
}
YARN = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow", "yarn_attn_factor": "attention_factor"}
Values = dict[str, Any]


@dataclass(frozen=True)
class Held(Stored):
    """A small tensor that is computed here, in place of a stored one."""
    values: Tensor

    def read_run(self, first: int, run: Tensor) -> None:
        run.copy_(self.values[first : first + run.numel()])


@dataclass(frozen=True)
class Described:
    """A model as a GGUF describes it."""
    kind: str                                    # general.architecture
    keys: Values                                 # of the architecture, without its name in front
    vectors: Mapping[str, Held]                  # tensors that are no weights
    steps: list[Step]                            # which tensors are which parameters

    @property
    def architecture(self) -> Architecture:
        """How a file of this kind is read."""
        return ARCHITECTURES[self.kind]


def describe(config: ModelConfig, parameters: Mapping[str, Tensor], family: Family, values: Values,
             where: str) -> Described:
    """Keys and tensors for a model whose config.json would have these `values`; `parameters` may be on the meta device.

    Raises ConfigError where a GGUF cannot say what the model is."""
    kind = next((kind for kind, each in ARCHITECTURES.items() if family.name in each.families), None)
    if kind is None:
        known = ", ".join(name for each in ARCHITECTURES.values() for name in each.families)
        raise ConfigError(f"{where}: a {family.name} model is not written as GGUF; those are {known}")
    architecture = ARCHITECTURES[kind]
    keys, vectors = keys_of(config, values, kind)
    wanted: RopeLayout = "interleaved" if architecture.interleaved else "half"
    names = for_heads_in(architecture.names[0], rope_layout(config), wanted)
    try:
        found = Described(kind, keys, vectors, table.expand(names, parameters, config))
        kept, again = (as_stored(one) for one in (with_rope_layout(config, "half"),
                                                  read_back(found, parameters, family, "its keys")))
    except (ConfigError, CheckpointError) as error:
        raise ConfigError(f"{where}: a GGUF cannot say what the model is: {str(error).strip()}") from None
    if again != kept:
        raise ConfigError(f"{where}: a GGUF cannot say what the model is: {difference(kept, again, 'config')}")
    return found


def read_back(found: Described, parameters: Mapping[str, Tensor], family: Family, where: str) -> ModelConfig:
    """The model that a file with these keys and tensors would be read as. Raises ConfigError or CheckpointError."""
    stored: dict[str, Stored] = dict(found.vectors)
    for step in found.steps:
        for name, shape in step.shapes(parameters).items():
            stored[name] = Stored(Path(), torch.float32, shape, 0, 0)       # no file yet: its shape is what counts
    metadata = {f"{found.kind}.{key}": value for key, value in found.keys.items()}
    return read_config(read_metadata(metadata, found.kind, family.name, stored, where), where)[1]


def as_stored(config: Any) -> Any:
    """The same config with its numbers as float32 keeps them: 0.3 stays 0.3, and a third loses half of its digits."""
    if isinstance(config, float):
        return shortest(config)
    if isinstance(config, tuple):
        return tuple(map(as_stored, config))
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        fields = {field.name: as_stored(getattr(config, field.name)) for field in dataclasses.fields(config)}
        return dataclasses.replace(config, **fields)
    return config


def keys_of(config: ModelConfig, values: Values, kind: str) -> tuple[Values, dict[str, Held]]:
    """The keys of the architecture, without its name in front, and the tensors that stand for keys."""
    keys: Values = {}
    for key, names in KEYS.items():
        value = next((values[name] for name in names if values.get(name) is not None), None)
        if value is not None:
            keys[key] = float(np.float32(value)) if isinstance(value, float) else value
    if not any(isinstance(layer.mixer, Attention) and layer.mixer.window for layer in config.layers):
        keys.pop("attention.sliding_window", None)
    if kind == "gpt-oss":
        keys["expert_feed_forward_length"] = values["intermediate_size"]
    elif values.get("moe_intermediate_size"):
        keys["expert_feed_forward_length"] = values["moe_intermediate_size"]
    d = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
    if kind not in ("phi2", "phi3"):
        keys |= {"attention.key_length": d, "attention.value_length": d}
    part = values.get("partial_rotary_factor") or 1.0
    keys["rope.dimension_count"] = int(d * part)
    scaling = values.get("rope_scaling") or {}
    vectors: dict[str, Tensor] = {}
    match scaling.get("rope_type", "none"):
        case "linear":
            keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling["factor"])}
        case "yarn":
            keys |= {"rope.scaling.type": "yarn", "rope.scaling.factor": float(scaling["factor"]),
                     "rope.scaling.original_context_length": scaling["original_max_position_embeddings"]}
            keys |= {f"rope.scaling.{name}": float(scaling[key]) for name, key in YARN.items() if key in scaling}
        case "llama3":
            ropes = [layer.mixer.rope for layer in config.layers if isinstance(layer.mixer, Attention)]
            assert isinstance(ropes[0], Rope)
            plain, stretched = (frequencies(one, d, torch.zeros(1, 1))
                                for one in (dataclasses.replace(ropes[0], scaling=None), ropes[0]))
            vectors[FREQS] = (plain / stretched).flatten().float()
        case "longrope":
            keys |= {"rope.scaling.attn_factor": float(scaling["attention_factor"]),
                     "rope.scaling.original_context_length": values["original_max_position_embeddings"]}
            vectors |= {name: torch.tensor(scaling[f"{which}_factor"]) for name, which in ((LONG, "long"),
                                                                                           (SHORT, "short"))}
    return keys, {name: Held(Path(), torch.float32, tuple(one.shape), 0, 4 * one.numel(), one)
                  for name, one in vectors.items()}


def lay_out(folder: Path, found: Described, name: str, tokenizer: Tokenizer | None, kinds: Mapping[str, str],
            shapes: Mapping[str, tuple[int, ...]], rows: int) -> dict[str, Stored]:
    """Write model.gguf up to its tensors, and those that are no weights. Where the others go."""
    # the type that most numbers have
    file_type = max(kinds.values(), key=lambda kind: sum(math.prod(shapes[one]) for one in kinds if kinds[one] == kind))
    keys: Values = {"general.type": "model", "general.name": name, "general.file_type": FILE_TYPES[file_type],
                    "general.quantization_version": 2}
    keys |= {f"{found.kind}.{key}": value for key, value in found.keys.items()}
    keys |= gguf_tokens_export.keys_of(tokenizer, rows) if tokenizer else {"tokenizer.ggml.model": "no_vocab"}
    all_kinds = {**{one: "F32" for one in found.vectors}, **kinds}
    all_shapes = {**{one: held.shape for one, held in found.vectors.items()}, **shapes}
    places = gguf_writing.lay_out(folder / FILE, found.kind, keys, all_kinds, all_shapes,
                                  found.architecture.norm_offset)
    with open(folder / FILE, "r+b") as file:
        for one, held in found.vectors.items():
            file.seek(places.pop(one).start)
            file.write(as_bytes(held.values.contiguous()))
    return places
