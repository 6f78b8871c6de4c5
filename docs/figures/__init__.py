"""Figures that are computed, not drawn: each file here asks the library for numbers and draws them as an SVG.

    python -m docs.figures              all of them
    python -m docs.figures masks rope   some

docs/figures.md shows them. A test writes each one again and compares bytes, so a figure cannot say anything but what
the code does today.
"""

import importlib
import pkgutil
from pathlib import Path

FOLDER = Path(__file__).parent
NAMES = sorted(file.name for file in pkgutil.iter_modules([str(FOLDER)]) if file.name not in ("__main__", "drawing"))


def draw(name: str) -> str:
    """The SVG of one figure."""
    return str(importlib.import_module(f"docs.figures.{name}").draw())
