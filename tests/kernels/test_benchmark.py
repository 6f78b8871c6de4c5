"""benchmarks/kernels.py without a GPU: every case runs, small, as kernel and as definition, and they agree; the floors
are those of the text books."""

import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels.common as common
from benchmarks import tune_kernels
from benchmarks.kernel_cases import Sizes, cases
from benchmarks.kernels import TOLERANCE, error, table
from kernels import roofline
from kernels.roofline import DEVICES
from tests.kernels.checks import DEVICE

ROOT = Path(__file__).parent.parent.parent
SMALL = list(cases(Sizes(small=True, device=DEVICE)))
H200 = DEVICES["h200"]


@pytest.mark.slow
@pytest.mark.parametrize("case", SMALL, ids=[f"{case.name} {case.shape}" for case in SMALL])
def test_a_case_runs_and_agrees(case):
    assert error(case) <= TOLERANCE
    assert 0 < case.work.floor(H200) < 1


def test_every_operation_has_a_case():
    import kernels

    assert {case.name.split()[0] for case in SMALL} - {"decode"} == set(kernels.OPERATIONS)


@pytest.mark.parametrize("work, milliseconds, limit", [
    (roofline.norm(16384, 4096), 2 * 16384 * 4096 * 2 / 4.3e9, "bytes"),
    (roofline.norm(16384, 4096, add=True, backward=True), 4 * 16384 * 4096 * 2 / 4.3e9, "bytes"),
    (roofline.attend(2, 32, 8, 8192, 128), 4 * 2 * 32 * 128 * (8192 * 8193 / 2) / 790e9, "FLOPs"),
    (roofline.decode(32, 32, 8, 8192, 128), 0.250, "bytes"),
    (roofline.mamba_scan(8, 2048, 4096, 16), 8 * 2048 * 4096 * 18 / (16 * 132 * 1.98e6), "exp2"),
    (roofline.linear_cross_entropy(4096, 4096, 128256), 6 * 4096 * 4096 * 128256 / 790e9, "FLOPs"),
    (roofline.quantized_linear(1, 28672, 8192, 4, 128), 0.029, "bytes"),
])
def test_floors(work, milliseconds, limit):
    assert work.floor(H200) * 1e3 == pytest.approx(milliseconds, rel=0.03) and work.limit(H200) == limit


def test_pairs_are_those_that_a_mask_lets_through():
    for T, window, documents in ((1, None, 1), (12, None, 1), (12, 5, 1), (12, 40, 1), (12, None, 3), (12, 3, 2)):
        i = torch.arange(T)
        together = i[:, None] // (T // documents) == i // (T // documents)
        mask = (i[:, None] >= i) & together & (i > i[:, None] - (window or math.inf))
        assert roofline.pairs(T, window, documents) == int(mask.sum())


def test_the_table():
    row = {"operation": "attend", "shape": "1 x 2", "ms": 1.5, "rate": "3 TFLOP/s", "share": 0.25, "set by": "FLOPs",
           "goal": "", "error": 0.0, "x": {"eager": 2.0, "Liger": "RuntimeError"}}
    line = "| attend | 1 x 2 | 1.500 | 3 TFLOP/s | 25% (FLOPs) |  | 2.00 | RuntimeError |"
    assert table([row]).splitlines()[-1] == line
    json.dumps(row)


def test_the_tuner_walks_downhill_and_writes_what_it_found(tmp_path, monkeypatch):
    """With a clock that likes 8 warps and 2 rows, and an entry that cannot be had."""
    monkeypatch.setattr(common, "TABLE", copy.deepcopy(common.TABLE))
    common._entry.cache_clear()
    (tmp_path / "norm.json").write_text((ROOT / "kernels/tuning/norm.json").read_text())
    case = next(case for case in SMALL if case.name == "rms_norm")
    seen = []

    def clock(case):
        numbers = common.TABLE["norm"]["sm_90"]["256"]
        seen.append(dict(numbers))
        if numbers["num_warps"] == 2:
            raise RuntimeError("out of resources")
        return 1 + abs(math.log2(numbers["num_warps"] / 8)) + abs(math.log2(numbers["ROWS"] / 32))

    monkeypatch.setattr(common, "TARGET", "sm_90")
    tune_kernels.tune(case, "sm_90", clock)
    tune_kernels.write(tmp_path)
    common._entry.cache_clear()
    found = json.loads((tmp_path / "norm.json").read_text())
    before = json.loads((ROOT / "kernels/tuning/norm.json").read_text())
    assert found["norm"]["sm_90"] == before["norm"]["any"] | {"256": {"ROWS": 32, "num_warps": 8}}
    assert found["norm"]["any"] == before["norm"]["any"] and found["norm_backward"] == before["norm_backward"]
    assert {"ROWS": 32, "num_warps": 2} in seen


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="says what to do without a GPU")
def test_without_a_gpu_it_says_so():
    done = subprocess.run([sys.executable, "-m", "benchmarks.kernels"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "needs an NVIDIA GPU" in done.stderr and "Traceback" not in done.stderr
    done = subprocess.run([sys.executable, "-m", "kernels.roofline"], cwd=ROOT, capture_output=True, text=True,
                          check=True)
    assert "rms_norm" in done.stdout
