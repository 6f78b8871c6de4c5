"""results.json and results.md of a session: rewritten whenever there is something new, each time as a whole."""

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.lines import ended, lines, plain

HIDDEN = ("table", "failures", "bytes", "flops")        # of a row: not columns


@dataclass
class PartState:
    """How far a part has come. state: waiting, running, done, out of time, failed, stopped."""
    name: str
    words: str
    state: str = "waiting"
    allotted: float = 0.0                               # seconds
    seconds: float = 0.0
    starts: int = 0                                     # processes: more than one where one of them died
    problem: str = ""


@dataclass
class Report:
    """What is told of a session."""
    out: Path
    command: str
    dry: bool
    parts: list[PartState]
    state: str = "running"
    begun: float = field(default_factory=time.time)

    def write(self) -> None:
        """Both files."""
        told = self.as_dict()
        replace(self.out / "results.json", json.dumps(told, indent=1, allow_nan=False) + "\n")
        replace(self.out / "results.md", markdown(told))

    def as_dict(self) -> dict[str, Any]:
        parts = []
        for part in self.parts:
            items = ended(lines(self.out / f"{part.name}.jsonl"))
            for name, line in items.items():            # "X | Y" adds to the row of X
                whole, _, more = name.partition(" | ")
                if more and "row" in line and "row" in items.get(whole, {}):
                    items[whole]["row"] |= line["row"]
            parts.append({"part": part.name, "about": part.words, "state": part.state, "problem": part.problem,
                          "allotted_seconds": round(part.allotted), "seconds": round(part.seconds, 1),
                          "processes": part.starts, "items": list(items.values())})
        begun = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(self.begun))
        return plain({"command": self.command, "dry_run": self.dry, "state": self.state, "begun_utc": begun,
                      "seconds": round(time.time() - self.begun, 1), "parts": parts})


def replace(path: Path, text: str) -> None:
    """Whoever reads the file sees the old text or the new one, also after a crash in between."""
    draft = path.with_name(f".{path.name}.tmp")
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


def markdown(told: dict[str, Any]) -> str:
    """A table a part; behind it what went wrong."""
    lines = ["# A session on one GPU", "",
             f"`{told['command']}`, begun {told['begun_utc']} UTC, {told['seconds']:.0f} s, {told['state']}."]
    if told["dry_run"]:
        lines += ["", "**A dry run on a CPU: no figure here means anything.**"]
    for part in told["parts"]:
        lines += ["", f"## {part['part']}", "",
                  f"{part['about']} {part['state']}, {part['seconds']:.0f} of {part['allotted_seconds']} s."]
        rows = [row for item in part["items"] if "row" in item and " | " not in item["item"]
                for row in item["row"].get("table", [item["row"]])]
        if rows:
            lines += ["", *table(rows)]
        for item in part["items"]:
            if item["state"] != "done":
                lines += ["", f"**{item['item']}**: {item['state']}"]
            if item.get("error"):
                lines += ["", "```", *item["error"].strip().splitlines()[-12:], "```"]
            for text in item.get("row", {}).get("failures", []):
                lines += ["", "```", text.strip(), "```"]
        if part["problem"]:
            lines += ["", "```", *part["problem"].strip().splitlines()[-30:], "```"]
    return "\n".join(lines) + "\n"


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The union of their columns."""
    columns = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in HIDDEN]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        lines.append("| " + " | ".join(cell(name, row.get(name)) for name in columns) + " |")
    return lines


def cell(column: str, value: Any) -> str:
    """A number with three digits; a share in percent."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.0%}" if "of " in column else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value).replace("|", "\\|").replace("\n", " ")
