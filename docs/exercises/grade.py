"""Grade one file in a process of its own: the student's functions in the library, small numbers, then the tests.

    python -m docs.exercises.grade NAME FILE            exit status: 0 right, 1 wrong, 2 nothing was graded

When the library imports the module of the exercise, it gets the source with the student's functions in it, so every
layer, model and test of this process uses them. Without a FILE the sources are graded as they are.
"""

import ast
import importlib
import importlib.util
import io
import os
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import ModuleType

from docs.exercises import EXERCISES, ROOT, Exercise
from docs.exercises.blank import Merged, find, merge
from docs.exercises.words import Report, place_of, root, silent, yours

WRONG, NOTHING = 1, 2


class Instead:
    """Among those whom Python asks for a module, the first: for one name it has another file."""

    def __init__(self, module: str, path: Path) -> None:
        self.module, self.path = module, path

    def find_spec(self, name: str, path=None, target=None):
        return importlib.util.spec_from_file_location(name, self.path) if name == self.module else None


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
        merged, lines = None, ""
        if file is not None:
            try:
                text = Path(file).read_text()
                merged = merge(exercise.source(), text, exercise.module, exercise.blanks)
                functions = {blank: find(ast.parse(text), blank) for blank in exercise.blanks}
            except SyntaxError as error:
                print(f"{name}: line {error.lineno} of {Path(file).name} is not Python: {error.msg}")
                return WRONG
            except LookupError as error:
                print(f"{name}: in {Path(file).name} {error.args[0]}; the function must keep its name and place")
                return WRONG
            lines = " or ".join(f"{blank}, line {node.lineno} of your file" for blank, node in functions.items())
            for blank, node in functions.items():
                if silent(node):
                    print(f"{name}: not yet. {blank}, line {node.lineno} of your file, returns None: it has no return "
                          "with a value")
                    return WRONG
            path = Path(folder, yours(name))
            path.write_text(merged.text)
            sys.meta_path.insert(0, Instead(exercise.module, path))
        return small_numbers(exercise, merged, lines) or the_tests(exercise, merged)


def small_numbers(exercise: Exercise, merged: Merged | None, lines: str) -> int:
    """Each case of cases.py; 0 if all come out. lines: where the functions are that can have returned None."""
    from docs.exercises.cases import CASES
    from docs.exercises.compare import same, shown

    words, count = "the file itself, as it is imported", 0
    try:
        module: ModuleType = importlib.import_module(exercise.module)
        for words, expected, got in CASES[exercise.name](module):
            if not same(expected, got):
                print(f"{exercise.name}: not yet. By hand, {words}")
                none = f": your function returned None ({lines})" if got is None else ""
                print(f"  expected  {shown(expected)}\n  got       {shown(got)}{none}")
                return WRONG
            count += 1
    except Exception as error:
        cause, after = root(error), "the first case" if count == 0 else f"what comes after “{words}”"
        place, inside = place_of(error, exercise.name, merged)
        if isinstance(cause, NotImplementedError):
            print(f"{exercise.name}: still blank{place}")
        elif not inside and "NoneType" in str(cause):
            print(f"{exercise.name}: not yet. In {after}: your function returned None ({lines})")
        else:
            print(f"{exercise.name}: not yet. In {after}{place}\n  {type(cause).__name__}: {cause}")
        return WRONG
    print(f"{exercise.name}: all {count} small cases come out as by hand; now tests of the project, 10 to 15 seconds",
          flush=True)
    return 0


def the_tests(exercise: Exercise, merged: Merged | None) -> int:
    """The project's own tests that are named in the exercise."""
    missing = [name for name in ("pytest", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"  not graded further: {missing[0]} is not installed; pip install -e '.[test]' in the repository")
        return NOTHING
    import pytest

    report, said = Report(exercise.name, merged), io.StringIO()
    os.chdir(ROOT)
    with redirect_stdout(said), redirect_stderr(said), report:
        status = pytest.main(["-o", "addopts=", "-p", "no:cacheprovider", "-x", *exercise.tests], plugins=[report])
    if report.failed:
        print(f"{exercise.name}: not yet. A test of the project fails:")
        print(*(f"  {row}" for row in report.failed), sep="\n")
        return WRONG
    if status or not report.passed:
        print(f"  no test was run: {'; '.join(report.skipped) or said.getvalue()[-400:]}")
        return NOTHING
    more = f", {len(report.skipped)} skipped: {report.skipped[0]}" if report.skipped else ""
    print(f"{exercise.name}: right. {report.passed} tests of the project pass with your lines{more}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
