"""A config as plain JSON values, and back: each dataclass is an object with its class name under "is"."""

import dataclasses
from typing import Any

from nanollm.config.checks import Part, need_types


def encoded(value: Any) -> Any:
    """A dataclass, a tuple of them, or a plain value."""
    if dataclasses.is_dataclass(value):
        fields = {field.name: encoded(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"is": type(value).__name__} | fields
    return [encoded(item) for item in value] if isinstance(value, tuple) else value


def decoded(value: Any) -> Any:
    """The inverse. Raises KeyError, TypeError, ValueError or ConfigError on what `encoded` does not write."""
    if isinstance(value, dict):
        fields = {name: decoded(item) for name, item in value.items() if name != "is"}
        kind = Part.BY_NAME[value["is"]]
        need_types(kind, fields)
        return kind(**fields)
    return tuple(decoded(item) for item in value) if isinstance(value, list) else value
