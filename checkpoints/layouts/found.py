"""What every layout is asked, and the one thing that it hands over."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints.names.table import Table
from checkpoints.storage.files import Stored

LARGEST_CONFIG = 10_000_000  # bytes of a config.json or params.json


@dataclass(frozen=True)
class Asked:
    """How a model is to be read."""
    family: str | None = None  # a model_type in place of the one that is said, for folders that say none
    allow_pickle: bool = False  # pickles may be opened
    ignore: tuple[str, ...] = ()  # keys and tensors to pass over


@dataclass(frozen=True)
class Found:
    """A model on disk, not yet understood: what describes it, and the headers of its tensors."""
    folder: Path  # where its tokenizer would be too
    layout: str  # "hf", "meta", "mistral" or "gguf"
    values: dict[str, Any]  # config.json, or the same said of another layout
    where: str  # the file that says so
    stored: dict[str, Stored]
    tables: tuple[Table, ...] = ()  # the names in this layout; none: the family's own
    interleaved: bool = False  # RoPE rotates neighbouring channels, as stored in this layout
    ignorable: frozenset[str] = frozenset()  # tensors of this layout that are no weights
    inside: Path | None = None  # the file that has a tokenizer inside, as a GGUF does; None: it lies in the folder

    @property
    def said_by(self) -> str:
        """What describes the model, in an error: a GGUF has keys, other layouts a file."""
        return "its keys" if self.inside else Path(self.where).name
