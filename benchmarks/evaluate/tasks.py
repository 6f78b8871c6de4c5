"""Which tasks are asked: by the harness's names, from the hub, or from files in --data DIR, which needs no network.

    DIR/hellaswag/validation.jsonl            DIR/TASK/SPLIT.jsonl, .json, .csv or .parquet: columns and splits are the
    DIR/arc_easy/test.jsonl   train.jsonl     data set's own; what is not there is not used, but one that is asked from
    DIR/mmlu_anatomy/test.jsonl   dev.jsonl   (test, or else validation) must be
    DIR/gsm8k/test.jsonl   train.jsonl        few-shot examples come from the split that the task takes them from

A task is the harness's own: its prompt, choices, filters and metrics. What is written for a task of DIR is a file of a
few lines that includes the harness's and puts these files in the place of its data set:

    include: …/lm_eval/tasks/hellaswag/hellaswag.yaml
    dataset_path: json
    dataset_name: null
    dataset_kwargs: {data_files: {validation: [DIR/hellaswag/validation.jsonl]}}

A group or a tag, such as mmlu or ceval-valid, is as many of its tasks as DIR has.
"""

import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from lm_eval.tasks import TaskManager

from nanollm.data import records
from nanollm.data.files import Encoding
from nanollm.errors import InputError, counted, did_you_mean
from nanollm.inference.terminal import note

READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}       # of datasets.load_dataset
ASKED = ("test_split", "validation_split")              # the first that is there is asked from
SPLITS = (*ASKED, "training_split", "fewshot_split")


@functools.cache
def packaged() -> TaskManager:
    """The tasks that come with the harness; its index takes seconds."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager()


def check_names(tasks: Sequence[str]) -> None:
    """Raise InputError for a task that the harness does not have."""
    known = packaged().task_index
    for name in tasks:
        if name not in known:
            hint = did_you_mean(name, known) or "; python -m lm_eval ls tasks lists them"
            raise InputError(f"--tasks {name}: lm_eval has no such task, group or tag{hint}")


def local_tasks(tasks: Sequence[str], data: Path, fewshot: int | None, out: Path) -> TaskManager:
    """These tasks over the files of a folder: their own files are written to `out`. Raises InputError."""
    if not data.is_dir():
        raise InputError(f"--data {data}: no such folder; expected DIR/TASK/SPLIT.jsonl")
    out.mkdir(parents=True, exist_ok=True)
    for name in tasks:
        members = leaves(name)
        there = [member for member in members if (data / member).is_dir()]
        if not there:
            wanted = f"{name}/" if members == [name] else f"any of its {len(members)} tasks, like {members[0]}/"
            raise InputError(f"--data {data}: found {listed(data)}, expected {wanted}")
        for member in there:
            write(out, member, over_files(member, data / member, fewshot))
        if members != [name]:
            note(f"[{name}: {data} has {counted(len(there), 'task')} of {len(members)}]")
            entry = packaged().task_index[name].cfg or {}
            write(out, name, {"group": name, "task": there, "aggregate_metric_list": entry.get(
                "aggregate_metric_list", []), "metadata": {"version": 0} | entry.get("metadata", {})})
    return TaskManager(include_path=str(out), include_defaults=False)


def leaves(name: str) -> list[str]:
    """The tasks of a group or a tag, in order; a task is its own."""
    entry = packaged().task_index[name]
    if entry.kind.name == "TAG":
        return sorted(entry.tags)
    if entry.kind.name != "GROUP":
        return [name]
    members = (entry.cfg or {})["task"]
    names = [member if isinstance(member, str) else member.get("task") or member.get("group") for member in members]
    return [leaf for each in names for leaf in leaves(each)]


def over_files(name: str, folder: Path, fewshot: int | None) -> dict[str, Any]:
    """The task over the files of its folder. Raises InputError where one that it needs is missing."""
    entry = packaged().task_index[name]
    config = entry.cfg or {}
    named = {key: config[key] for key in SPLITS if isinstance(config.get(key), str)}
    files = {split: found for split in named.values() if (found := split_files(folder, split))}
    if not any(named.get(key) in files for key in ASKED):
        wanted = " or ".join(f"{named[key]}.jsonl" for key in ASKED if key in named)
        raise InputError(f"{folder}: found {listed(folder)}, expected {wanted}: what {name} asks from")
    own = config.get("num_fewshot")
    shots = own if fewshot is None or own == 0 else fewshot    # a task that says 0 has its examples in its prompt
    examples = named.get("fewshot_split") or named.get("training_split")
    if shots and examples and examples not in files:
        raise InputError(f"{folder}: found {listed(folder)}, expected {examples}.jsonl too, from which {name} takes "
                         f"its {shots} examples; --fewshot 0 asks without")
    readers = {READERS[path.suffix] for paths in files.values() for path in paths}
    if len(readers) > 1:
        raise InputError(f"{folder}: found files of several kinds ({', '.join(sorted(readers))}), expected one kind")
    return {
        "include": str(entry.yaml_path), "task": name, "dataset_path": readers.pop(), "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: [str(path) for path in paths] for split, paths in files.items()}},
    } | {key: None for key, split in named.items() if split not in files}


def split_files(folder: Path, split: str) -> list[Path]:
    """The file of a split, or its parts as the hub names them: test-00000-of-00002.parquet."""
    return sorted(path.absolute() for path in folder.iterdir()
                  if path.suffix in READERS and (path.stem == split or path.stem.startswith(f"{split}-")))


def uneven(data: Path, tasks: Sequence[str]) -> str:
    """Where the files of these tasks have a record without a key that the first one has; "" where none has. Raises
    DataError, with the line, for what is no JSON."""
    for name in (leaf for task in tasks for leaf in leaves(task)):
        for path in sorted((data / name).glob("*.json*")):
            first: records.Record | None = None
            for record in records.records(path, Encoding("utf-8")):
                first = first or record
                if missing := sorted(first.fields.keys() - record.fields.keys()):
                    return f"{record.where}: found no {', '.join(missing)}, which the first record has"
    return ""


def write(out: Path, name: str, config: dict[str, Any]) -> None:
    """One task file."""
    (out / f"{name}.yaml").write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")


def listed(folder: Path) -> str:
    """What is in a folder, for a message."""
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:6]) + (" …" if len(names) > 6 else "") or "nothing"
