"""Before any kernel runs: bfloat16 made right in the interpreter. Most files here take their time, so the quick half has four of them."""

from pathlib import Path

import pytest

from tests.kernels.checks import INTERPRETED

if INTERPRETED:
    from tests.kernels.interpreter import hasten, repair

    repair()
    hasten()

HERE = Path(__file__).parent
QUICK = ("test_ops", "test_norm", "test_gating", "test_rope")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent == HERE and item.path.stem not in QUICK:
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: "test_compiled[" not in item.nodeid)           # the longest first, so that all workers end together
