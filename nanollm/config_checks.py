"""What the dataclasses of a config say when a value is impossible: the field, what it is, and what was expected.

    Attention.kv_heads = 3: expected a divisor of heads (8)
"""

import math
from typing import Any

from nanollm.errors import ConfigError


def need(condition: bool, owner: Any, field: str, expected: str) -> None:
    """Raises ConfigError unless the condition holds."""
    if not condition:
        raise ConfigError(f"{type(owner).__name__}.{field} = {getattr(owner, field)!r}: expected {expected}")


def need_sizes(owner: Any, *fields: str) -> None:
    """Whole numbers above 0."""
    for field in fields:
        value = getattr(owner, field)
        need(isinstance(value, int) and not isinstance(value, bool) and value > 0, owner, field, "a positive whole number")


def need_positive(owner: Any, *fields: str) -> None:
    """Finite numbers above 0."""
    for field in fields:
        value = getattr(owner, field)
        need(isinstance(value, (int, float)) and math.isfinite(value) and value > 0, owner, field, "a finite number above 0")
