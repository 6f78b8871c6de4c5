"""What the dataclasses of a config say when a value is impossible: the field, what it is, and what was expected.

    Attention.kv_heads = 3: expected a divisor of heads (8)
"""

import functools
import math
import types
import typing
from typing import Any, ClassVar

from nanollm.errors import ConfigError


class Part:
    """A dataclass of a config. Each is known by its name to `ModelConfig.from_dict`."""
    BY_NAME: ClassVar[dict[str, type]] = {}

    def __init_subclass__(cls) -> None:
        assert cls.__name__ not in Part.BY_NAME, f"two parts of a config are called {cls.__name__}"
        Part.BY_NAME[cls.__name__] = cls


class Mixer(Part):
    """What may be a Layer's `mixer`: it moves information between tokens."""


class FeedForward(Part):
    """What may be a Layer's `ffn`: each token alone."""


def need(condition: bool, owner: Any, field: str, expected: str) -> None:
    """Raises ConfigError unless the condition holds."""
    if not condition:
        raise ConfigError(f"{type(owner).__name__}.{field} = {getattr(owner, field)!r}: expected {expected}")


def need_sizes(owner: Any, *fields: str) -> None:
    """Whole numbers above 0."""
    for field in fields:
        value = getattr(owner, field)
        whole = isinstance(value, int) and not isinstance(value, bool)
        need(whole and value > 0, owner, field, "a positive whole number")


def need_positive(owner: Any, *fields: str) -> None:
    """Finite numbers above 0."""
    for field in fields:
        value = getattr(owner, field)
        finite = isinstance(value, (int, float)) and math.isfinite(value)
        need(finite and value > 0, owner, field, "a finite number above 0")


def present(owner: Any, *fields: str) -> list[str]:
    """Those of the fields that are not None."""
    return [field for field in fields if getattr(owner, field) is not None]


def need_types(kind: type, values: dict[str, Any]) -> None:
    """Values from a file, each of which must be what the field of its name is annotated as."""
    for field, value in values.items():
        expected = _annotations(kind).get(field, Any)            # a name that is none is for the constructor to refuse
        if not _fits(value, expected):
            name = getattr(expected, "__name__", expected)
            raise ConfigError(f"{kind.__name__}.{field} = {value!r}: expected {name}")


_annotations = functools.cache(typing.get_type_hints)


def _fits(value: Any, expected: Any) -> bool:
    if expected is Any:
        return True
    inside = typing.get_args(expected)
    if typing.get_origin(expected) is typing.Literal:
        return value in inside
    if typing.get_origin(expected) in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in inside)
    if typing.get_origin(expected) is tuple:
        return isinstance(value, tuple) and all(_fits(item, inside[0]) for item in value)
    if expected is int:                                          # of two such sizes the product fits 64 bits
        return type(value) is int and abs(value) <= 2**31
    if expected is float:
        return type(value) in (int, float) and abs(value) < 1e38
    return isinstance(value, expected) and (expected is bool or not isinstance(value, bool))
