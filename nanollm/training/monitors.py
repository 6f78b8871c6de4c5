"""Where else the numbers of a run go, beside log.jsonl: TensorBoard, Weights & Biases, MLflow.

    --tensorboard            event files in runs/demo/tensorboard
    --wandb PROJECT          a run of that project
    --mlflow EXPERIMENT      a run of that experiment: in files, in runs/mlruns beside the run folder, or where the
                             variable MLFLOW_TRACKING_URI says

monitors.json in the run folder has the ids by which W&B and MLflow know the run: a resumed run goes on as the same one.
Steps that a resumed run computes again are there already, equal to the bit, and are not sent twice. A monitor that
fails on the way costs its curve, never the run. Only this file imports them.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import sys
import time
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from nanollm.errors import InputError, RunError

IDS = "monitors.json"
PACKAGES = {"tensorboard": "train", "wandb": "wandb", "mlflow": "mlflow"}   # and our extra that has each


def require(options: argparse.Namespace) -> None:
    """Raise InputError where a monitor is asked for whose package is not installed."""
    for package, extra in PACKAGES.items():
        if getattr(options, package) and not (sys.modules.get(package) or importlib.util.find_spec(package)):
            raise InputError(f"--{package}: the package {package} is not installed; pip install -e '.[{extra}]' brings "
                             f"it, or leave --{package} out: log.jsonl has the same numbers")


class Monitor(Protocol):
    """What takes the numbers of a step."""
    def log(self, step: int, numbers: dict[str, float]) -> None: ...
    def close(self) -> None: ...


def opened(folder: Path, options: argparse.Namespace, after: int, facts: dict[str, Any]) -> list[Monitor]:
    """The monitors that the options name. after: the step that the run goes on from. Raises RunError where one of them
    cannot begin."""
    asked: dict[str, Callable[[], Monitor]] = {
        "tensorboard": lambda: TensorBoard(folder, after),
        "wandb": lambda: WeightsAndBiases(folder, options.wandb, facts),
        "mlflow": lambda: MLflow(folder, options.mlflow, facts),
    }
    found = []
    for name, begin in asked.items():
        if getattr(options, name):
            try:
                found.append(begin())
            except Exception as error:                          # each library has its own
                raise RunError(f"--{name}: cannot begin: {str(error) or type(error).__name__}; --resume without it "
                               "goes on, with it tries again") from error
    return found


def send(monitors: list[Monitor], step: int, numbers: dict[str, float]) -> None:
    """To all of them. One that fails is left out from then on, with a warning."""
    for monitor in [*monitors]:
        try:
            monitor.log(step, numbers)
        except Exception as error:
            monitors.remove(monitor)
            warnings.warn(f"{type(monitor).__name__} gets nothing after step {step - 1}: {error}", stacklevel=2)


def close(monitors: list[Monitor]) -> None:
    """End all of them; one that fails is passed over."""
    for monitor in monitors:
        with contextlib.suppress(Exception):
            monitor.close()


def own_id(folder: Path, monitor: str, create: Callable[[], str]) -> str:
    """The id by which a monitor knows this run: that of an earlier start, or a new one, which is written down."""
    path = folder / IDS
    try:
        ids = json.loads(path.read_text()) if path.exists() else {}
    except ValueError:
        ids = {}
    if monitor not in ids:
        ids[monitor] = create()
        path.write_text(json.dumps(ids) + "\n")
    return ids[monitor]


class TensorBoard:
    """Event files. Events after the step that the run goes on from, of an earlier start, are taken back."""

    def __init__(self, folder: Path, after: int) -> None:
        from torch.utils.tensorboard import SummaryWriter
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=after + 1)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """A point on each curve."""
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is still in memory."""
        self.writer.close()


class WeightsAndBiases:
    """A run of a project; the facts of run.json are its config. W&B itself passes over steps that it has."""

    def __init__(self, folder: Path, project: str, facts: dict[str, Any]) -> None:
        import wandb
        self.run = wandb.init(
            project=project, name=folder.name, dir=str(folder), config=facts,
            id=own_id(folder, "wandb", lambda: uuid.uuid4().hex[:8]), resume="allow",
        )

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """All numbers of a step."""
        self.run.log(numbers, step=step)

    def close(self) -> None:
        """Send what is still here."""
        self.run.finish()


class MLflow:
    """A run of an experiment; the options of run.json are its parameters."""

    def __init__(self, folder: Path, experiment: str, facts: dict[str, Any]) -> None:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")    # by default MLflow 3 wants a database
        import mlflow
        self.metric = mlflow.entities.Metric
        local = (folder.parent / "mlruns").absolute().as_uri()
        self.client = mlflow.MlflowClient(os.environ.get("MLFLOW_TRACKING_URI", local))

        def create() -> str:
            found = self.client.get_experiment_by_name(experiment)
            number = found.experiment_id if found else self.client.create_experiment(experiment)
            run = self.client.create_run(number, run_name=folder.name).info.run_id
            for name, value in facts["options"].items():
                self.client.log_param(run, name, str(value)[:500])
            return run

        self.id = own_id(folder, "mlflow", create)
        self.client.update_run(self.id, status="RUNNING")
        self.last = max((point.step for point in self.client.get_metric_history(self.id, "lr")), default=-1)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """All numbers of a step, in one request."""
        if step > self.last:
            now = int(time.time() * 1000)
            self.client.log_batch(self.id, [self.metric(name, value, now, step) for name, value in numbers.items()])

    def close(self) -> None:
        """Mark the run as ended."""
        self.client.set_terminated(self.id)
