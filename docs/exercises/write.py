"""Write the folder of exercises: a file each, README.md, and check.py, which grades from inside the folder."""

import os
import textwrap
from pathlib import Path

from docs.exercises import EXERCISES, ROOT, Exercise
from docs.exercises.blank import excerpt
from docs.exercises.given import told

START = """# Exercises

Twelve parts of a language model, the easiest first, about {hours} hours in all. Each file here is cut
out of the repository: the head with its equation and shapes, the imports, and one or two functions whose bodies are
gone. Write them, then ask:

    python check.py rmsnorm         one of them
    python check.py                 all: which are right

`python` is the one that has nanollm and its tests installed: `source .venv/bin/activate` in the repository first, if
`make` set it up. Grading one takes 10 to 15 seconds of processor time.

What you hear back is, in this order: a small case that can be worked out by hand, with what was expected and what you
got; then the project's own tests, run with your lines in the place of the library's. Many of them compare with
published code. So a function that passes computes what the library's computes, in the cases that a test has, on a CPU;
how fast it is, and how much memory it takes, nobody asked. `print` works inside a solution: it is shown while the cases
by hand run, and not while the tests do.

Only the functions that were blank are taken from your file, and functions, constants and imports that you add. What
they may call is listed above them, with its signature. A hint stands at the end of each file. The solution is in the
source named there: look at it afterwards, in any case.

| | exercise | what it teaches | minutes | the source | the paper |
|--:|---|---|--:|---|---|
{rows}

`{last}` needs Triton, which runs its kernels on any CPU in an interpreter; where Triton is not installed, `check.py`
says so and passes it over. Which step of a course each belongs to: {learn}
"""

CHECK = '''"""Grade what you wrote: python check.py rmsnorm, or python check.py for all."""

import os
import subprocess
import sys

REPOSITORY = {root!r}
HERE = os.path.dirname(os.path.abspath(__file__))
command = [sys.executable, "-m", "docs.exercises", "check", *sys.argv[1:], "--folder", HERE]
sys.exit(subprocess.run(command, cwd=REPOSITORY).returncode)
'''


def note(exercise: Exercise, number: int) -> str:
    """The lines between the imports and the blanks."""
    tests = [f"    {test}" for test in exercise.tests]
    title = f"---- exercise {number} of {len(EXERCISES)}: {exercise.title}, about {exercise.minutes} minutes"
    given = [f"# {line}".rstrip() for line in told(exercise)]
    return "\n".join([comment(title, "", exercise.task, ""), *given, *(["#"] if given else []),
                      comment(f"Read: {exercise.paper}.",
                              f"Graded by  python check.py {exercise.name}  with numbers by hand, then", *tests)])


def comment(*paragraphs: str) -> str:
    """Each wrapped, as comments."""
    lines = [line for text in paragraphs for line in textwrap.wrap(text, 116, break_on_hyphens=False) or [""]]
    return "\n".join(f"# {line}".rstrip() for line in lines)


def text_of(exercise: Exercise, number: int) -> str:
    """A student's file."""
    end = comment("---- a hint, for when you are stuck", "", exercise.hint, "", f"The solution: {exercise.file}")
    return excerpt(exercise.source(), exercise.module, exercise.blanks, note(exercise, number)) + f"\n\n{end}\n"


def write(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the files that were written, and of those that were there and are left alone."""
    folder.mkdir(parents=True, exist_ok=True)
    written: list[str] = []
    kept: list[str] = []
    for number, exercise in enumerate(EXERCISES.values(), 1):
        path = folder / f"{exercise.name}.py"
        (kept if path.exists() else written).append(path.name)
        if not path.exists():
            path.write_text(text_of(exercise, number))
    rows = "\n".join(f"| {number} | `{e.name}` {e.title} | {e.teaches} | {e.minutes} | {e.file} | {e.paper} |"
                     for number, e in enumerate(EXERCISES.values(), 1))
    hours = round(sum(exercise.minutes for exercise in EXERCISES.values()) / 60)
    learn = os.path.relpath(ROOT / "docs" / "learn.md", folder.resolve())
    (folder / "README.md").write_text(
        START.format(hours=hours, rows=rows, last=list(EXERCISES)[-1], learn=Path(learn).as_posix()))
    (folder / "check.py").write_text(CHECK.format(root=str(ROOT)))
    return written, kept
