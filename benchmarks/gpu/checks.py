"""The tests of the kernels on the device: tests/kernels, a pytest for each file, several at a time.

A file has a process of its own, because one illegal address spoils the GPU for all later tests of the same process.
Such a process ends (reports.py), and another one goes on with the tests that are left. First the tests of `make test`,
then, where time is left, those marked slow.
"""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu.facts import installed
from benchmarks.gpu.items import Item, OutOfTime, Row, Setting, Tell
from benchmarks.gpu.lines import POISONED, lines

ROOT = Path(__file__).parent.parent.parent
FIRST = ("attention", "decode", "norm", "rope", "gating", "cross_entropy", "quantized", "moe", "scan", "conv")
ELSEWHERE = ("compiled",)                   # needs no GPU
RESTARTS = 5                                # of one file
SHOWN = 12                                  # failures whose text is kept


def items(setting: Setting) -> Iterator[Item]:
    for name, marked in (("quick", "not slow"), ("slow", "slow")):
        if not (setting.dry and name == "slow"):
            yield Item(f"tests, {name}", lambda tell, name=name, marked=marked: tested(setting, name, marked, tell),
                       seconds=600)


def files(setting: Setting) -> list[Path]:
    """What matters most first; in a dry run one file."""
    found = {path.stem.removeprefix("test_"): path for path in (ROOT / "tests/kernels").glob("test_*.py")}
    names = sorted(found.keys() - set(ELSEWHERE), key=lambda name: (FIRST.index(name) if name in FIRST else 99, name))
    return [found[name] for name in (["gating"] if setting.dry else names)]


class File:
    """The tests of one file: a process, what it has told, and another process behind one that ended too early."""

    def __init__(self, path: Path, reports: Path, marked: str, dry: bool) -> None:
        self.path, self.reports, self.marked, self.dry = path, reports, marked, dry
        self.starts, self.output = 0, reports.with_suffix(".log")
        self.start()

    def start(self) -> None:
        self.starts += 1
        told = {"NANOLLM_REPORTS": str(self.reports), "NANOLLM_FIRST_TESTS": "3" if self.dry else ""}
        asked = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "benchmarks.gpu.reports",
                 "-p", "no:cacheprovider", "-m", self.marked, str(self.path)]
        with self.output.open("ab") as log:
            self.process = subprocess.Popen(asked, cwd=ROOT, env=os.environ | told, stdout=log, stderr=log)

    def over(self) -> bool:
        """Whether nothing runs any more, and nothing is left to run: below POISONED are pytest's own ends."""
        code = self.process.poll()
        if code is None:
            return False
        if 0 <= code < POISONED or self.starts > RESTARTS:
            return True
        with self.reports.open("a") as file:
            for test in self.unfinished():
                text = f"the process ended with {code}"
                file.write(json.dumps({"test": test, "outcome": "died", "text": text}) + "\n")
        self.start()
        return False

    def unfinished(self) -> list[str]:
        """Tests that began and have no outcome: the process died in them."""
        began: dict[str, bool] = {}
        for line in lines(self.reports):
            began[line["test"]] = line["outcome"] == "begun"
        return [test for test, is_open in began.items() if is_open]

    def row(self) -> Row:
        count = Counter(line["outcome"] for line in lines(self.reports) if line["outcome"] != "begun")
        code = self.process.poll()
        ends = {None: "running", 0: "all ran", 1: "all ran", 5: "none marked so"}.get(code, f"ended with {code}")
        bad = count["failed"] + count["died"] + count["error"]
        return {"file": self.path.name, "passed": count["passed"], "failed": bad, "skipped": count["skipped"],
                "state": ends, "starts": self.starts}

    def failures(self) -> list[str]:
        return [f"{line['test']}: {line['outcome']}\n{line.get('text', '')}" for line in lines(self.reports)
                if line["outcome"] in ("failed", "died", "error")]


def tested(setting: Setting, name: str, marked: str, tell: Tell) -> Row:
    """Run all files; tell the counts every two seconds."""
    if not installed("pytest"):
        raise RuntimeError("pytest is not installed here: pip install pytest")
    waiting, running, all_files = files(setting), [], []
    most, told = max(1, min(8, (os.cpu_count() or 2) // 2)), 0.0
    try:
        while waiting or running:
            while waiting and len(running) < most:
                path = waiting.pop(0)
                running.append(File(path, setting.out / f"{path.stem}-{name}.jsonl", marked, setting.dry))
                all_files.append(running[-1])
            time.sleep(0.2)
            running = [file for file in running if not file.over()]
            if time.time() > told + 2:
                told = time.time()
                tell(summary(all_files, waiting))
    except OutOfTime:
        tell(summary(all_files, waiting))
        raise
    finally:
        for file in running:
            file.process.kill()
            file.process.wait()
    return summary(all_files, waiting)


def summary(ran: list[File], waiting: list[Path]) -> Row:
    table = [file.row() for file in ran] + [{"file": path.name, "state": "not begun"} for path in waiting]
    total: dict[str, Any] = {key: sum(row.get(key, 0) for row in table) for key in ("passed", "failed", "skipped")}
    by_file = [file.failures() for file in ran]                 # the first of each file, then the second of each
    failures = [texts[n] for n in range(max(map(len, by_file), default=0)) for texts in by_file if len(texts) > n]
    return total | {"table": [*table, {"file": "all", **total}], "failures": failures[:SHOWN]}
