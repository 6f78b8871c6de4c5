"""A plugin of pytest that writes a line for each test when it begins and when it is over: see checks.py.

    NANOLLM_REPORTS        the file; tests that have an outcome in it are not run again
    NANOLLM_FIRST_TESTS    so many tests and no more
"""

import json
import os
from pathlib import Path

import pytest

from benchmarks.gpu.lines import POISONED, lines

FILE = Path(os.environ["NANOLLM_REPORTS"])
SPOILT = ("CUDA error", "illegal memory access", "device-side assert", "AcceleratorError")


def write(test: str, outcome: str, text: str = "") -> None:
    with FILE.open("a") as file:
        file.write(json.dumps({"test": test, "outcome": outcome, "text": text}) + "\n")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    over = {line["test"] for line in lines(FILE) if line["outcome"] != "begun"}
    items[:] = [item for item in items if item.nodeid not in over]
    if most := os.environ.get("NANOLLM_FIRST_TESTS"):
        items[:] = [item for item in items if not item.get_closest_marker("slow")][: int(most)]


def pytest_runtest_logstart(nodeid):
    write(nodeid, "begun")


def pytest_runtest_logreport(report):
    """A test has an outcome when it was called, or when its set-up kept it from that."""
    if report.when == "call" or (report.when == "setup" and report.outcome != "passed"):
        text = report.longreprtext[-2500:] if report.failed else ""
        write(report.nodeid, report.outcome, text)
        if any(word in text for word in SPOILT):
            pytest.exit("the GPU answers with errors from here on", returncode=POISONED)


def pytest_collectreport(report):
    if report.failed:
        write(report.nodeid or "collection", "error", report.longreprtext[-2500:])
