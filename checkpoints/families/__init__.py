"""The families, by the `model_type` of their config.json; beside them nanollm's own layout, which is for all.

A family is found by being here: each file has FAMILIES, model_type → Family. A model that was trained here has none; it
is written as the first of TRAINED_HERE whose config.json, read back, is equal.
"""

import difflib
import importlib
import pkgutil
from collections.abc import Collection
from typing import Any

from checkpoints.families.elsewhere import ELSEWHERE
from checkpoints.families.family import Family, difference
from checkpoints.families.nanollm import NANOLLM
from checkpoints.names.reader import Reader, brief
from nanollm.config import ModelConfig
from nanollm.errors import ConfigError

FAMILIES: dict[str, Family] = {}
FILES: dict[str, str] = {}  # model_type → the module that has it
for _file in pkgutil.iter_modules(__path__):
    if _file.name == "__main__":
        continue
    for _kind, _family in getattr(importlib.import_module(f"{__name__}.{_file.name}"), "FAMILIES", {}).items():
        assert _kind not in FAMILIES, f"two families of model_type {_kind}"
        FAMILIES[_kind], FILES[_kind] = _family, _file.name

TRAINED_HERE = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "mamba", "mamba2", "gpt2", "qwen3_5_text")


def family_called(kind: str) -> Family:
    """Of this model_type, or of our own layout."""
    return {**FAMILIES, NANOLLM.name: NANOLLM}[kind]


def read_config(
    values: dict[str, Any], where: str = "config.json", ignore: Collection[str] = (), most: int = 10_000
) -> tuple[Family, ModelConfig]:
    """A config.json as a ModelConfig, and its family. `most` bounds layers and experts.

    Raises ConfigError on an unknown model_type, an impossible value, or a key that nothing read."""
    family = family_of(values, where)
    reader = Reader(values, where, ignore, most)
    try:
        config = family.read(reader)
    except ConfigError as error:  # a combination that the dataclasses refuse does not know its file
        nested = isinstance(values.get("text_config"), dict) and "text_config" not in reader.seen
        hint = (f". A {family.name} is a text model, whose keys stand at the top; there is a text_config, as a "
                "multimodal model has, which has another model_type") if nested else ""
        raise ConfigError((str(error) if where in str(error) else f"{where}: {error}") + hint) from None
    reader.close(family.irrelevant)
    reader.warn()
    return family, config


def family_of(values: dict[str, Any], where: str = "config.json") -> Family:
    """The family that a config.json names. Raises ConfigError on a model_type that is not read."""
    kind = values["model_type"] if "model_type" in values else unnamed(values)
    if isinstance(kind, str) and kind in ELSEWHERE:
        raise ConfigError(f"{where}: model_type is {brief(kind)}: {ELSEWHERE[kind]}")
    if not isinstance(kind, str) or kind not in (*FAMILIES, NANOLLM.name):
        near = difflib.get_close_matches(kind, FAMILIES, 3) if isinstance(kind, str) else []
        hint = f"near it are {', '.join(near)}; " if near else ""
        if kind is None:
            hint = ("no class in architectures says it either; who knows what it is says --family MODEL_TYPE to "
                    "convert, inspect or show; ")
        raise ConfigError(f"{where}: model_type is {brief(kind)}; {hint}"
                          f"python -m checkpoints.families lists the {len(FAMILIES)} that are read")
    return family_called(kind)


def unnamed(values: dict[str, Any]) -> str | None:
    """The model_type of a config.json that has none: that of its class, whose name `architectures` has (Qwen's first
    uploads), or of the first Mamba, by a key of its own."""
    if "ssm_cfg" in values:
        return "state-spaces"
    named = values.get("architectures")
    texts = ((kind, family) for kind, family in FAMILIES.items() if not family.left_out)
    return next((kind for kind, family in texts if named == [family.architecture]), None)


def write_config(config: ModelConfig, family: Family | None = None) -> tuple[Family, dict[str, Any]]:
    """A config.json for this model: of `family`, or else of the first of TRAINED_HERE that can express it.

    Raises ConfigError with what stands in the way, family by family."""
    reasons = []
    for candidate in [family] if family else [FAMILIES[name] for name in TRAINED_HERE]:
        try:
            values = candidate.write(config)
            again = read_config(values, where=f"as {candidate.name}")[1]
        except ConfigError as error:
            reasons.append(f"{candidate.name}: {error}")
            continue
        if again == config:
            return candidate, values
        reasons.append(f"{candidate.name}: {difference(config, again, 'config')}")
    raise ConfigError("no family can express this model:\n  " + "\n  ".join(reasons))
