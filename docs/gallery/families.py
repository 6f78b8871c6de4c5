"""What each family differs in from Llama, and which differ alike.

    fixture → config.json → ModelConfig → kinds of layers → (place, words) for each difference

Which key of config.json says a difference is found by leaving the key away: what is gone then, it said. What stays no
key decides, or a missing one means it. Families whose kinds of layers and surroundings differ in the same words are one
group, whatever their keys are called.
"""

import dataclasses
import json
import re
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from checkpoints.families import FAMILIES, read_config
from checkpoints.show.drawing import names
from checkpoints.show.words import of_layer, of_model
from nanollm.config import Layer, ModelConfig
from nanollm.errors import ConfigError
from tests.fixtures import FIXTURES
from tests.oracles import Fixture, hf_config

LETTERS = {"window": "W", "softcap": "c", "head_softcap": "c", "clip": "c", "top_k": "k", "experts": "E",
           "fraction": "r", "positions": "N"}               # others: n for whole numbers, s for factors
KEPT = {"offset", "renormalize", "number"}                  # numbers that are the family's
WIDTHS = ("the heads are ",)                                # sizes are no difference
Difference = tuple[str, str]                                # place, words


class Whole(int):
    """A number of a small fixture, said as the letter that stands for it."""
    letter = "n"

    def __str__(self) -> str:
        return self.letter

    def __format__(self, _: str) -> str:
        return self.letter


class Real(float):
    """The same of a float."""
    letter = "s"
    __str__, __format__ = Whole.__str__, Whole.__format__


class Kind(NamedTuple):
    """Layers of a family that differ from Llama's alike."""
    name: str
    layer: Layer
    differences: tuple[Difference, ...]


class Family(NamedTuple):
    """A model_type, as its fixture has it."""
    model_type: str
    fixture: str
    kinds: tuple[Kind, ...]
    model: tuple[Difference, ...]                           # what differs around the layers
    keys: dict[Difference, str]                             # of those that a key of config.json says

    def shape(self) -> tuple:
        """Equal for families that differ from Llama in the same."""
        return frozenset(kind.differences for kind in self.kinds), self.model


def in_letters(value: Any, name: str = "") -> Any:
    """A config with letters for its numbers."""
    if dataclasses.is_dataclass(value):
        fields = {field.name: in_letters(getattr(value, field.name), field.name) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **{k: v for k, v in fields.items() if v is not getattr(value, k)})
    if isinstance(value, tuple) and name == "layers":
        known = {layer: in_letters(layer) for layer in dict.fromkeys(value)}
        return tuple(known[layer] for layer in value)
    if isinstance(value, tuple):
        return tuple(in_letters(one, name) for one in value)
    if type(value) not in (int, float) or name in KEPT:
        return value
    found = Whole(value) if isinstance(value, int) else Real(value)
    found.letter = LETTERS.get(name, found.letter)
    return found


def plainly(words: str) -> str:
    """Without the sizes of a part that is named: "every token goes to MLP(F=96) too" → "… to MLP too"."""
    shorter = re.sub(r"\b([A-Z]\w+)\([^()]*\)|=\([^()]*\)", r"\1", words)
    return words if shorter == words else plainly(shorter)


def published(fixture: Fixture) -> dict[str, Any]:
    """The config.json of the fixture's folder."""
    theirs = hf_config(fixture)
    theirs.dtype = "float32"
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        values = json.loads((Path(folder) / "config.json").read_text())
    if fixture.edit is not None:
        fixture.edit(values)
    return values


def differences(config: ModelConfig) -> tuple[tuple[Kind, ...], tuple[Difference, ...]]:
    """Of the kinds of layers, and around them; numbers in letters."""
    config = in_letters(config)
    found: dict[tuple[Difference, ...], tuple[list[str], Layer]] = {}
    layers = list(dict.fromkeys(config.layers))
    for name, layer in zip(names(layers), layers, strict=True):
        said = ((place, plainly(part)) for place, words in of_layer(layer, config.dim) for part in words.split("; ")
                if not words.startswith(WIDTHS))
        found.setdefault(tuple(dict.fromkeys(said)), ([], layer))[0].append(name)
    called = [alike[0] for alike, _ in found.values()]
    plain = [re.sub(r" \d+$", "", name) for name in called]             # numbers, where they still tell kinds apart
    called = [name if plain.count(short) > 1 else short for name, short in zip(called, plain, strict=True)]
    kinds = (Kind(name, layer, said) for name, (said, (_, layer)) in zip(called, found.items(), strict=True))
    return tuple(kinds), tuple((place, plainly(words)) for place, words in of_model(config))


def all_of(config: ModelConfig) -> set[Difference]:
    """Those of any kind, and those around the layers."""
    kinds, model = differences(config)
    return {*model, *(said for kind in kinds for said in kind.differences)}


def described(model_type: str, fixture: str, values: dict[str, Any]) -> Family:
    """A family from the config.json of one of its models."""
    config = read_config(values)[1]
    kinds, model = differences(config)
    whole, keys = all_of(config), {}
    for key, value in values.items():
        if key == "model_type" or value in (None, False) or (isinstance(value, (int, list)) and value is not True):
            continue                                        # sizes and patterns are said by the kinds of layers
        try:
            without = read_config({k: v for k, v in values.items() if k != key})[1]
        except ConfigError:
            continue                                        # it must stand
        if without != config:
            keys |= {gone: key for gone in whole - all_of(without)}
    return Family(model_type, fixture, kinds, model, keys)


def families() -> list[Family]:
    """One of each model_type that has a fixture: its first."""
    found: dict[str, Family] = {}
    for name, fixture in FIXTURES.items():
        values = published(fixture)
        model_type = values.get("model_type") or read_config(values)[0].name
        if model_type not in found:
            found[model_type] = described(model_type, name, values)
    return [found[model_type] for model_type in FAMILIES if model_type in found]


def with_towers() -> dict[str, list[str]]:
    """model_type of a text model → those of folders that have it beside a tower for pictures, which is left out."""
    found: dict[str, list[str]] = {}
    for model_type, family in FAMILIES.items():
        if family.left_out:
            found.setdefault(family.name, []).append(model_type)
    return found


def groups(every: list[Family]) -> list[list[Family]]:
    """Families that differ alike, those that differ least first."""
    found: dict[tuple, list[Family]] = {}
    for family in every:
        found.setdefault(family.shape(), []).append(family)
    alike = [sorted(group, key=lambda one: one.model_type != "llama") for group in found.values()]
    return sorted(alike, key=lambda group: (len(group[0].kinds), count(group[0])))


def count(family: Family) -> int:
    """Differences in all."""
    return len(family.model) + len({said for kind in family.kinds for said in kind.differences})
