"""What the optimizer of a run keeps, and how far the run came: from its last checkpoint and its log.

    python docs/optimizer_state.py runs/adamw runs/galore runs/badam
"""

import json
import math
import statistics
import sys
from pathlib import Path

import torch

for run in map(Path, sys.argv[1:]):
    last = max((run / "steps").glob("[0-9]*"))
    tensors = json.loads((last / "manifest.json").read_text())["tensors"]       # name → [dtype, *shape]
    size = {"model": 0, "optimizer": 0}
    for name, (dtype, *shape) in tensors.items():
        size[name.partition(".")[0]] += math.prod(shape) * getattr(torch, dtype).itemsize
    log = [*map(json.loads, (run / "log.jsonl").read_text().splitlines())]
    losses = [step["loss"] for step in log if "loss" in step]
    held_out = [step["held_out_loss"] for step in log if "held_out_loss" in step]
    print(f"{run.name}: {size['optimizer'] / 1e6:,.1f} MB of state for {size['model'] / 4e6:,.1f} M parameters; "
          f"{len(losses)} steps, mean loss of the last ten {statistics.fmean(losses[-10:]):.3f}, held out "
          f"{held_out[0]:.3f} → {held_out[-1]:.3f}")
