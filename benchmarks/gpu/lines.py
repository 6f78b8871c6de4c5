"""The lines of a part's file, see items.py. No torch here: the process that waits for the others needs none."""

import contextlib
import json
from pathlib import Path
from typing import Any

POISONED = 75                               # how a process ends whose GPU answers with nothing but errors


def lines(path: Path) -> list[dict[str, Any]]:
    """Of a file that may be written to at this moment: what is no JSON yet is left out."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def ended(found: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The last line of each item. One that has begun, or was interrupted, keeps the row that it had so far."""
    items: dict[str, dict[str, Any]] = {}
    for line in found:
        before = items.get(line["item"], {})
        items[line["item"]] = ({"row": before["row"]} if "row" in before else {}) | line
    return items


def append(path: Path, item: str, state: str, **more: Any) -> None:
    """One line, in one write."""
    with path.open("a") as file:
        file.write(json.dumps({"item": item, "state": state} | plain(more)) + "\n")


def plain(value: Any) -> Any:
    """As strict JSON can say it: a number that is infinite or none becomes a word."""
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    return str(value) if isinstance(value, float) and value - value != 0 else value
