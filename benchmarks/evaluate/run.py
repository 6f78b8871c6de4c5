"""A run of the harness over our decoder: tasks in, the harness's results out.

    results = evaluate(lm, ["hellaswag"], manager)          of one model, in the harness's own form
    print(table(results))                                   with standard errors

What the harness and its data sets raise becomes one error of ours: no network, no such column, a template that fails.
"""

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
from lm_eval import simple_evaluate
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table

from benchmarks.evaluate.harness import NanoLM
from benchmarks.evaluate.tasks import uneven
from nanollm.errors import InputError, NanollmError

NETWORK = "tasks come from the hub, which cannot be reached; --data DIR reads them from files: docs/evaluation.md"


def evaluate(lm: NanoLM, tasks: Sequence[str], manager: TaskManager, *, limit: int | None = None,
             fewshot: int | None = None, chat: bool = False, out: Path | None = None,
             data: Path | None = None) -> dict[str, Any]:
    """The harness's results, and its files in `out`: results_*.json and samples_*.jsonl. limit: documents of each
    task. data: the folder that `manager` has its files from."""
    tracker = EvaluationTracker(output_path=str(out)) if out else None
    quiet()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                     # of the libraries that it calls
            results = simple_evaluate(
                lm, model_args={"pretrained": lm.name}, tasks=list(tasks), num_fewshot=fewshot, limit=limit,
                task_manager=manager, apply_chat_template=chat, fewshot_as_multiturn=chat,
                evaluation_tracker=tracker, log_samples=out is not None)
    except NanollmError:
        raise
    except (ConnectionError, huggingface_hub.errors.HfHubHTTPError, huggingface_hub.errors.OfflineModeIsEnabled,
            datasets.exceptions.DatasetNotFoundError) as error:
        raise InputError(f"--tasks {','.join(tasks)}: {NETWORK} ({first_line(error)})") from None
    except ImportError as error:
        raise InputError(f"--tasks {','.join(tasks)}: the task needs another package: {first_line(error)}") from None
    except Exception as error:                                  # whatever a task's own code meets in the data
        if data and (said := uneven(data, tasks)):
            raise InputError(said) from error
        raise InputError(f"--tasks {','.join(tasks)}: lm_eval stopped: {type(error).__name__}: {first_line(error)}"
                         ) from error
    assert results is not None, "one process is the first of all"
    if tracker:
        samples = results.pop("samples")
        tracker.save_results_aggregated(results=results, samples=samples)
        for name, each in samples.items():
            tracker.save_results_samples(task_name=name, samples=each)
    return results


def quiet() -> None:
    """Errors alone: what is worth saying of a run, we say."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()


def table(results: dict[str, Any]) -> str:
    """The harness's own table; groups have one of their own."""
    parts = [make_table(results)] + ([make_table(results, "groups")] if results.get("groups") else [])
    return "\n".join(part.rstrip() for part in parts)


def figures(results: dict[str, Any]) -> dict[str, float]:
    """{"hellaswag/acc": 0.4, …}: every metric of every task, without its error."""
    found = {}
    for task, metrics in results["results"].items():
        for name, value in metrics.items():
            metric, _, filtered = name.partition(",")
            if filtered and not metric.endswith("_stderr") and isinstance(value, (int, float)):
                found[f"{task}/{metric}" + (f"/{filtered}" if filtered != "none" else "")] = float(value)
    return found


def first_line(error: BaseException) -> str:
    """Of a message, or the name of an error without one."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
