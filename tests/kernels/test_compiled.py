"""Every kernel, with every entry of the tuning table, compiled for GPUs that are not there; none spills or gets worse.

Launches whose sources, constants and dtypes are those of a line in kernels/compiled.csv were compiled when that was
written. Of these only one a kernel is compiled again; what the table says of the others is held to the same bounds.
Whatever has changed since is compiled anew.
"""

import json
from pathlib import Path

import pytest
import triton

from tests.kernels.compiled import DIGEST, KEYS, MODULES, SHARES, committed, measured

ROOT = Path(__file__).parent.parent.parent
# KiB of shared memory that a block may have (CUDA C++ Programming Guide, compute capabilities)
SHARED = {"sm_80": 163, "sm_90": 227, "sm_100": 227}
ANY = 99                                    # the least of all GPUs since 2020 (sm_86, 89, 120): for rows of no device


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
        counted = ("registers", "spills", "shared", "tensor", "wide", "narrow", "atomic", "float64")
        number = {name: int(line[name]) for name in counted}
        never = [what for what in ("spills", "atomic", "float64") if number[what]]
        problems += [f"{key}: {what} {number[what]}, expected none" for what in never]
        most = ANY if all(row == "any" for _, row, _ in used) else SHARED[line["target"]]
        if number["shared"] > most * 1024:
            problems.append(f"{key}: {number['shared']} bytes of shared memory, more than {most} KiB")
        if line["triton"] not in known:
            continue                                                        # another triton: nothing was measured
        if key not in before:
            problems.append(f"{key}: not in kernels/compiled.csv; python -m tests.kernels.compiled --write")
            continue
        old = {name: int(before[key][name]) for name in number}
        worse = [what for what in ("registers", "shared", "narrow") if number[what] > 1.1 * old[what]]
        worse += [what for what in ("tensor", "wide") if number[what] < 0.9 * old[what]]
        problems += [f"{key}: {what} {number[what]}, was {old[what]}" for what in worse]
    if triton.__version__ in known:
        here = {tuple(line[key] for key in KEYS) for line in lines}
        gone = [key for key in before if key[0] == triton.__version__ and key not in here]
        problems += [f"{key}: in kernels/compiled.csv, but no longer compiled" for key in gone]
    assert not problems, "\n".join(problems)
    path = ROOT / f"kernels/tuning/{module}.json"
    tuning = json.loads(path.read_text()) if path.exists() else {}
    entries = {(name, row, size) for name, rows in tuning.items() for row in rows for size in rows[row]}
    assert entries == {tuple(entry) for entry in used}, "launches use every entry of their tuning table, and no other's"


def test_every_tuning_table_belongs_to_a_file_that_is_compiled():
    assert {path.stem for path in (ROOT / "kernels/tuning").glob("*.json")} <= set(MODULES)
