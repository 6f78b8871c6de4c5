"""Run every case of tests/hostile/ as a user would meet it, measure what it costs, and write what was found as
docs/refusals.md.

    python -m tests.battery                     all of them, a minute or two; transformers is not asked again
    python -m tests.battery "chat templates" …  these rows of the table, by their titles; the others keep numbers
    and date
    python -m tests.battery --transformers      ask it too: a process for each folder, 20 seconds and 12 GB at most

tests/test_battery.py runs the same cases, and holds counts and names to what is committed. Seconds and megabytes are a
record, with the machine that is named there; what the tests hold are the bounds.
"""

import argparse
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

import checkpoints
from nanollm.errors import NanollmError
from nanollm.text import render as rendering
from tests.clock import ROUNDS, slowness
from tests.hostile import GROUPS, configs, files, ggufs, pickled
from tests.hostile.good import Group
from tests.record import here_and_now, lettered, places

ROOT = Path(__file__).parent.parent
REPORT = ROOT / "docs" / "refusals.md"
LARGEST = 64.0  # megabytes that one case may take beside what is there, or twice what is on disk
LONGEST = 1000                                   # characters of a message, but for lists of tensors, a line each
MARK = pickled.MARK


# ---- one case

@dataclass
class Outcome:
    error: NanollmError | None                   # any other exception goes through: it is a bug of ours
    seconds: float
    megabytes: float | None                      # None where the system does not tell
    opened: list[str]                            # files that Python opened meanwhile


_opened: list[str] | None = None                 # those of the case that runs


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if _opened is not None and event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
        _opened.append(os.path.realpath(os.fsdecode(arguments[0])))


sys.addaudithook(_note)


def measured(use: Callable[[], Any], process: bool = True) -> Outcome:
    """Call it. `process`: seconds of this process; else of the clock on the wall."""
    global _opened
    clock = time.process_time if process else time.perf_counter
    before, error, _opened = resident(fresh=True), None, []
    start = clock()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            use()
    except NanollmError as found:
        error = found
    finally:
        seconds, opened, _opened = clock() - start, _opened, None
    after = resident()
    return Outcome(error, seconds, None if before is None else (after[1] - before[0]) / 1e3, opened)


def quickest(use: Callable[[], Any], seconds: float = 1.0, process: bool = True) -> Outcome:
    """`measured`, and twice more while it takes longer than that: whatever else the machine does only adds to the time.

    If it still does, the seconds are those of the machine that bounds are written for (tests/clock.py). Memory is the
    first's."""
    outcome = measured(use, process)
    for _ in range(ROUNDS - 1):
        if outcome.seconds >= seconds:
            outcome.seconds = min(outcome.seconds, measured(use, process).seconds)
    if outcome.seconds >= seconds:
        outcome.seconds /= slowness(time.process_time if process else time.perf_counter)
    return outcome


def resident(fresh: bool = False) -> tuple[float, float] | None:
    """Kilobytes of memory that this process has, and the most that it had since this was last asked for afresh.
    Linux alone tells."""
    try:
        if fresh:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    now, most = (float(re.search(rf"{key}:\s+(\d+)", status)[1]) for key in ("VmRSS", "VmHWM"))
    return now, most


def need_refusal(outcome: Outcome, cause: str, seconds: float = 1.0, folder: Path | None = None) -> None:
    """An error of ours that names the cause, at once, in little memory, with nothing opened or left outside the
    folder."""
    assert outcome.error is not None, f"loaded, but should have said {cause!r}"
    said = str(outcome.error)
    assert re.search(cause, said, re.MULTILINE), f"{said}\ndoes not say {cause!r}"
    assert len(said) < LONGEST + 100 * said.count("\n"), f"{len(said)} characters"
    assert said.encode() and "\x1b" not in said, "what a terminal cannot print, or obeys"
    need_little(outcome, seconds, folder)


def need_little(outcome: Outcome, seconds: float = 1.0, folder: Path | None = None) -> None:
    """The bounds that hold whether something was refused or loaded."""
    assert outcome.seconds < seconds, f"{outcome.seconds:.2f} s"
    if folder is not None:
        disk = sum(path.stat().st_blocks * 512 for path in folder.iterdir() if path.is_file()) / 1e6
        assert outcome.megabytes is None or outcome.megabytes < max(LARGEST, 2 * disk), f"{outcome.megabytes:.0f} MB"
        home, root = os.path.realpath(folder), os.path.realpath(folder.parent)
        outside = [
            path
            for path in outcome.opened
            if path.startswith(root + "/") and not path.startswith(home + "/") or path == "/etc/passwd"
        ]
        assert not outside, f"opened {outside}"
        assert not (folder.parent / MARK).exists(), "code of the file was run"


def prepared(harm: Callable[[Path], Any], root: Path, good: Path) -> Path:
    """A copy of the good folder, harmed. `root` is a fresh folder: what lies beside the model is in it too."""
    shutil.copytree(good.parent, root, symlinks=True, dirs_exist_ok=True)
    harm(root / good.name)
    return root / good.name


def good_folder(group: Group, root: Path) -> Path:
    folder = root / "model"
    folder.mkdir(parents=True)
    group.make(folder)
    return folder


# ---- what is tried by the hundred: whether it is refused is not said beforehand, but how many are

class Seeded(NamedTuple):
    title: str
    attempts: Callable[[Path], Iterator[tuple[str, Callable[[], Any]]]]
    folder: bool = False                         # transformers can be asked too


def loads(folders: Iterator[tuple[str, Path]], use: Callable[[Path], Any]) -> Iterator[tuple[str, Callable[[], Any]]]:
    for name, folder in folders:
        yield name, lambda folder=folder: use(folder)


SEEDED = {
    "mutated safetensors": Seeded(
        "a safetensors file, mutated", lambda root: loads(files.mutations(root, 500), checkpoints.load), folder=True
    ),
    "mutated pickles": Seeded(
        "a pickle, mutated, where it is allowed",
        lambda root: loads(pickled.mutated_programs(root, 300), pickled.good.read_whole), folder=True,
    ),
    "mutated gguf": Seeded("a GGUF file, mutated", lambda root: loads(ggufs.mutations(root, 400), ggufs.read)),
    "sweep": Seeded("a key of config.json replaced, in each lineage", lambda root: configs.sweep(root, 60)),
    "sweep own": Seeded(
        "a place of our own layout replaced, in each lineage", lambda root: configs.sweep(root, 30, own=True)
    ),
    "sweep params": Seeded("a key of params.json replaced, in each dialect", configs.sweep_params),
}


def tried(seeded: Seeded, root: Path) -> tuple[list[Outcome], list[str]]:
    """All attempts, each within the bounds; and the names of those that were refused."""
    outcomes, refused = [], []
    for name, use in seeded.attempts(root):
        try:
            outcome = quickest(use)
            need_little(outcome)
            assert outcome.megabytes is None or outcome.megabytes < LARGEST, f"{outcome.megabytes:.0f} MB"
            if outcome.error is not None:
                need_refusal(outcome, ".")
                refused.append(name)
        except BaseException as error:
            error.args = (f"{name}: {error}",)
            raise
        outcomes.append(outcome)
    return outcomes, refused


# ---- the rows of the table

OF_LINEAGES = [key for key in GROUPS if key.startswith("tensors ")]
LINEAGES = f"tensors that do not fit, in each of {len(OF_LINEAGES)} lineages"
SECTIONS: dict[str, list[str]] = {  # title → the groups that are counted together, or one that is seeded
    GROUPS["safetensors"].title: ["safetensors"], SEEDED["mutated safetensors"].title: ["mutated safetensors"],
    GROUPS["indices"].title: ["indices"], GROUPS["config"].title: ["config"], SEEDED["sweep"].title: ["sweep"],
    GROUPS["foreign"].title: ["foreign"], LINEAGES: OF_LINEAGES,
    GROUPS["own"].title: ["own"], SEEDED["sweep own"].title: ["sweep own"],
    GROUPS["no pickles"].title: ["no pickles"], GROUPS["pickles"].title: ["pickles"],
    SEEDED["mutated pickles"].title: ["mutated pickles"], GROUPS["meta"].title: ["meta"],
    GROUPS["mistral"].title: ["mistral"], SEEDED["sweep params"].title: ["sweep params"],
    GROUPS["gguf"].title: ["gguf"], GROUPS["gguf parts"].title: ["gguf parts"],
    SEEDED["mutated gguf"].title: ["mutated gguf"],
    **{
        group.title: [key]
        for key, group in GROUPS.items()
        if key.startswith(("tokenizer", "*", "vocab", "tekken")) or key == "templates"
    },
}
assert {key for keys in SECTIONS.values() for key in keys} == GROUPS.keys() | SEEDED.keys(), "every group has its row"


class Row(NamedTuple):
    """One line of the table, as its cells."""
    title: str
    tried: str
    refused: str
    loaded: str
    slowest: str                                 # ms
    largest: str                                 # MB
    theirs: str                                  # of those that we refuse, how many transformers loads of how many
    measured: str                                # when and on what; in the document a letter (tests/record.py)


def run_section(title: str, root: Path) -> tuple[list[Outcome], list[Path]]:
    """Every case of a row; and the folders that were refused, if transformers is to be asked."""
    outcomes, asked = [], []
    for key in SECTIONS[title]:
        if key in SEEDED:
            found, _ = tried(SEEDED[key], root)
            outcomes += found
            continue
        group = GROUPS[key]
        good = good_folder(group, root / key.replace("*", "any") / "good")
        group.use(good)
        for number, (name, (harm, cause)) in enumerate(group.cases.items()):
            folder = prepared(harm, root / key.replace("*", "any") / str(number), good)
            outcome = quickest(lambda folder=folder, group=group: group.use(folder), group.seconds, group.process)
            outcomes.append(outcome)
            try:
                if cause is None:
                    assert outcome.error is None, outcome.error
                    need_little(outcome, group.seconds, folder)
                else:
                    need_refusal(outcome, cause, group.seconds, folder)
                    asked.append(folder)
            except AssertionError as error:
                error.args = (f"{key}, {name}: {error}",)
                raise
    return outcomes, asked


def row(title: str, outcomes: list[Outcome], theirs: str) -> Row:
    refused = sum(outcome.error is not None for outcome in outcomes)
    memory = [outcome.megabytes for outcome in outcomes if outcome.megabytes is not None]
    return Row(
        title, str(len(outcomes)), str(refused), str(len(outcomes) - refused),
        f"{1e3 * max(outcome.seconds for outcome in outcomes):.0f}", f"{max(memory, default=0):.0f}", theirs,
        here_and_now(),
    )


# ---- what transformers makes of them

SECONDS, BYTES = 20, 12 << 30


def ask_transformers(folders: list[Path]) -> list[bool]:
    """Whether it gives finite logits for each folder. One process each, forked from this one, which has imported
    it once."""
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    def child(folder: Path) -> int:
        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
        for number in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
            with torch.inference_mode():
                logits = model(torch.arange(10)[None]).logits
            return 0 if torch.isfinite(logits).all() else 1
        except BaseException:
            return 1

    def loads(folder: Path) -> bool:
        pid = os.fork()
        if pid == 0:
            os._exit(child(folder))
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return status == 0
            time.sleep(0.01)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return False

    return [loads(folder) for folder in folders]


def theirs(title: str, asked: list[Path], root: Path) -> str:
    """The last cell of a row: folders that we refuse and transformers loads. Lineages that it cannot load
    unharmed are left out."""
    keys = SECTIONS[title]
    if keys == ["mutated safetensors"]:
        folder, found = root / "again", []
        folder.mkdir()
        for number, (_, path) in enumerate(files.mutations(folder, 500)):
            try:
                checkpoints.load(path)
            except NanollmError:
                found.append(shutil.copytree(path, folder / str(number)))
        asked = found
    elif not all(key in GROUPS and GROUPS[key].folder for key in keys):
        return "–"
    else:
        goods = [root / key / "good" / "model" for key in keys]
        able = {good.parent.parent for good, loads in zip(goods, ask_transformers(goods), strict=True) if loads}
        asked = [folder for folder in asked if folder.parent.parent in able]
    return f"{sum(ask_transformers(asked))} of {len(asked)}"


# ---- the document

HEAD = """# What is refused

Written by `python -m tests.battery`, held by `tests/test_battery.py`. The cases are in `tests/hostile/`, with the words
that each must be refused with; each starts from a sound folder, which loads. When and on what a row was measured:

{measured}

Every attempt ends within a second of processor time, with one error of our own (`nanollm/errors.py`) that names the file,
key or tensor; beside what was there before it takes less than {largest:.0f} MB, or twice what is on the disk. Chat
templates run in a process of their own, with {time:g} s of processor time and 512 MiB; the seconds in their row are those
of the wall, its start among them. No file outside the folder is opened, and nothing that a pickle names is called.

What loads is legal, though odd, and listed below; or it is one of the attempts at random that did no harm that a file could show: changed
bytes inside a weight (safetensors has no checksums), keys that say nothing about the logits, values that another model could have.

The last column but one is what transformers makes of folders that are refused here: how many load with finite logits,
of how many it was asked about. A dash: it has no such layout, or was not asked.

| what | tried | refused | load | slowest, ms | most memory, MB | transformers loads of the refused | measured |
|---|--:|--:|--:|--:|--:|--:|---|
"""
NOT_COVERED = """
## What this does not cover

- The header of a safetensors file, or an index, of up to 25 MB is taken for what it says it is, as large models have such: reading one
  takes a second, and 25 times its size.
- Changed bytes inside a weight that stay finite. No format here has checksums.
- A pattern in tokenizer.json that is slow, but not so slow that the library gives up (ten million steps at one place): a long text then takes long.
- Archives of hundreds of thousands of entries (.bin, .pth): Python's zipfile reads the names of all of them.
- Folders that change while they are read, but for files that become shorter.
- GGUF files, which `tests/test_gguf.py` has.
"""


def listed(group: Group) -> str:
    """The names of its cases, those that load by themselves."""
    def short(name: str) -> str:
        text = name.replace("\n", " ").replace("|", "¦")
        return (
            f"`{text[:57]}…`"
            if len(text) > 60
            else text
            if "{" not in text and "<" not in text and "*" not in text
            else f"`{text}`"
        )

    refused = ", ".join(short(name) for name, (_, cause) in group.cases.items() if cause is not None)
    loads = ", ".join(short(name) for name, (_, cause) in group.cases.items() if cause is None)
    return f"Refused: {refused}." + (f"\n\nLoads: {loads}." if loads else "")


def document(rows: dict[str, Row]) -> str:
    """docs/refusals.md."""
    letters, measured = lettered(rows[title].measured for title in SECTIONS)
    shown = [rows[title]._replace(measured=letters[rows[title].measured]) for title in SECTIONS]
    text = HEAD.format(measured=measured, largest=LARGEST, time=rendering.TIME_LIMIT)
    text += "".join(f"| {' | '.join(row)} |\n" for row in shown)
    total = [sum(int(getattr(each, field)) for each in rows.values()) for field in ("tried", "refused", "loaded")]
    text += f"\n{total[0]:,} attempts: {total[1]:,} refused with a named cause, {total[2]:,} load. None ended in another way.\n\n## The cases\n"
    for title, keys in SECTIONS.items():
        if keys[0] in GROUPS:
            text += f"\n### {title}\n\n{listed(GROUPS[keys[0]])}\n"
    return text + NOT_COVERED


def committed() -> dict[str, Row]:
    """The rows of docs/refusals.md."""
    text = REPORT.read_text() if REPORT.exists() else ""
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    rows = [Row(*each) for each in cells if len(each) == len(Row._fields) and each[0] != "what"]
    return {row.title: row._replace(measured=places(text)[row.measured]) for row in rows}


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m tests.battery", description=__doc__, formatter_class=raw)
    parser.add_argument("titles", nargs="*", metavar="TITLE", help="rows to measure; none: all of them")
    parser.add_argument(
        "--transformers", action="store_true", help="ask transformers what it makes of the folders, too"
    )
    args = parser.parse_args()
    if unknown := set(args.titles) - SECTIONS.keys():
        parser.error(f"no such row: {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    torch.set_num_threads(1)
    rows = committed()
    for title in args.titles or SECTIONS:
        with tempfile.TemporaryDirectory() as folder:
            outcomes, asked = run_section(title, Path(folder))
            known = rows[title].theirs if title in rows else "–"
            said = theirs(title, asked, Path(folder)) if args.transformers else known
            rows[title] = row(title, outcomes, said)
            print(" | ".join(rows[title]), flush=True)
    REPORT.write_text(document(rows))
