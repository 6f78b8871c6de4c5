"""Before any kernel runs: bfloat16 made right in the interpreter. And which cases of a kernel `make test` tries."""

from pathlib import Path

import pytest

from tests.kernels.checks import INTERPRETED

if INTERPRETED:
    from tests.kernels.interpreter import hasten, repair

    repair()
    hasten()

HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Of the shapes and dtypes of a test, where they are six or more, `make test` tries every seventh."""
    cases: dict[tuple[Path, str], list[pytest.Item]] = {}
    for item in items:
        if item.path.parent == HERE and hasattr(item, "callspec") and "dtype" in item.callspec.params:
            cases.setdefault((item.path, item.originalname), []).append(item)
    for found in cases.values():
        for place, item in enumerate(found):
            if len(found) >= 6 and place % 7:
                item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: "test_compiled[" not in item.nodeid)        # the longest first: workers end together
