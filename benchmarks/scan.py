"""The two forms of the selective scan, and transformers' fallback for CPUs, by shape and length.

    python benchmarks/scan.py            prints the table and one JSON line; --write keeps it as benchmarks/scan.md
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers.models.mamba.modeling_mamba import mamba_selective_scan

from generate import machine  # the script beside this one
from nanollm.layers.scan import selective_scan, selective_scan_chunked

SHAPES = ((1, 64, 4), (1, 256, 16), (16, 256, 4), (1, 1536, 16))     # batch, channels, states; the last is Mamba-130M


def milliseconds(run: Callable[[], object]) -> float:
    """The median of five, after one that does not count."""
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds[1:])


def row(shape: tuple[int, int, int], length: int) -> dict:
    """Forward alone, and with the gradients of everything."""
    batch, I, N = shape
    shapes = ((batch, length, I), (batch, length, I), (I, N), (batch, length, N), (batch, length, N), (I,))
    inputs = [torch.randn(shape) for shape in shapes]
    inputs[1], inputs[2] = torch.rand(shapes[1]), -torch.rand(shapes[2])        # Δ above 0, A below
    x, delta, A, B, C, D = [z.requires_grad_() for z in inputs]
    h = torch.zeros(batch, I, N)
    forms = {
        "sequential": lambda: selective_scan(x, delta, A, B, C, D, h)[0],
        "chunked": lambda: selective_scan_chunked(x, delta, A, B, C, D, h)[0],
        "transformers": lambda: mamba_selective_scan(x.mT, delta.mT, A, B.mT, C.mT, D).mT,
    }
    found = {"batch": batch, "channels": I, "states": N, "tokens": length}
    for name, form in forms.items():
        with torch.no_grad():
            assert (form() - forms["sequential"]()).abs().max() < 1e-3
            found[name] = milliseconds(form)
        found[f"{name}, with gradients"] = milliseconds(lambda form=form: form().sum().backward())
    return found


if __name__ == "__main__":
    rows = [row(shape, length) for shape in SHAPES for length in (16, 64, 256)]
    head = list(rows[0])
    lines = ["| " + " | ".join(head) + " |", "|--:" * len(head) + "|"]
    for r in rows:
        cells = (f"{value:.1f}" if isinstance(value, float) else str(value) for value in r.values())
        lines.append("| " + " | ".join(cells) + " |")
    text = f"Milliseconds for one layer, float32. {machine()}.\n\n" + "\n".join(lines) + "\n"
    print(text)
    if "--write" in sys.argv:
        title = "# The selective scan on a CPU\n\nWritten by `python benchmarks/scan.py --write`.\n\n"
        Path(__file__).with_suffix(".md").write_text(title + text)
    print(json.dumps(rows))
