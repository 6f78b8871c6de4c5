"""The loss of several runs in one picture: of the steps that saw chats, where text was mixed in. Of runs that sample
answers it is their reward.

    python docs/curves.py facts.png runs/lora runs/dora runs/qlora
    python docs/curves.py reward.png runs/grpo runs/ppo
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
rewarded = False
for run in runs:
    steps = [step for step in map(json.loads, (run / "log.jsonl").read_text().splitlines()) if "loss" in step]
    if rewarded := "reward" in steps[0]:
        found = [(step["step"], step["reward"]) for step in steps if "reward" in step]
    else:
        mixed = json.loads((run / "run.json").read_text())["options"]["data"]
        most = max(step["targets"] for step in steps) if mixed else math.inf    # of a row of text all are targets
        found = [(step["step"], step["loss"]) for step in steps if step["targets"] < most / 2]
    wide = 1 if rewarded else 7
    smooth = [statistics.fmean(value for _, value in found[max(0, i - wide) : i + wide + 1]) for i in range(len(found))]
    axes.plot([step for step, _ in found], smooth, label=run.name)
if rewarded:
    axes.set(xlabel="step", ylabel="reward of the answers of a step", title="averaged over 3 steps")
else:
    axes.set(xlabel="step", ylabel="loss, nats per token", yscale="log", title="chats, averaged over 15 steps")
axes.grid(alpha=0.3)
axes.legend()
figure.savefig(out, dpi=100)
