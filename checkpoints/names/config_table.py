"""The table of a family's config.json: which key is which field of our config, and what a missing key means.

    KEYS = {
        "hidden_size":          size("dim"),
        "num_hidden_layers":    LayerCount(),
        "num_attention_heads":  size("mixer.heads"),
        "num_key_value_heads":  size("mixer.kv_heads", missing=field("mixer.heads")),
        "attention_bias":       flag("mixer.qkv_bias", "mixer.out_bias", missing=False),
        "tie_word_embeddings":  flag("tied", missing=False),
        "pretraining_tp":       only(1),
    }

Reading and writing use the same rows, as they do for the tensors (table.py): config.json → Draft → ModelConfig, and
back. Here are the rows of one key and one value; config_rows.py has those that take several keys or fields together.

A path names a field. "dim" is one of the ModelConfig; a path that begins with a field of Layer ("mixer.heads",
"pre_ffn.eps") is that field in every layer that has it: "ffn.hidden" in those with an MLP, "ffn.expert.hidden" in those
with experts.

What no key says, a family says as a Part: a dataclass some of whose fields are still to come.

    part(Layer, mixer=part(Attention, rope=part(Rope)), ffn=part(MLP), pre_mixer=part(Norm), pre_ffn=part(Norm))

`missing` and `null` are what a missing key and a null mean, as config.json would say it: a value, or a function of the
draft as read so far. Rows that decide which parts the layers have (`shapes`) are read first, then the others in the
order of the table.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from checkpoints.names.reader import ACTIVATIONS, NEEDED, Reader
from nanollm import config as c
from nanollm.errors import ConfigError

ABSENT: Any = object()  # what no layer has


class Part:
    """A dataclass of nanollm.config under construction: the fields that are known, by name. They may be parts too."""

    def __init__(self, kind: type, /, **fields: Any) -> None:
        self.kind, self.fields = kind, fields
        self.names = {field.name: field for field in dataclasses.fields(kind)}
        assert fields.keys() <= self.names.keys(), f"{kind.__name__} has no {fields.keys() - self.names.keys()}"

    def copy(self) -> "Part":
        """Another with the same fields, in which nothing is shared."""
        return Part(self.kind, **{name: value.copy() if isinstance(value, Part) else value
                                  for name, value in self.fields.items()})

    def but(self, fields: Mapping[str, Any]) -> "Part":
        """Another, with these fields (path → value), all of which it must have."""
        other = self.copy()
        for path, value in fields.items():
            other.set(path, value)
            assert other.get(path) is not ABSENT, f"{self.kind.__name__} has no field {path} here"
        return other

    def get(self, path: str) -> Any:
        """The field at a path, its default where nothing set it; ABSENT where this part has no such field."""
        name, _, rest = path.partition(".")
        if name not in self.names:
            return ABSENT
        value = self.fields.get(name, self.names[name].default)
        if not rest or value is ABSENT:
            return value
        if not isinstance(value, Part):
            return of_config(value).get(rest) if dataclasses.is_dataclass(value) else ABSENT
        return value.get(rest)

    def set(self, path: str, value: Any) -> None:
        """Set the field at a path, if this part has it."""
        name, _, rest = path.partition(".")
        if name not in self.names:
            return
        if not rest:
            self.fields[name] = value.copy() if isinstance(value, Part) else value
            return
        inner = self.fields.get(name, self.names[name].default)
        if dataclasses.is_dataclass(inner):  # a default, such as Norm(): from here on a part of its own
            inner = self.fields[name] = of_config(inner)
        if isinstance(inner, Part):
            inner.set(rest, value)

    def build(self) -> Any:
        """The dataclass. Raises ConfigError where its own checks refuse the values."""
        return self.kind(**{name: value.build() if isinstance(value, Part) else value
                            for name, value in self.fields.items()})


part = Part


def of_config(value: Any) -> Any:
    """The inverse of `build`: a dataclass as a Part, with those inside it; any other value as it is."""
    if not dataclasses.is_dataclass(value):
        return value
    return Part(type(value), **{each.name: of_config(getattr(value, each.name)) for each in dataclasses.fields(value)})


class Draft:
    """A ModelConfig under construction: what surrounds the layers, and one Part a layer."""

    def __init__(self, model: Part, layers: list[Part]) -> None:
        self.model, self.layers = model, layers

    @classmethod
    def of(cls, config: c.ModelConfig) -> "Draft":
        """A finished config, to be written from."""
        around = dataclasses.replace(config, layers=config.layers[:1])
        parts = {layer: of_config(layer) for layer in dict.fromkeys(config.layers)}  # equal layers share one: only read
        return cls(of_config(around), [parts[layer] for layer in config.layers])

    def owners(self, path: str) -> list[Part]:
        """The parts that a path is looked up in: the layers, or what surrounds them."""
        return self.layers if path.partition(".")[0] in LAYER_FIELDS else [self.model]

    def __getitem__(self, path: str) -> Any:
        """The field in the first layer that has it. ABSENT if none does."""
        return next((value for value in self.each(path) if value is not ABSENT), ABSENT)

    def __setitem__(self, path: str, value: Any) -> None:
        for owner in self.owners(path):
            owner.set(path, value)

    def __contains__(self, path: str) -> bool:
        return self[path] is not ABSENT

    def each(self, path: str) -> Iterator[Any]:
        """The field in every layer; ABSENT in those that do not have it."""
        return (owner.get(path) for owner in self.owners(path))

    def build(self) -> c.ModelConfig:
        """Equal layers become one object. Raises ConfigError."""
        built: list[c.Layer] = []
        seen: dict[c.Layer, c.Layer] = {}
        for each in self.layers:
            layer = each.build()
            built.append(seen.setdefault(layer, layer))
        self.model.fields["layers"] = tuple(built)
        return self.model.build()


LAYER_FIELDS = {field.name for field in dataclasses.fields(c.Layer)}
FIELDS = {field.name for kind in c.Part.BY_NAME.values() if dataclasses.is_dataclass(kind)
          for field in dataclasses.fields(kind)}


def named(path: str) -> str:
    """The path, whose every step must be a field of some part of a config: a misspelt one would be set nowhere."""
    unknown = [step for step in path.split(".") if step not in FIELDS]
    assert not unknown, f"{path}: no part of a config has a field {unknown[0]!r}"
    return path


# ---- rows

class Row:
    """One key of config.json, or several that say one thing together."""
    shapes = False  # whether it decides which parts the layers have; such rows are read first
    missing: Any = NEEDED  # what a missing key means; not every row lets a family choose

    def where_missing(self, value: Any) -> "Row":
        """The same row for a family in which a missing key means this."""
        row = copy.copy(self)
        row.missing = value
        return row

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        """Take what config.json says into the draft."""
        raise NotImplementedError

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        """The keys that say this of the draft. A value that they cannot express is noticed when they are read back."""
        raise NotImplementedError

    def says(self) -> str:
        """For the documentation: the fields, or the first line of the row's docstring."""
        return (type(self).__doc__ or "").partition("\n")[0]


def given(value: Any, draft: Draft) -> Any:
    """A value, or what a function says of the draft."""
    return value(draft) if callable(value) else value


def field(path: str) -> Callable[[Draft], Any]:
    """For `missing`, `null` and `only`: the value of that field."""
    return lambda draft: draft[path]


def same(value: Any) -> Any:
    return value


class Key(Row):
    """One key, one value, in as many fields as there are paths.

    check     reads and checks what stands there: a method of Reader
    to, of    from config.json's value to ours, and back: exact inverses of each other
    also      other names of the key; where several stand they must agree, and the first is written
    """

    def __init__(
        self, check: Callable[[Reader, str], Any], *paths: str, missing: Any = NEEDED, null: Any = NEEDED,
        to: Callable[[Any], Any] = same, of: Callable[[Any], Any] = same, also: tuple[str, ...] = (),
        shapes: bool = False,
    ) -> None:
        self.check, self.paths, self.missing, self.null = check, tuple(map(named, paths)), missing, null
        self.to, self.of, self.also, self.shapes = to, of, also, shapes

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        """The checked value into each field. A missing key and a null mean what the family says."""
        key = one_name(r, key, *self.also)
        if key in r.values:
            value = r.get(key)
            if value is None and self.null is not NEEDED:
                value = given(self.null, draft)
            elif value is not None or self.missing is not None:
                value = self.check(r, key)
        elif self.missing is not NEEDED:
            value = given(self.missing, draft)
        elif any(path in draft for path in self.paths):
            value = self.check(r, key)  # says that the key is missing
        else:
            return  # of a part that this model does not have
        for path in self.paths:
            draft[path] = None if value is None else self.to(value)

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        ours = next((draft[path] for path in self.paths if path in draft), ABSENT)
        if ours is ABSENT:
            return {}
        return {key: None if ours is None else self.of(ours)}

    def says(self) -> str:
        return ", ".join(self.paths)


def size(*paths: str, **more: Any) -> Key:
    """A positive whole number."""
    return Key(Reader.size, *paths, **more)


def count(*paths: str, **more: Any) -> Key:
    """A size that is also a number of tensors on disk."""
    return Key(Reader.count, *paths, **more)


def number(*paths: str, **more: Any) -> Key:
    """A finite number above 0."""
    return Key(Reader.number, *paths, **more)


def flag(*paths: str, **more: Any) -> Key:
    """true or false."""
    return Key(Reader.flag, *paths, **more)


def choice(words: dict[Any, Any], *paths: str, **more: Any) -> Key:
    """One of some words, each with what it is here; of several words for one thing the first is written."""
    back = {ours: word for word, ours in reversed(words.items())}

    def unlisted(ours: Any) -> Any:
        raise ConfigError(f"{paths[0]} is {ours!r}; expected {' or '.join(map(repr, back))}")

    return Key(lambda r, key: r.must(key, *words), *paths, to=words.__getitem__,
               of=lambda ours: back[ours] if ours in back else unlisted(ours), **more)


def activation(*paths: str, missing: str, **more: Any) -> Key:
    """An activation by its name in transformers; of several names for one thing the family's own is written."""
    return choice({missing: ACTIVATIONS[missing]} | ACTIVATIONS, *paths, missing=missing, **more)


class Switch(Key):
    """true or false: whether a part is there."""

    def __init__(self, path: str, there: Part, missing: bool = False) -> None:
        super().__init__(Reader.flag, path, missing=missing, to=lambda yes: there if yes else None, shapes=True)

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        return {key: draft[self.paths[0]] is not None} if self.paths[0] in draft else {}


class Fixed(Row):
    """A key that is no field of ours.

    accepted   the values that are implemented, or functions of the draft; others are refused. None at all: any is
    writes     what is written; ABSENT: it is left out
    missing    what a missing key means: the first of `accepted`, or this
    also       other names of the key, as in Key
    """

    def __init__(
        self, accepted: tuple[Any, ...], writes: Any = ABSENT, missing: Any = NEEDED, also: tuple[str, ...] = ()
    ) -> None:
        self.accepted, self.writes, self.missing, self.also = accepted, writes, missing, also

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        key, accepted = one_name(r, key, *self.also), [given(value, draft) for value in self.accepted]
        if key not in r.values and self.missing is not NEEDED and self.missing not in accepted:
            raise r.error(key, f"{accepted[0]!r}, which is what is implemented")
        if key in r.values and accepted:
            r.must(key, *accepted)

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        return {} if self.writes is ABSENT else {key: given(self.writes, draft)}

    def says(self) -> str:
        values = " or ".join("the same" if callable(value) else repr(value) for value in self.accepted)
        return f"only {values}" if values else "says nothing here"


def only(*accepted: Any, written: bool = False, **more: Any) -> Fixed:
    """The values that are implemented. The first is what a missing key means, and what is written if `written`."""
    return Fixed(accepted, accepted[0] if written else ABSENT, **more)


def unread(writes: Any) -> Fixed:
    """Whatever stands there says nothing here. It is written because the published code asks for it."""
    return Fixed((), writes)


class Repeats(Row):
    """A key in published configs that transformers does not read: it must say what another one does, or be missing."""

    def __init__(self, other: str, missing: Any) -> None:
        self.other, self.missing = other, missing  # of the other one

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        r.must(key, r.get(self.other, self.missing))

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        return {}

    def says(self) -> str:
        return f"only what {self.other} says"


class Follows(Row):
    """No key but a field, which follows from what was read. In the table the path stands in place of a key."""

    def __init__(self, value: Callable[[Draft], Any]) -> None:
        self.value = value

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        draft[key] = self.value(draft)

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        return {}

    def says(self) -> str:
        return "follows from the others"


def one_name(r: Reader, *keys: str) -> str:
    """Of several names for one thing the first that stands there, or else the first. All that do must agree."""
    present = [key for key in keys if key in r.values]
    present = [key for key in keys if r.get(key, None) is not None] or present or [keys[0]]
    for key in present[1:]:
        r.must(key, r.get(present[0]))
    return present[0]


# ---- a whole table

Keys = dict[str, Row]


def read_keys(keys: Keys, r: Reader, model: Part, layer: Part) -> c.ModelConfig:
    """A config.json by its table; `model` and `layer` are what no key says. Raises ConfigError."""
    draft = Draft(model.copy(), [layer.copy()])
    for shapes in (True, False):
        for key, row in keys.items():
            if row.shapes == shapes:
                row.read(r, draft, key)
    return draft.build()


def write_keys(keys: Keys, config: c.ModelConfig) -> dict[str, Any]:
    """The keys of config.json for a model. Raises ConfigError for what a row has no words for."""
    draft = Draft.of(config)
    values: dict[str, Any] = {}
    for key, row in keys.items():
        values |= row.write(draft, key)
    return values
