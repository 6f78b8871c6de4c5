"""A text that a toy learns in a few steps, and a world of one process."""

from pathlib import Path

import numpy as np


class OneRank:
    """World of one process, as open_corpus uses it."""
    def on_all_ranks(self, work):
        return work()

    on_rank_0 = on_all_ranks

    def broadcast(self, value):
        return value


def grammar(folder: Path) -> Path:
    """24 files of one-line functions over four names."""
    rng = np.random.default_rng(0)
    for i in range(24):
        names = rng.choice(["alpha", "beta", "gamma", "delta"], 40)
        (folder / f"{i:02}.py").write_text(
            "".join(
                f"def {a}({b}):\n    return {b} + {n}\n\n"
                for n, (a, b) in enumerate(zip(names, names[::-1], strict=True))
            )
        )
    return folder
