"""Latent attention that reads few of its keys, as data: layers/sparse_attention.py."""

from dataclasses import dataclass
from typing import Literal

from nanollm.config.checks import Part, need, need_sizes
from nanollm.config.mixers import LatentAttention


@dataclass(frozen=True)
class Indexer(Part):
    """What ranks the keys, sparse_attention.py."""
    heads: int                              # J, its heads; 64
    head_dim: int                           # i, width of its queries and keys, of which the first rope_dim turn; 128
    top: int                                # k, keys that a query reads; 2048
    layout: Literal["half", "interleaved"] = "half"     # which two channels turn together; GLM-5 "interleaved"

    def __post_init__(self) -> None:
        need_sizes(self, "heads", "head_dim", "top")
        need(self.layout in ("half", "interleaved"), self, "layout", "'half' or 'interleaved'")


@dataclass(frozen=True)
class SparseLatentAttention(LatentAttention):
    """Latent attention whose queries read those keys alone that an index ranks first, sparse_attention.py."""
    indexer: Indexer | None = None          # None: they are those of the nearest layer before that has one; GLM-5.2

    def __post_init__(self) -> None:
        super().__post_init__()
        need(self.q_rank is not None, self, "q_rank", "a size, of what queries and the index are made from")
        wide = self.indexer is None or self.indexer.head_dim >= self.rope_dim
        need(wide, self, "indexer", f"a head_dim of at least the {self.rope_dim} channels that turn")
