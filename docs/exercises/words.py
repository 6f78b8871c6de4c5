"""What went wrong, in words: where a student's line stands, and why a test of the project fails."""

import ast
import re
import traceback
from pathlib import Path
from typing import Any

from docs.exercises import ROOT
from docs.exercises.blank import Merged

NUMBER = r"(?:tensor\()?([-+]?\d[\d.]*(?:e[-+]?\d+)?)"
BOUND = re.compile(rf"(?:AssertionError: )?assert {NUMBER}[^<]*<=? *{NUMBER}")             # assert tensor(0.2) < 1e-05
WHERE = re.compile(r"\+?\s*(\+\s*)?where |and ")                                        # of pytest, on what was called


class Report:
    """A plugin of pytest, and while it is entered the last word of torch.equal.

    failed: what to say of the first test that fails, as lines; empty if none does."""

    def __init__(self, name: str, merged: Merged | None) -> None:
        self.name, self.merged = name, merged
        self.passed = 0
        self.skipped: list[str] = []            # why
        self.failed: list[str] = []
        self.unequal: tuple[Any, ...] | None = None

    def __enter__(self) -> "Report":
        import torch

        self.equal = torch.equal

        def equal(*tensors: torch.Tensor) -> bool:
            alike = self.equal(*tensors)
            self.unequal = None if alike else tensors
            return alike

        torch.equal = equal
        return self

    def __exit__(self, *_: object) -> None:
        import torch

        torch.equal = self.equal

    def pytest_runtest_logreport(self, report) -> None:
        if report.skipped:
            self.skipped.append(str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr))
        elif report.passed and report.when == "call":
            self.passed += 1

    def pytest_exception_interact(self, node, call, report) -> None:
        """Called for each failure, of a test or while tests are collected."""
        if self.failed:
            return
        error = call.excinfo.value
        place, _ = place_of(error, self.name, self.merged)
        parameters = getattr(getattr(node, "callspec", None), "params", {})
        settings = ", ".join(f"{name} {brief(value)}" for name, value in parameters.items())
        self.failed = [node.nodeid.partition("[")[0] + (f", with {settings}" if settings else ""),
                       *self.reasons(error, str(report.longrepr))]
        if place:
            self.failed.append(place.removeprefix(", "))

    def reasons(self, error: BaseException, text: str) -> list[str]:
        """Why it failed, in few lines."""
        from docs.exercises.compare import difference

        if not isinstance(error, AssertionError):
            return [f"{type(root(error)).__name__}: {str(root(error))[:300]}"]
        marked = [row[1:].strip() for row in text.splitlines() if row.startswith("E ")]
        stated = [row[1:].strip() for row in text.splitlines() if row.startswith(">")][-1:]
        if any("equal" in row for row in marked + stated):
            if self.unequal is not None:
                return [difference(*self.unequal)]
            if any("not torch.equal" in row for row in stated):
                return ["two tensors are equal, and should differ:", *stated]
        rows = [row for row in marked if row and "Use -v" not in row and not WHERE.match(row)][:4]
        if rows and (found := BOUND.match(rows[0])):
            rows = [f"the difference is {float(found[1]):.3g}, and should be below {float(found[2]):.3g}, in"]
        elif rows and re.fullmatch(r"(AssertionError: )?assert (not )?(False|True)", rows[0]):
            rows = ["this does not hold:"]
        return [row[:160] for row in [*rows, *stated]]


def brief(value: Any) -> str:
    """A parameter of a test in few words: bfloat16, the name of a class or a function, else its repr."""
    words = getattr(value, "__name__", None) or str(value).removeprefix("torch.")
    return words if len(words) <= 60 else f"{words[:57]}…"


def silent(function: ast.FunctionDef) -> bool:
    """Whether a function can only return None: no return with a value, no yield, and it raises nothing instead."""
    inner = [node for one in function.body for node in ast.walk(one)]
    if any(isinstance(node, ast.Yield | ast.YieldFrom | ast.Raise) for node in inner):
        return False
    return not any(isinstance(node, ast.Return) and node.value is not None for node in inner)


def yours(name: str) -> str:
    """The file that is imported; no file of the library has that name, so tracebacks can be told apart."""
    return f"your_{name}.py"


def root(error: BaseException) -> BaseException:
    """What began it: Triton's interpreter wraps what happens inside a kernel."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def place_of(error: BaseException, name: str, merged: Merged | None) -> tuple[str, bool]:
    """', line 31 of your file', the innermost that is the student's, with the helper that it called, if it happened
    there; and whether the traceback has such a line."""
    frames: list[traceback.FrameSummary] = []
    seen: BaseException | None = error
    while seen is not None:
        frames += traceback.extract_tb(seen.__traceback__)
        seen = seen.__cause__
    lines = [merged.theirs(frame.lineno or 0) if merged and Path(frame.filename).name == yours(name) else None
             for frame in frames]
    known = [at for at, line in enumerate(lines) if line]
    if not known:
        return "", False
    place = f", line {lines[known[-1]]} of your file"
    called = frames[known[-1] + 1] if known[-1] + 1 < len(frames) else None
    if called and (Path(called.filename).name == yours(name) or Path(called.filename).is_relative_to(ROOT)):
        place += f", inside {called.name}, which it calls"
    return place, True
