"""python -m docs.exercises [FOLDER] writes the exercises; python -m docs.exercises check [NAME …] grades them."""

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path

from docs.exercises import EXERCISES, ROOT
from docs.exercises.grade import NOTHING
from docs.exercises.write import write

SECONDS = 600                               # a loop without an end is stopped


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["check"]:
        parser = argparse.ArgumentParser(prog="python -m docs.exercises check", description="Grade what you wrote.")
        parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(EXERCISES)}; none: all of them")
        parser.add_argument("--folder", type=Path, default=Path("exercises"), help="where they are; exercises")
        options = parser.parse_args(arguments[1:])
        if importlib.util.find_spec("torch") is None:
            print(f"{sys.executable} has no torch: run check.py with the Python that has nanollm installed, which "
                  f"`make exercises` puts at {ROOT / '.venv' / 'bin' / 'python'}")
            return NOTHING
        unknown = [name for name in options.names if name.removesuffix(".py") not in EXERCISES]
        if unknown:
            parser.error(f"no exercise is called {unknown[0]}; there are {', '.join(EXERCISES)}")
        return max([check(name.removesuffix(".py"), options.folder) for name in options.names or EXERCISES])
    parser = argparse.ArgumentParser(prog="python -m docs.exercises", description="Write the exercises to a folder; "
                                     "`check NAME` grades one. Files that are there are left alone.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("exercises"), help="exercises")
    folder = parser.parse_args(arguments).folder
    written, kept = write(folder)
    if kept:
        print(f"left alone, since they are there: {', '.join(kept)}")
    print(f"{folder}: {len(written)} exercises written. Begin with {folder / 'README.md'}")
    return 0


def check(name: str, folder: Path) -> int:
    """Grade one in a fresh process; its exit status."""
    file = folder / f"{name}.py"
    if not file.exists():
        print(f"{name}: there is no {file}; python -m docs.exercises {folder} writes it")
        return NOTHING
    command = [sys.executable, "-m", "docs.exercises.grade", name, str(file.resolve())]
    try:
        return subprocess.run(command, cwd=ROOT, timeout=SECONDS).returncode
    except subprocess.TimeoutExpired:
        print(f"{name}: stopped after {SECONDS} seconds. Is there a loop that does not end?")
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
