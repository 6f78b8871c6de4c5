"""Tasks of the harness while a model trains: train.py --tasks arc_easy,hellaswag --evaluate-every 500.

    log       "arc_easy/acc": 0.31 and all other metrics, every --evaluate-every steps and at the end
    best      with tasks the best evaluation, of --keep-best and --patience, is that with the highest mean over the
              tasks, of the first metric of each (its negative where lower is better), not that of the lowest loss

The model is whole on rank 0, which answers, as for a sample; the other ranks wait. --tasks-data DIR reads the tasks
from files (tasks.py), --tasks-limit N takes N documents of each. lm_eval is imported where tasks are given, not before.
"""

import argparse
import contextlib
import functools
import importlib.util
import random
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanollm.errors import InputError, RunError
from nanollm.model import Decoder
from nanollm.text.tokenizer import Tokenizer
from nanollm.training.log import Log


def check(options: argparse.Namespace) -> None:
    """Raise InputError where the tasks of a run cannot be asked, before the first step."""
    if not options.tasks:
        return
    if not importlib.util.find_spec("lm_eval"):
        raise InputError("--tasks: the package lm_eval is not installed; pip install -e '.[eval]' brings it")
    manager(tuple(options.tasks), options.tasks_data)


@functools.cache
def manager(tasks: tuple[str, ...], data: Path | None) -> Any:
    """Where the harness finds the tasks; once a run."""
    from benchmarks.evaluate import tasks as files
    files.check_names(tasks)
    if data is None:
        return files.packaged()
    return files.local_tasks(tasks, data, None, Path(held().name))


@functools.cache
def held() -> tempfile.TemporaryDirectory[str]:
    """For the task files of --tasks-data; it is gone when the process ends."""
    return tempfile.TemporaryDirectory(prefix="tasks-")


def measured(model: Decoder, tokenizer: Tokenizer | None,
             options: argparse.Namespace) -> tuple[dict[str, float], float]:
    """Every metric by name, and the mean over the tasks."""
    from benchmarks.evaluate import run
    from benchmarks.evaluate.harness import NanoLM
    if tokenizer is None:
        raise RunError("--tasks needs a tokenizer, and the shards of this run were made without one")
    lm = NanoLM(model, tokenizer, options.out.name)
    with draws_kept():
        results = run.evaluate(lm, options.tasks, manager(tuple(options.tasks), options.tasks_data),
                               limit=options.tasks_limit)
    firsts = []
    for task, metrics in results["results"].items():
        for name, value in metrics.items():
            metric = name.partition(",")[0]
            if "," in name and not metric.endswith("_stderr"):
                firsts.append(value if results["higher_is_better"][task].get(metric, True) else -value)
                break
    return run.figures(results), statistics.fmean(firsts)


@contextlib.contextmanager
def draws_kept() -> Iterator[None]:
    """The harness seeds everybody's random numbers; after the block they go on as if it had not."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])


def due(options: argparse.Namespace, step: int, over: bool) -> bool:
    """Whether the tasks are asked after this step."""
    return bool(options.tasks) and (over or step % options.evaluate_every == 0)


def better(options: argparse.Namespace) -> str:
    """What --patience waits for, in words."""
    return "better mean of --tasks" if options.tasks else "lower held-out loss"


def score(run: Any, log: Log, whole: contextlib.AbstractContextManager[Decoder | None]) -> bool:
    """The tasks of a run of train.py into its log; whether this is the best so far. whole: gathers the model on rank
    0."""
    with whole as model:
        found = run.world.on_rank_0(lambda: measured(model, run.corpus.tokenizer, run.options))
    figures, mean = run.world.broadcast(found)
    log(run.step, tasks=mean, **figures)
    return run.best.judge(run.step, -mean)
