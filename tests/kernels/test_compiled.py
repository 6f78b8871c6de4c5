"""Every kernel, with every entry of the tuning table, compiled for GPUs that are not there; none may spill, none may have got worse.

Launches whose sources, constants and dtypes are those of a line in kernels/compiled.csv were compiled when that was written. Of these only
one a kernel is compiled again; what the table says of the others is held to the same bounds. Whatever has changed since is compiled anew.
"""

import json
from pathlib import Path

import pytest
import triton

from tests.kernels.compiled import DIGEST, KEYS, MODULES, SHARES, committed, measured

ROOT = Path(__file__).parent.parent.parent
SHARED = {"sm_80": 163, "sm_90": 227, "sm_100": 227}                   # KiB a block may have (CUDA C++ Programming Guide, compute capabilities)
ANY = 99                                                                # the least of all GPUs since 2020 (sm_86, 89, 120): for a file without rows for a device


@pytest.mark.slow
@pytest.mark.parametrize("modules", SHARES, ids=" ".join)
def test_compiled(modules):
    for found in measured(modules, "--new"):
        check(*found)


def check(module: str, lines: list[dict[str, str]], used: list[list[str]]) -> None:
    table = [line for line in committed() if line["file"] == module]
    before, same = ({tuple(line[key] for key in keys): line for line in table} for keys in (KEYS, KEYS + DIGEST))
    known = {line["triton"] for line in committed()}
    problems = []
    for line in lines:
        if "registers" not in line:                                         # known: what the table says must hold too
            line = same[tuple(line[key] for key in KEYS + DIGEST)]
        key = tuple(line[key] for key in KEYS)
        number = {name: int(line[name]) for name in ("registers", "spills", "shared", "tensor", "wide", "narrow", "atomic", "float64")}
        problems += [f"{key}: {what} {number[what]}, expected none" for what in ("spills", "atomic", "float64") if number[what]]
        most = ANY if all(row == "any" for _, row, _ in used) else SHARED[line["target"]]
        if number["shared"] > most * 1024:
            problems.append(f"{key}: {number['shared']} bytes of shared memory, more than {most} KiB")
        if line["triton"] not in known:
            continue                                                    # another triton: what must hold is checked, what was measured is not known
        if key not in before:
            problems.append(f"{key}: not in kernels/compiled.csv; python -m tests.kernels.compiled --write")
            continue
        old = {name: int(before[key][name]) for name in number}
        problems += [f"{key}: {what} {number[what]}, was {old[what]}" for what in ("registers", "shared", "narrow") if number[what] > 1.1 * old[what]]
        problems += [f"{key}: {what} {number[what]}, was {old[what]}" for what in ("tensor", "wide") if number[what] < 0.9 * old[what]]
    if triton.__version__ in known:
        here = {tuple(line[key] for key in KEYS) for line in lines}
        problems += [f"{key}: in kernels/compiled.csv, but no longer compiled" for key in before if key[0] == triton.__version__ and key not in here]
    assert not problems, "\n".join(problems)
    tuning = json.loads((ROOT / f"kernels/tuning/{module}.json").read_text()) if (ROOT / f"kernels/tuning/{module}.json").exists() else {}
    entries = {(name, row, size) for name, rows in tuning.items() for row in rows for size in rows[row]}
    assert entries == {tuple(entry) for entry in used}, "a file's launches use every entry of its tuning table, and no other's"


def test_every_tuning_table_belongs_to_a_file_that_is_compiled():
    assert {path.stem for path in (ROOT / "kernels/tuning").glob("*.json")} <= set(MODULES)
