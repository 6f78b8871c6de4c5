"""What a position adds to an embedding, as data: a learned table with more rows than positions, or sines."""

from dataclasses import dataclass

from nanollm.config.checks import Part, need, need_sizes


@dataclass(frozen=True)
class Positions(Part):
    """A table whose first rows stood for padding: position p is row p + first."""
    rows: int                               # of the table; OPT 2050
    first: int                              # the row of position 0; OPT 2

    def __post_init__(self) -> None:
        need_sizes(self, "rows", "first")
        need(self.first < self.rows, self, "first", f"less than rows ({self.rows})")


@dataclass(frozen=True)
class Sines(Part):
    """Sines and cosines of the position, with nothing learned: position p reads those of p + first."""
    first: int                              # XGLM 2

    def __post_init__(self) -> None:
        need_sizes(self, "first")


Table = int | Positions | Sines | None       # of a ModelConfig; a number is a table with a row for each position


def table_of(positions: int | Positions) -> tuple[int, int]:
    """(rows, the row of position 0)"""
    return (positions, 0) if isinstance(positions, int) else (positions.rows, positions.first)


def places(positions: Table) -> int | None:
    """How many positions there are; None where there is no table."""
    if positions is None or isinstance(positions, Sines):
        return None
    rows, first = table_of(positions)
    return rows - first
