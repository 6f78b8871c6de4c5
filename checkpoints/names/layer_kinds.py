"""Rows of config_table.py for families whose layers are of several kinds, and whose keys speak of one kind alone.

    LayerKinds     which kind of layer, with its mixer and its feed-forward, stands where
    Within         a row for one of the mixers that a layer has side by side
    Among          a row for the layers with one kind of mixer: the heads of Mamba-2 are not those of attention
"""

from collections.abc import Callable, Mapping
from typing import Any

from checkpoints.names.config_rows import WriteKinds
from checkpoints.names.config_table import Draft, Part, Row
from checkpoints.names.reader import Reader
from nanollm.config import Layer
from nanollm.errors import ConfigError


class LayerKinds(Row):
    """Which of several layers stands where. It also says how many there are.

    layers         a name for each kind → the layer, with its mixer and its ffn
    read_kinds     Reader → the name of each layer's kind
    write_kinds    names → the keys that say so
    """
    shapes = True

    def __init__(self, layers: dict[str, Part], read_kinds: Callable[[Reader], list[str]],
                 write_kinds: WriteKinds) -> None:
        self.layers, self.read_kinds, self.write_kinds = layers, read_kinds, write_kinds

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        kinds = self.read_kinds(r)
        if len(kinds) > r.most:
            raise r.error(key, f"at most {r.most} layers")
        draft.layers = [self.layers[kind].copy() for kind in kinds]

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        """Raises ConfigError for a layer that is none of them."""
        known = {(kind_of(each, "mixer"), kind_of(each, "ffn")): name for name, each in self.layers.items()}
        found = [(kind_of(layer, "mixer"), kind_of(layer, "ffn")) for layer in draft.layers]
        for i, (mixer, ffn) in enumerate(found):
            if (mixer, ffn) not in known:
                raise ConfigError(f"layers[{i}] has {mixer.__name__} and {ffn.__name__}, which is none of "
                                  f"{', '.join(self.layers)}")
        return self.write_kinds([known[each] for each in found])

    def kinds_in(self, slot: str) -> list[type]:
        """As in Kinds."""
        return [kind_of(each, slot) for each in self.layers.values()]

    def says(self) -> str:
        return f"layers: {' or '.join(self.layers)}"


def kind_of(layer: Part, slot: str) -> type:
    """The class of what stands in a slot of a layer; NoneType where nothing does."""
    value = layer.get(slot)
    return value.kind if isinstance(value, Part) else type(value)


NEW_WORDS = {"linear_attention": "mamba", "full_attention": "attention"}  # transformers' since version 5


def words_of(r: Reader, key: str, known: Mapping[str, str], number: int | None = None) -> list[str]:
    """A list of words, one a layer, each as what it is called here. Raises ConfigError for any other word."""
    words = r.get(key)
    found = [known[one] for one in words if isinstance(one, str) and one in known] if isinstance(words, list) else []
    if not found or len(found) < len(words) or number not in (None, len(found)):
        raise r.error(key, f"{number or 'as many as there are layers'} times {' or '.join(known)}")
    return found


class Among(Row):
    """A row for the layers with one kind of mixer."""

    def __init__(self, mixer: type, row: Row) -> None:
        self.mixer, self.row, self.shapes = mixer, row, row.shapes

    def where_missing(self, value: Any) -> "Among":
        return Among(self.mixer, self.row.where_missing(value))

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        self.row.read(r, self.part_of(draft), key)

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        return self.row.write(self.part_of(draft), key)

    def part_of(self, draft: Draft) -> Draft:
        """The same parts, without the layers that have another mixer."""
        return Draft(draft.model, [layer for layer in draft.layers if kind_of(layer, "mixer") is self.mixer])

    def says(self) -> str:
        return f"{self.row.says()} of {self.mixer.__name__}"


class Within(Among):
    """A row for a mixer that stands in a field of a layer's mixer: its paths begin with "mixer", as elsewhere."""

    def __init__(self, inner: str, row: Row) -> None:
        self.inner, self.row, self.shapes = inner, row, row.shapes

    def where_missing(self, value: Any) -> "Within":
        return Within(self.inner, self.row.where_missing(value))

    def part_of(self, draft: Draft) -> Draft:
        """The same part of each layer, as the mixer of a layer of its own: what is set there is set here."""
        return Draft(draft.model, [Part(Layer, mixer=layer.get(f"mixer.{self.inner}")) for layer in draft.layers])

    def says(self) -> str:
        return self.row.says().replace("mixer.", f"mixer.{self.inner}.")
