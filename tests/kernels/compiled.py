"""The table of what each kernel compiles to: kernels/compiled.csv, one line a kernel, configuration and device.

    python -m tests.kernels.compiled norm rope          print what these files compile to, for sm_80, sm_90 and sm_100
    python -m tests.kernels.compiled norm --new         the same, but compile only what is not known
    python -m tests.kernels.compiled --write            measure all of them with the triton that is installed, keep them

What is compiled are the launches that `real_launches` of each tests/kernels/test_*.py makes, at the sizes of real
decoders. All of them take seven minutes of a core. So each line has a digest of what it was compiled from, and the
tests compile what differs from it, and one launch of each kernel to see that the table says what this machine would.
"""

import csv
import hashlib
import importlib
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
TABLE = HERE.parent.parent / "kernels/compiled.csv"
LONGEST = ("attention", "duality", "moe")       # to compile; they go first
MODULES = sorted((path.stem[5:] for path in HERE.glob("test_*.py") if "def real_launches" in path.read_text()),
                 key=lambda module: (module not in LONGEST, module))
SHARES = [MODULES[::2], MODULES[1::2]]           # for two processes: to start one takes as long as most files do
TARGETS = ("sm_80", "sm_90", "sm_100")
SAMPLED = "sm_90"                                # for which one launch of each kernel is always compiled
KEYS = ["triton", "file", "target", "kernel", "constants", "dtypes", "warps", "stages"]
DIGEST = ["sources"]                             # of the kernel's files, and of real_launches
NAMED = KEYS[3:] + DIGEST
COUNTS = ["registers", "spills", "shared", "tensor", "wide", "narrow", "exp2", "atomic", "float64"]


def measure(module: str, known: list[dict[str, str]]) -> tuple[list[dict[str, object]], list[tuple[str, str, str]]]:
    """The lines of one file, and the entries of the tuning table that were used.

    A launch that a line of the table is known to be about is not compiled, and its line has no numbers."""
    import triton

    from tests.kernels.compiling import compile_only

    launches = importlib.import_module(f"tests.kernels.test_{module}").real_launches
    script, found, used = hashlib.sha256(inspect.getsource(launches).encode()).hexdigest()[:6], [], []

    def name(launch):                            # the words of NAMED
        return *map(str, launch[:-1]), f"{launch.sources}-{script}"

    for target in TARGETS:
        place = {"triton": triton.__version__, "file": module, "target": target}
        lines = [line for line in known if all(line[key] == value for key, value in place.items())]
        if target == SAMPLED:
            seen = {line["kernel"]: line for line in reversed(lines)}
            lines = [line for line in lines if line is not seen[line["kernel"]]]
        same = {tuple(line[key] for key in NAMED) for line in lines}
        with compile_only(target, lambda launch, same=same: name(launch) in same) as (kernels, entries):
            launches()
        for launch, compiled in kernels.items():
            numbers = compiled._asdict() if compiled else {}
            found.append(place | dict(zip(NAMED, name(launch), strict=True)) | numbers)
        used += sorted(entries)
    return found, used


def measured(modules: list[str], *options: str) -> Iterator[tuple[str, list[dict[str, str]], list[list[str]]]]:
    """`measure` in a process of its own, where kernels are compiled and not interpreted."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compiled", *modules, *options]
    done = subprocess.run(command, env=environment, cwd=HERE.parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for module, (lines, used) in zip(modules, map(json.loads, done.stdout.splitlines()), strict=True):
        yield module, [{key: str(value) for key, value in line.items()} for line in lines], used


def committed() -> list[dict[str, str]]:
    """The table as it stands."""
    return list(csv.DictReader(TABLE.open())) if TABLE.exists() else []


def write() -> None:
    """Replace the lines of this version of triton."""
    with ThreadPoolExecutor(2) as pool:
        shares = pool.map(lambda modules: list(measured(modules)), SHARES)
        new = [line for share in shares for _, lines, _ in share for line in lines]
    lines = [line for line in committed() if line["triton"] != new[0]["triton"]] + new
    with TABLE.open("w", newline="") as file:
        table = csv.DictWriter(file, KEYS + DIGEST + COUNTS, lineterminator="\n")
        table.writeheader()
        table.writerows(sorted(lines, key=lambda line: [line[key] for key in KEYS]))


if __name__ == "__main__":
    for module in sys.argv[1:]:
        if module == "--write":
            write()
        elif module != "--new":
            print(json.dumps(measure(module, committed() if "--new" in sys.argv else [])))
