"""Find the tile sizes, warps and stages of the tuning table on the GPU at hand, and write them down as its row.

    python -m benchmarks.tune_kernels                      every case of kernel_cases.py
    python -m benchmarks.tune_kernels --only attend        the operations whose name begins so

For each case, the entries of kernels/tuning/*.json that it uses are walked downhill: one number of one entry at a time
is halved or doubled, and kept where the case gets faster by more than 2 %. A change that does not compile, asks for
more memory than there is, or gives another result, is passed over. What was found is the row of this device ("sm_90");
`python -m tests.kernels.compiled --write` and the tests come after, for what is fastest may spill on another triton.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import kernels.common as common
from benchmarks.kernel_cases import Case, Sizes, cases
from benchmarks.kernels import error, timed
from nanollm import ops

GAIN = 0.98                                 # of the time before: less is noise
RANGE = {"num_warps": (1, 16), "num_stages": (1, 5)}
TILE = (8, 8192)                            # of every other number
TUNING = Path(common.__file__).parent / "tuning"
Entry = tuple[str, str, str]                # operation, row, size


def used(case: Case) -> list[Entry]:
    """The entries that one call of a case looks up."""
    found, look = [], common._entry

    def noted(name: str, size: int, row: str) -> dict[str, int]:
        found.append((name, row, str(min(int(key) for key in common.TABLE[name][row] if int(key) >= size))))
        return look(name, size, row)

    common._entry = noted
    try:
        error(case)
    finally:
        common._entry = look
    return list(dict.fromkeys(found))


def neighbours(numbers: dict[str, int]) -> Iterator[dict[str, int]]:
    """One number halved or doubled (a number of stages: one less, one more)."""
    for key, value in numbers.items():
        low, high = RANGE.get(key, TILE)
        for other in (value - 1, value + 1) if key == "num_stages" else (value // 2, value * 2):
            if low <= other <= high:
                yield numbers | {key: other}


def attempt(case: Case, entry: Entry, numbers: dict[str, int], clock: Callable[[Case], float]) -> float:
    """Milliseconds with these numbers; infinite where they cannot be had."""
    name, row, size = entry
    common.TABLE[name][row][size] = numbers
    common._entry.cache_clear()
    try:
        error(case)
        return clock(case)
    except Exception as problem:                                    # not compiled, too large or wrong: all alike
        print(f"      {numbers}: {type(problem).__name__}", flush=True)
        return float("inf")


@dataclass(frozen=True)
class Found:
    """What became of one entry of the table: milliseconds before and after, and how many settings were tried."""
    name: str
    size: str
    numbers: dict[str, int]
    before: float
    after: float
    tried: int


def tune(case: Case, row: str, clock: Callable[[Case], float], more: Callable[[], bool] = lambda: True) -> list[Found]:
    """Walk every entry of a case downhill, until no neighbour is faster, or `more` says that time is over."""
    found = []
    for name, old, size in used(case):
        rows = common.TABLE[name]
        if row not in rows:                                         # a device's row is whole: nothing of "any" is added
            rows[row] = {key: dict(numbers) for key, numbers in rows[old].items()}
        entry = (name, row, size)
        best = dict(rows[row][size])
        before = least = attempt(case, entry, best, clock)
        tried, moved = [best], True
        try:
            while moved:
                moved = False
                for numbers in neighbours(best):
                    if numbers not in tried and more():
                        tried.append(numbers)
                        ms = attempt(case, entry, numbers, clock)
                        if ms < least * GAIN:
                            best, least, moved = numbers, ms, True
                            break
        finally:                                                    # interrupted too: the table never keeps a mere try
            rows[row][size] = best
            common._entry.cache_clear()
        found.append(Found(name, size, best, before, least, len(tried)))
        print(f"  {name} {size}: {best}, {least:.4f} ms, {len(tried)} tried", flush=True)
    return found


def write(folder: Path = TUNING) -> None:
    """The table as it stands, file by file."""
    for path in sorted(folder.glob("*.json")):
        lines = []
        for name in json.loads(path.read_text()):
            rows = []
            for row, entries in common.TABLE[name].items():
                numbers = (f'   "{size}": {json.dumps(entries[size])}' for size in entries)
                rows.append(f'  "{row}": {{\n' + ",\n".join(numbers) + "}")
            lines.append(f' "{name}": {{\n' + ",\n".join(rows) + "}")
        path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", default="", metavar="NAME", help="operations whose name begins so")
    options = parser.parse_args()
    if not (torch.cuda.is_available() and torch.version.cuda):
        sys.exit("benchmarks.tune_kernels needs an NVIDIA GPU, and torch sees none here")
    torch.manual_seed(0)

    def clock(case: Case) -> float:
        with ops.using("triton"):
            return timed(case, case.run)
    for case in cases(Sizes(small=False, device="cuda")):
        if case.name.startswith(options.only):
            print(f"{case.name} {case.shape}", flush=True)
            tune(case, common.arch(torch.device("cuda")), clock)
            write()                                                             # after each: a lease can end


if __name__ == "__main__":
    main()
