"""The loss of several runs in one picture: of the steps that saw chats, where text was mixed in.

    python docs/curves.py facts.png runs/lora runs/dora runs/qlora
"""

import json
import math
import statistics
import sys
from pathlib import Path

from matplotlib.figure import Figure

out, *runs = map(Path, sys.argv[1:])
figure = Figure(figsize=(8, 4), layout="constrained")
axes = figure.subplots()
for run in runs:
    steps = [step for step in map(json.loads, (run / "log.jsonl").read_text().splitlines()) if "loss" in step]
    mixed = json.loads((run / "run.json").read_text())["options"]["data"]
    most = max(step["targets"] for step in steps) if mixed else math.inf        # of a row of text all are targets
    chats = [(step["step"], step["loss"]) for step in steps if step["targets"] < most / 2]
    smooth = [statistics.fmean(loss for _, loss in chats[max(0, i - 7) : i + 8]) for i in range(len(chats))]
    axes.plot([step for step, _ in chats], smooth, label=run.name)
axes.set(xlabel="step", ylabel="loss, nats per token", yscale="log", title="chats, averaged over 15 steps")
axes.grid(alpha=0.3)
axes.legend()
figure.savefig(out, dpi=100)
