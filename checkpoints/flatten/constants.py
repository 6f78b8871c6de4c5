"""The numbers of a config by name: HEADS, HEAD_DIM, EPS. What differs between layers has none."""

import dataclasses
import functools
import re
from typing import Any

from checkpoints.flatten.sources import source
from nanollm.config import ModelConfig

Path = tuple[str, ...]


def walk(value: Any, path: Path = ()) -> list[tuple[Path, Any]]:
    """All dataclasses of a config with where they stand; layers share the path of what they have in common."""
    found = []
    if dataclasses.is_dataclass(value):
        found.append((path, value))
        for field in dataclasses.fields(value):
            inner = getattr(value, field.name)
            if field.name == "layers":
                found += [one for layer in dict.fromkeys(inner) for one in walk(layer)]
            else:
                found += walk(inner, (*path, field.name))
    return found


class Constants:
    """comments: name → what the config's class says of the field, for those that were used."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        parts = walk(config)
        self.objects = [part for _, part in parts]
        self.places: dict[int, set[tuple[Path, type]]] = {}
        self.values: dict[tuple[Path, type, str], set[Any]] = {}
        for path, part in parts:
            self.places.setdefault(id(part), set()).add((path, type(part)))
            for field in dataclasses.fields(part):
                value = getattr(part, field.name)
                if isinstance(value, (int, float)) and not isinstance(value, bool):
                    self.values.setdefault((path, type(part), field.name), set()).add(value)
        self.table = self.named()
        self.comments: dict[str, tuple[Any, str]] = {}

    def named(self) -> dict[tuple[Path, type, str], str]:
        """The name of each number that all layers agree on: its field's, with more where two differ."""
        single = {key: next(iter(values)) for key, values in self.values.items() if len(values) == 1}
        table = {}
        for key, value in single.items():
            path, kind, field = key
            alike = [other for other in self.values if other[2] == field]
            if all(self.values[other] == {value} for other in alike):
                table[key] = field.upper()
                continue
            of_kind = [self.values[other] == {value} for other in alike if other[1] is kind]
            whole = len(of_kind) > 1 and all(of_kind)           # of that class wherever it stands
            inner = kind.__name__ if whole or not path or path[-1] in ("mixer", "ffn") else path[-1]
            name = f"{re.sub('(?<=[a-z])(?=[A-Z])', '_', inner)}_{field}".upper()
            if name in table.values() and any(single[other] != value for other, one in table.items() if one == name):
                continue
            table[key] = name
        return table

    def name(self, owners: list[Any], field: str) -> str | None:
        """The constant that a field of these objects is, noted as used; None where it has no name."""
        names = {self.table.get((*place, field)) for owner in owners for place in self.places.get(id(owner), ())}
        if len(names) != 1 or None in names or not all(id(owner) in self.places for owner in owners):
            return None
        name = str(names.pop())
        self.comments[name] = getattr(owners[0], field), self.comment(owners[0].__class__, field)
        return name

    def by_name(self, name: str, value: Any) -> str | None:
        """A constant of that name, where it has that value."""
        for (path, kind, field), one in self.table.items():
            if one == name and self.values[path, kind, field] == {value}:
                self.comments[name] = value, self.comment(kind, field)
                return name
        return None

    def gives(self, text: str, value: Any) -> bool:
        """Whether an expression of constants has a value."""
        try:
            found = eval(text, {name: one for name, (one, _) in self.comments.items()})
        except Exception:
            return False
        return type(found) is type(value) and bool(found == value)

    def of_number(self, value: Any) -> str:
        """A number, by the one constant that it is among those in use; else as it is."""
        names = [name for name, (one, _) in self.comments.items() if type(one) is type(value) and one == value]
        return names[0] if len(names) == 1 and isinstance(value, int) and value > 16 else repr(value)

    @staticmethod
    @functools.cache
    def comment(kind: type, field: str) -> str:
        """What the class says of a field, without the example behind the last semicolon."""
        for one in kind.__mro__:
            found = source(one.__module__)
            for line in found.lines(1, len(found.starts) - 1) if one.__module__.startswith("nanollm") else []:
                match = re.match(rf"    {field}: [^#]*# (.*)", line)
                if match:
                    said, *example = match[1].rsplit("; ", 1)
                    return said if example else re.sub(r"; [^;]*$", "", said)
        return ""
