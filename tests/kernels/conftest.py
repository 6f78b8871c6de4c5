"""Before any kernel runs: bfloat16 made right in the interpreter. And the long tests first, so that all workers end together."""

from tests.kernels.checks import INTERPRETED

if INTERPRETED:
    from tests.kernels.interpreter import repair

    repair()


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: "test_compiled[" not in item.nodeid)
