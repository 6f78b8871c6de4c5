"""What there is to know about a family: how its config.json reads, how it is written, and what its tensors are called.

To add one: write `read` with a Reader (every key asked for, see reader.py) and a table of names (table.py), enter it in
`families/__init__.py`, and give it a fixture. If the decoder can already express it, that is all.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from checkpoints.names.reader import Reader
from checkpoints.names.table import Table
from nanollm.config import ModelConfig


@dataclass(frozen=True, eq=False)
class Family:
    """A lineage, both ways. Several model_types may share one."""
    name: str                                           # the model_type it writes
    read: Callable[[Reader], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]      # what it cannot say is found by reading it back
    tables: tuple[Table, ...]                           # more than one where the names changed over time, newest first
    ignorable: frozenset[str] = frozenset()             # stored tensors that are no weights, with {i} for numbers
    irrelevant: frozenset[str] = frozenset()            # config keys of this family that do not reach the logits
    left_out: tuple[str, ...] = ()                      # of a multimodal family: prefixes of the tensors of its other towers. What is
                                                        # loaded is a text model, and is saved as FAMILIES[name]
    ahead: str = ""                                     # a tensor by which one layer more than the model has is known, {i} its number,
                                                        # that predicts the token after the next; that layer is left out
