"""Tuning of the kernels that are furthest from the roofline (benchmarks/tune_kernels.py), as long as there is time.

The tables of kernels/tuning/ are copied to OUT/tuning, and the numbers that are found are written there, as the row of
this device, after each kernel. To take them over: copy the folder back, run `python -m tests.kernels.compiled --write`
and the tests.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import kernels.common as common
from benchmarks.gpu.items import Item, Row, Setting, Tell
from benchmarks.gpu.kernels import milliseconds, named, ordered
from benchmarks.kernel_cases import Case
from benchmarks.tune_kernels import TUNING, tune, write
from nanollm import ops

EACH = 60.0                                 # seconds for one kernel at most
GOOD = 0.9                                  # of the roofline: nothing to be found above


def items(setting: Setting) -> Iterator[Item]:
    folder = setting.out / "tuning"
    if not folder.exists():
        shutil.copytree(TUNING, folder)
    for path in folder.glob("*.json"):                          # what a process before this one has found
        common.TABLE.update(json.loads(path.read_text()))
    common._entry.cache_clear()
    for case in worst(setting):
        yield Item(named(case), lambda tell, case=case: tuned(case, folder, setting, tell), EACH + 30)


def worst(setting: Setting) -> list[Case]:
    """The cases that were measured, from the smallest share on; where none was, all, in the order of kernels.py."""
    shares = {f"{row['operation']} {row['shape']}": row["of roofline"] for row in setting.rows("kernels")
              if "operation" in row}
    cases = ordered(setting)
    if shares:
        cases = sorted((case for case in cases if shares.get(named(case), 1.0) < GOOD), key=lambda c: shares[named(c)])
    return cases[:1] if setting.dry else cases


def tuned(case: Case, folder: Path, setting: Setting, tell: Tell) -> Row:
    """Walk its entries downhill."""
    def clock(case: Case) -> float:
        with ops.using("triton"):
            return milliseconds(case, case.run, setting)

    end = setting.left() - min(5.0 if setting.dry else EACH, setting.left())
    row: Row = {"operation": case.name, "shape": case.shape}
    try:
        found = tune(case, common.arch(setting.device), clock, more=lambda: setting.left() > end)
    finally:
        write(folder)
    if found:
        before, after = found[0].before, found[-1].after
        row |= {"ms before": before, "ms after": after, "x faster": before / after,
                "tried": sum(one.tried for one in found),
                "numbers": "; ".join(f"{one.name} {one.size}: {json.dumps(one.numbers)}" for one in found)}
    return row
