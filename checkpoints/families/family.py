"""What there is to know about a family: how its config.json reads, how it is written, and what its tensors are called.

To add one: write `read` with a Reader (every key asked for, see reader.py) and a table of names (table.py), enter it in
`families/__init__.py`, and give it a fixture. If the decoder can already express it, that is all.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from checkpoints.reader import Reader
from checkpoints.table import Table
from nanollm.config import ModelConfig


@dataclass(frozen=True, eq=False)
class Family:
    name: str                                           # the model_type it writes
    read: Callable[[Reader], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]      # what it cannot say is found by reading it back
    tables: tuple[Table, ...]                           # more than one where the names changed over time, newest first
    ignorable: frozenset[str] = frozenset()             # stored tensors that are no weights, with {i} for numbers
    irrelevant: frozenset[str] = frozenset()            # config keys of this family that do not reach the logits
