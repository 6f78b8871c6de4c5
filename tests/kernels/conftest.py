"""Before any kernel runs: bfloat16 made right in the interpreter."""

from tests.kernels.checks import INTERPRETED

if INTERPRETED:
    from tests.kernels.interpreter import repair

    repair()
