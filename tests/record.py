"""When and on what the rows of docs/families.md and docs/refusals.md were measured.

The row has a letter, the head of the document a line for each letter:

    - a: 2026-11-27, x86_64, one thread, torch 2.13.0+cpu, transformers 5.23.0
"""

import platform
import re
from collections.abc import Iterable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from string import ascii_lowercase

import torch


def here_and_now() -> str:
    """What such a line says of a measurement that is made now."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    processor = found[1] if found else platform.processor() or platform.machine()
    return f"{date.today()}, {processor}, one thread, torch {torch.__version__}, transformers {version('transformers')}"


def lettered(places: Iterable[str]) -> tuple[dict[str, str], str]:
    """A letter for each place, in the order in which they come, and the lines that say so."""
    letters = dict(zip(dict.fromkeys(places), ascii_lowercase, strict=False))
    return letters, "\n".join(f"  - {letter}: {place}" for place, letter in letters.items())


def places(text: str) -> dict[str, str]:
    """Letter → what its line says, of a document."""
    return dict(re.findall(r"^  - ([a-z]): (.+)$", text, re.MULTILINE))
