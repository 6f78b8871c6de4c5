"""Grade one file in a process of its own: the student's functions in the library, small numbers, then the tests.

    python -m docs.exercises.grade NAME FILE            exit status: 0 right, 1 wrong, 2 nothing was graded

When the library imports the module of the exercise, it gets the source with the student's functions in it, so every
layer, model and test of this process uses them. Without a FILE the sources are graded as they are.
"""

import importlib
import importlib.util
import io
import os
import sys
import tempfile
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import ModuleType

from docs.exercises import EXERCISES, ROOT, Exercise
from docs.exercises.blank import Merged, merge

WRONG, NOTHING = 1, 2


class Instead:
    """Among those whom Python asks for a module, the first: for one name it has another file."""

    def __init__(self, module: str, path: Path) -> None:
        self.module, self.path = module, path

    def find_spec(self, name: str, path=None, target=None):
        return importlib.util.spec_from_file_location(name, self.path) if name == self.module else None


class Report:
    """What pytest tells while it runs."""

    def __init__(self) -> None:
        self.passed = 0
        self.skipped: list[str] = []        # why
        self.failed: list = []              # reports

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed:
            self.failed.append(report)
        elif report.skipped:
            self.skipped.append(str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr))
        elif report.when == "call":
            self.passed += 1

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            self.failed.append(report)


def main(name: str, file: str | None = None) -> int:
    """Grade an exercise; print what a student needs to know, and return the exit status."""
    exercise = EXERCISES[name]
    if exercise.needs and importlib.util.find_spec(exercise.needs) is None:
        print(f"{name}: not graded, {exercise.needs} is not installed here")
        return NOTHING
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        merged = None
        if file is not None:
            try:
                merged = merge(exercise.source(), Path(file).read_text(), exercise.module, exercise.blanks)
            except SyntaxError as error:
                print(f"{name}: line {error.lineno} of {Path(file).name} is not Python: {error.msg}")
                return WRONG
            except LookupError as error:
                print(f"{name}: in {Path(file).name} {error.args[0]}; the function must keep its name and place")
                return WRONG
            path = Path(folder, yours(name))
            path.write_text(merged.text)
            sys.meta_path.insert(0, Instead(exercise.module, path))
        return small_numbers(exercise, merged) or the_tests(exercise, merged)


def small_numbers(exercise: Exercise, merged: Merged | None) -> int:
    """Each case of cases.py; 0 if all come out."""
    from docs.exercises.cases import CASES, same, shown

    words, count = "the file itself, as it is imported", 0
    try:
        module: ModuleType = importlib.import_module(exercise.module)
        for words, expected, got in CASES[exercise.name](module):
            if not same(expected, got):
                print(f"{exercise.name}: not yet. By hand, {words}")
                print(f"  expected  {shown(expected)}\n  got       {shown(got)}")
                return WRONG
            count += 1
    except Exception as error:
        after = "the first case" if count == 0 else f"what comes after “{words}”"
        line = where(error, exercise.name, merged)
        if isinstance(root(error), NotImplementedError):
            print(f"{exercise.name}: still blank{line}")
        else:
            print(f"{exercise.name}: not yet. In {after}{line}\n  {type(root(error)).__name__}: {root(error)}")
        return WRONG
    print(f"{exercise.name}: all {count} small cases come out as by hand")
    return 0


def the_tests(exercise: Exercise, merged: Merged | None) -> int:
    """The project's own tests that are named in the exercise."""
    try:
        import pytest
        import transformers  # noqa: F401  what most of the tests compare with
    except ImportError as missing:
        print(f"  not graded further: {missing.name} is not installed; pip install -e '.[test]' in the repository")
        return NOTHING
    report, said = Report(), io.StringIO()
    os.chdir(ROOT)
    with redirect_stdout(said), redirect_stderr(said):
        status = pytest.main(["-o", "addopts=", "-p", "no:cacheprovider", "-x", *exercise.tests], plugins=[report])
    for failed in report.failed:
        print(f"{exercise.name}: not yet. A test of the project fails:\n  {failed.nodeid}")
        line = next((merged.theirs(number) for path, number in frames(failed) if path == yours(exercise.name)),
                    None) if merged else None
        text = str(failed.longrepr).splitlines()
        reasons = [row[1:].strip() for row in text if row.startswith("E ")][:4] or text[-3:]
        print(*(f"  {row[:160]}" for row in reasons), sep="\n")
        if line:
            print(f"  in line {line} of your file")
        return WRONG
    if status or not report.passed:
        print(f"  no test was run: {'; '.join(report.skipped) or said.getvalue()[-400:]}")
        return NOTHING
    more = f", {len(report.skipped)} skipped: {report.skipped[0]}" if report.skipped else ""
    print(f"{exercise.name}: right. {report.passed} tests of the project pass with your lines{more}")
    return 0


def yours(name: str) -> str:
    """The file that is imported; no file of the library has that name, so tracebacks can be told apart."""
    return f"your_{name}.py"


def root(error: BaseException) -> BaseException:
    """What began it: Triton's interpreter wraps what happens inside a kernel."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def where(error: BaseException, name: str, merged: Merged | None) -> str:
    """', line 31 of your file', the innermost that is the student's."""
    rows: list[tuple[str, int]] = []
    seen: BaseException | None = error
    while seen is not None:
        rows += [(Path(frame.filename).name, frame.lineno or 0) for frame in traceback.extract_tb(seen.__traceback__)]
        seen = seen.__cause__
    lines = [merged.theirs(line) for path, line in rows if path == yours(name)] if merged else []
    known = [line for line in lines if line]
    return f", line {known[-1]} of your file" if known else ""


def frames(report) -> list[tuple[str, int]]:
    """(file, line) of a failed test, the innermost first."""
    entries = getattr(getattr(report.longrepr, "reprtraceback", None), "reprentries", [])
    places = [getattr(entry, "reprfileloc", None) for entry in entries]
    return [(Path(place.path).name, place.lineno) for place in reversed(places) if place is not None]


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
