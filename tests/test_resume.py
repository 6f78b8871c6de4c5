"""A run survives anything: what is resumed ends as what was never interrupted, to the bit.

    killed       SIGKILL at every place of a step and of a checkpoint, on 1 and on 2 ranks (tests/killed.py)
    elastic      one checkpoint of 2 ranks, gone on with by 1, 2 and 4; one of 1 rank by 2
    asked        Ctrl-C, SIGTERM, SIGUSR1, two runs in one folder, workers whose torchrun is gone
    no room      a disk that is full for a checkpoint, the log or the model; folders that cannot be written

"Ends as" means: loss, gradient norm and learning rate of every step, each step once in the log, are equal floats;
model.safetensors has equal bytes; nothing half-written is left.

Where nothing has to die a run is in this process (`here`), else its ranks are forked (`launch`, see forked.py), which
gives them what torchrun does. Torchrun itself (`torchrun`) starts the runs of 2 ranks whose tests are about it: a
worker that is killed; signals, which it hands on to what goes on from there; workers that outlive it; a disk that
fills up under it. Those equal uninterrupted runs of forked ranks.
"""

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import train
from nanollm import cli
from nanollm.data import prepare as texts
from nanollm.training import log as logs
from nanollm.training import losses, state
from tests import forked, killed
from tests.fixtures import slow_but
from tests.toys import grammar

ROOT = Path(train.__file__).parent
SHORT = ["--steps", "8", "--save-every", "2", "--eval-every", "4", "--optimizer", "adamw"]
MUON = [*SHORT, "--optimizer", "muon"]  # with AdamW beside it; four times the work
LONG = [
    "--steps", "64", "--save-every", "16", "--eval-every", "32", "--optimizer", "adamw",
]  # to be met on its way; its steps are cheap


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Shards of a small grammar, made once."""
    folder = grammar(tmp_path_factory.mktemp("text"))
    texts.prepare(texts.read(folder), folder / "shards", vocab=300, tokenizer=None, context=32)
    return folder / "shards"


def arguments(data: Path, out: Path, more: tuple) -> list[str]:
    return [
        *map(
            str,
            [
                "--data", data, "--out", out, "--context", 32, "--batch-size", 4, "--warmup", 2, "--lr", 0.003,
                "--dtype", "float32", "--sample-every", 0,
                *more,
            ],
        )
    ]


def here(data: Path, out: Path, *more: str) -> str | int | None:
    """A run in this process: much quicker, where nothing has to die. Returns what the process would have ended
    with: None, or "error: …"."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *arguments(data, out, more)])
        try:
            cli.main(train.run)
        except SystemExit as end:
            return end.code


def launch(data: Path, out: Path, *more: str, ranks: int = 1, place: tuple[str, int] | None = None) -> forked.Started:
    """Forked ranks; place: where one of them is killed."""
    return forked.start(ranks, killed.run if place else train.run, *(place or ()), *arguments(data, out, more))


def run(data: Path, out: Path, *more: str, ranks: int = 1) -> str:
    """Forked ranks that have to end well: all they said."""
    ended = launch(data, out, *more, ranks=ranks).end()
    assert ended.codes == [0] * ranks, ended.said
    return ended.said


def failed(codes: list[int]) -> bool:
    """Whether an error of ours ended them all: each by itself, or when it was told to for the sake of another."""
    return 1 in codes and set(codes) <= {1, -signal.SIGTERM}


# ---- torchrun

def torchrun(data: Path, out: Path, *more: str, script: tuple = ("train.py",)) -> subprocess.Popen:
    """2 ranks."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*launcher, *map(str, script), *arguments(data, out, more)], cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )


def processes(out: Path) -> list[int]:
    """Those at work in a run folder, which their command lines name; torchrun is one of them."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if str(out).encode() in (folder / "cmdline").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:                                         # it ended meanwhile
            pass
    return found


def worker(out: Path, rank: int) -> int:
    """The process of a rank."""
    return next(
        process
        for process in processes(out)
        if f"RANK={rank}".encode() in (Path("/proc") / str(process) / "environ").read_bytes().split(b"\0")
    )


def kill(out: Path) -> None:
    """Whoever is at work there. Ranks are started by torchrun in sessions of their own: they do not end with it."""
    for process in processes(out):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def end(child: subprocess.Popen, out: Path, seconds: int = 300) -> tuple[int, str]:
    """Its exit code and all it said. Nothing of it is left, whatever happens."""
    try:
        said, _ = child.communicate(timeout=seconds)
        return child.returncode, said
    finally:
        kill(out)
        child.wait()


# ---- what a run leaves

def steps(out: Path) -> list[tuple]:
    """What the log says of each step, to the bit."""
    keys = ("step", "loss", "worst_rank_loss", "gradient_norm", "log_z", "balance", "lr", "targets", "skipped")
    return [tuple(entry.get(key) for key in keys) for entry in logs.read_log(out / "log.jsonl") if "lr" in entry]


def outcome(out: Path) -> tuple:
    """All that must be equal."""
    held_out = [
        (entry["step"], entry["held_out_loss"])
        for entry in logs.read_log(out / "log.jsonl")
        if "held_out_loss" in entry
    ]
    return steps(out), held_out, (out / "model.safetensors").read_bytes()


def hidden(out: Path) -> list[str]:
    """Whatever is half-written: drafts have names that begin with a dot."""
    return sorted(str(path.relative_to(out)) for path in out.rglob(".*"))


def saved(out: Path) -> list[int]:
    return [int(path.name) for path in state.complete(out / "steps")]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Callable[..., Path]:
    """The folder of a run that was never interrupted, all of its checkpoints there; each is computed once."""
    done: dict[tuple, Path] = {}

    def get(*more: str, ranks: int = 1) -> Path:
        if (more, ranks) not in done:
            out = tmp_path_factory.mktemp("whole") / "run"
            if ranks == 1:
                assert here(data, out, *more, "--keep", "9") is None
            else:
                run(data, out, *more, "--keep", "9", ranks=ranks)
            done[more, ranks] = out
        return done[more, ranks]

    return get


def cut(folder: Path, after: int, out: Path) -> Path:
    """A copy of a run as it was when checkpoint `after` was its newest."""
    shutil.copytree(folder, out)
    for checkpoint in state.complete(out / "steps"):
        if int(checkpoint.name) > after:
            shutil.rmtree(checkpoint)
    (out / "model.safetensors").unlink()
    return out


# ---- killed

KILLS = {                       # place, step: the checkpoints that are complete afterwards, and the draft that is left
    ("forward", 6): ([2, 4], None),
    ("optimizer", 6): ([2, 4], None),
    ("shard", 2): ([], ".00000002.tmp"),
    ("manifest", 4): ([2], ".00000004.tmp"),
    ("rename", 6): ([2, 4], ".00000006.tmp"),
    ("renamed", 6): ([2, 4, 6], None),
    ("pruning", 2): ([4, 6], ".00000002.old.tmp"),
    ("export", 8): ([6, 8], None),
}


def as_it_was_left(out: Path, place: tuple[str, int]) -> None:
    there, draft = KILLS[place]
    assert saved(out) in (
        [there, there[:-1]] if place[0] in ("forward", "optimizer") else [there]
    )  # the thread may not have finished 4
    assert draft is None or draft in os.listdir(out / "steps")
    assert not (out / "model.safetensors").exists()


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("place", slow_but([("shard", 2)], KILLS), ids=lambda place: f"{place[0]}-{place[1]}")
def test_a_run_that_was_killed_ends_as_one_that_was_not(whole, data, tmp_path, place, ranks):
    out, options = (
        tmp_path / "run", MUON if place[0] == "optimizer" else SHORT,
    )  # there the first of two has taken its step
    ended = launch(data, out, *options, ranks=ranks, place=place).end()
    victim = ranks - 1 if place[0] in ("forward", "optimizer", "shard", "export") else 0
    assert ended.codes[victim] == -signal.SIGKILL and 0 not in ended.codes, (ended.codes, ended.said)
    as_it_was_left(out, place)
    run(data, out, *options, "--resume", ranks=ranks)
    assert saved(out)[-1] == 8 and hidden(out) == []
    assert outcome(out) == outcome(whole(*options, ranks=ranks))


# ---- every kind of state

@pytest.mark.parametrize("more", [
    ("--preset", "mixtral"),                                    # the prices of experts, AdamW's moments and its count
    *(pytest.param(more, marks=pytest.mark.slow) for more in [
        ("--preset", "mamba", "--optimizer", "muon", "--micro-batch", "1"),
        ("--dtype", "bfloat16", "--optimizer", "muon", "--schedule", "wsd", "--z-loss", "0.0001")]),
], ids=lambda more: more[1])
def test_what_goes_on_from_a_checkpoint_ends_as_what_went_on(whole, data, tmp_path, more):
    out = cut(whole(*SHORT, *more), 4, tmp_path / "run")
    assert here(data, out, *SHORT, *more, "--resume") is None
    assert outcome(out) == outcome(whole(*SHORT, *more))


@pytest.mark.slow
def test_the_window_that_spikes_are_measured_against_goes_on(data, tmp_path, monkeypatch):
    """Where weights hardly move, many a step is half a sigma above the others. A window that began anew would be
    blind for 8 steps."""
    monkeypatch.setattr(losses, "RECENT", 32)
    more = ["--steps", "24", "--save-every", "12", "--lr", "0.000001", "--skip-sigma", "0.5"]
    assert here(data, tmp_path / "whole", *more) is None
    out = cut(tmp_path / "whole", 12, tmp_path / "run")
    assert here(data, out, *more, "--resume") is None
    assert outcome(out) == outcome(tmp_path / "whole")
    facts = [state.read_manifest(folder / "steps" / "00000024")["facts"] for folder in (out, tmp_path / "whole")]
    assert facts[0] == facts[1]
    assert any("sigma" in (skipped or "") for step, *_, skipped in steps(out) if 12 < step <= 20)


def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_is_gone_on_with(whole, data, tmp_path):
    out = cut(whole(*SHORT), 6, tmp_path / "run")
    newest = out / "steps" / "00000006"
    file = newest / "rank-0.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    ended = here(data, out, *SHORT, "--resume")
    assert ended.startswith(f"error: {newest}: damaged: rank-0.safetensors has CRC-32 ") and "\n" not in ended
    newest.rename(tmp_path / "away")
    assert here(data, out, *SHORT, "--resume") is None
    assert outcome(out) == outcome(whole(*SHORT))


# ---- elastic

@pytest.mark.parametrize("before, ranks", [
    (2, 1), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(2, 2), (2, 4), (1, 2)])])
def test_a_checkpoint_is_gone_on_with_by_any_number_of_ranks(whole, data, tmp_path, before, ranks):
    """One rank is not sharded at all, which its checkpoints do not show."""
    before = whole(*MUON, ranks=before)
    out = cut(before, 4, tmp_path / "run")
    assert "on from step 4" in run(data, out, *MUON, "--resume", ranks=ranks)
    assert state.read_manifest(out / "steps" / "00000008")["ranks"] == ranks
    if state.read_manifest(before / "steps" / "00000008")["ranks"] == ranks:
        assert outcome(out) == outcome(before)
    ours, theirs = (
        [entry for entry in logs.read_log(folder / "log.jsonl") if "loss" in entry] for folder in (out, before)
    )
    assert [(entry["step"], entry["lr"], entry["targets"]) for entry in ours] == [
        (entry["step"], entry["lr"], entry["targets"]) for entry in theirs
    ]
    assert (
        max(abs(a["loss"] - b["loss"]) for a, b in zip(ours, theirs, strict=True)) < 1e-6
    )  # the order of sums is another
    assert max(abs(a["gradient_norm"] - b["gradient_norm"]) for a, b in zip(ours, theirs, strict=True)) < 1e-5
    assert len(ours) == 8


# ---- asked

def wait(until: Callable[[], bool], alive: Callable[[], object]) -> None:
    """Until it is so, while someone is at work in the folder."""
    while not until():
        time.sleep(0.02)                        # first: a process that has just begun has no command line yet
        assert alive(), "the run has ended"


def done(out: Path) -> int:
    """Steps in the log."""
    return len(steps(out)) if (out / "log.jsonl").exists() else 0


def ask(
    out: Path, alive: Callable[[], object], save: Callable[[], None], leave: Callable[[], None], before: int = 0
) -> int:
    """SIGUSR1 a few steps after the first `before`, and SIGTERM a few later; the newest checkpoint between."""
    wait(lambda: done(out) >= before + 3, alive)
    save()
    wait((out / "model.safetensors").exists, alive)
    asked = saved(out)[-1]
    wait(lambda: done(out) >= asked + 3, alive)
    leave()
    return asked


def goes_on_as_asked(
    whole: Callable[..., Path], data: Path, out: Path, asked: int, said: str, ranks: int, before: int = 0
) -> None:
    left = saved(out)[-1]
    assert before + 3 < asked and asked % 16 and asked + 3 < left < 64  # not a checkpoint of every 16 steps
    assert f"{out}: saved at step {left}, and left as asked; --resume goes on" in said
    assert done(out) == left and hidden(out) == []
    assert f"on from step {left}" in run(data, out, *LONG, "--resume", ranks=ranks)
    assert outcome(out) == outcome(whole(*LONG, ranks=ranks))


@pytest.mark.slow
def test_sigusr1_saves_and_goes_on_and_sigterm_saves_and_leaves(whole, data, tmp_path):
    out = tmp_path / "run"
    child = launch(data, out, *LONG)
    try:
        process, = child.pids
        asked = ask(
            out, child.running, lambda: os.kill(process, signal.SIGUSR1), lambda: os.kill(process, signal.SIGTERM)
        )
    finally:
        ended = child.end()
    assert ended.codes == [0], ended.said
    goes_on_as_asked(whole, data, out, asked, ended.said, ranks=1)


def test_ctrl_c_saves_and_leaves(whole, data, tmp_path, monkeypatch, capfd, ctrl_c_heard):
    """In the middle of step 3. The exit code is that of Ctrl-C, and the run ends as one that went through."""
    out, step = tmp_path / "run", train.take_step

    def interrupted(run, *args):
        if run.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(run, *args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "take_step", interrupted)
        assert here(data, out, *SHORT, "--resume") == 130
    said = capfd.readouterr()
    assert f"no checkpoint in {out}: starting at step 0\n" in said.err          # an --out that is misspelt is seen
    assert "\nCtrl-C: the run saves a checkpoint after this step and leaves; once more ends it at once\n" in said.err
    assert f"{out}: saved at step 3, and left as asked; --resume goes on" in said.out
    assert saved(out) == [2, 3] and (out / "model.safetensors").exists() and hidden(out) == []
    assert here(data, out, *SHORT, "--resume") is None
    assert "no checkpoint" not in capfd.readouterr().err
    assert outcome(out) == outcome(whole(*SHORT))


@pytest.mark.slow
def test_torchrun_ends_with_a_worker_that_was_killed_goes_on_and_hands_signals_on(whole, data, tmp_path):
    out = tmp_path / "run"
    code, said = end(torchrun(data, out, *LONG, script=("tests/killed.py", "renamed", 16)), out)
    assert code == 1 and "Signal 9 (SIGKILL)" in said and saved(out) == [16], said
    before = done(out)                                                          # a step or two more, taken again
    child = torchrun(data, out, *LONG, "--resume")
    try:
        asked = ask(out, lambda: processes(out), before=before,
                    save=lambda: os.kill(worker(out, 1), signal.SIGUSR1),       # any one rank will do
                    leave=lambda: child.send_signal(signal.SIGTERM))            # torchrun hands it on
    finally:
        code, said = end(child, out)
    assert "on from step 16" in said and "SignalException" in said, said  # torchrun never ends with 0 after a signal
    goes_on_as_asked(whole, data, out, asked, said, 2, before)


@pytest.mark.slow
def test_a_folder_in_use_is_refused_even_where_the_torchrun_of_its_workers_is_gone(whole, data, tmp_path):
    out = tmp_path / "run"
    child = torchrun(data, out, *LONG)
    try:
        wait(lambda: len(saved(out)) > 0, lambda: processes(out))
        refused = (
            f"error: {out}: another run is at work in it (process {worker(out, 0)}); "
            "wait for it, end it, or name another folder with --out"
        )
        assert here(data, out, *LONG, "--resume") == here(data, out, *LONG, "--force") == refused
        child.kill()
        child.wait()
        before = done(out)
        wait(lambda: done(out) > before + 1, lambda: processes(out))            # orphans, who train on
        assert here(data, out, *LONG, "--resume") == refused
    finally:
        kill(out)
        end(child, out)
    assert "on from step" in run(data, out, *LONG, "--resume", ranks=2)
    assert outcome(out) == outcome(whole(*LONG, ranks=2))


# ---- no room

@pytest.mark.parametrize("place", slow_but(["save_file"], ["save_file", "write_manifest", "publish"]))
def test_training_goes_on_where_a_checkpoint_cannot_be_written(whole, data, tmp_path, monkeypatch, capsys, place):
    out, original = tmp_path / "run", getattr(state, place)

    def full(*args: object) -> None:
        """Of checkpoint 4, where files and folders are named before or after what goes into them."""
        if any("00000004" in str(arg) for arg in args if isinstance(arg, Path)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(*args)

    monkeypatch.setattr(state, place, full)
    assert here(data, out, *SHORT, "--keep", "9") is None
    said = capsys.readouterr()
    assert "warning: no checkpoint at step 4: " in said.out + said.err and "No space left" in said.out + said.err
    assert saved(out) == [2, 6, 8] and hidden(out) == [] and outcome(out) == outcome(whole(*SHORT))


@pytest.mark.slow
def test_a_run_whose_last_checkpoint_cannot_be_written_stops_and_goes_on_later(whole, data, tmp_path, monkeypatch):
    out, original = tmp_path / "run", os.rename

    def full(source: Path, target: Path) -> None:
        if Path(target).name == "00000008":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", full)
        ended = here(data, out, *SHORT)
    assert (
        ended.startswith("error: the checkpoint of step 8 cannot be written: ")
        and ended.endswith("make room, then --resume")
        and "\n" not in ended
    )
    assert saved(out) == [4, 6] and hidden(out) == [] and not (out / "model.safetensors").exists()
    assert here(data, out, *SHORT, "--resume") is None
    assert outcome(out) == outcome(whole(*SHORT))


@pytest.fixture
def disk(tmp_path) -> Iterator[Callable[[int], Path]]:
    """A small disk: disk(bytes) makes it, or gives it another size."""
    place = tmp_path / "disk"

    def size(count: int) -> Path:
        options = f"size={count}" if not place.exists() else f"remount,size={count}"
        place.mkdir(exist_ok=True)
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", place], capture_output=True, text=True)
        if made.returncode:
            pytest.skip(f"a small disk cannot be mounted here: {made.stderr.strip()}")
        return place

    yield size
    subprocess.run(["umount", place], capture_output=True)


def fill(place: Path) -> Path:
    """Take all that is left."""
    with contextlib.suppress(OSError), (place / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return place / "filler"


def ours(said: str) -> list[str]:
    """The lines of a traceback that are of this repository. Of torchrun's own (.venv may lie in here) there
    always is one where a worker failed."""
    return [line for line in said.splitlines() if f'File "{ROOT}' in line and "site-packages" not in line]


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*"))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_on_a_disk_with_room_for_one_checkpoint_the_first_one_is_gone_on_with(whole, data, disk, ranks):
    one = bytes_of(whole(*SHORT, ranks=ranks) / "steps" / "00000002")
    out = disk(one * 3 // 2) / "run"
    ended = launch(data, out, *SHORT, ranks=ranks).end()
    said = ended.said
    assert failed(ended.codes) and ours(said) == [], (ended.codes, said)
    assert (
        said.count("warning: no checkpoint at step ") == 2
        and said.count("error: the checkpoint of step 8 cannot be written: ") == 1
    ), said
    assert saved(out) == [2] and hidden(out) == [] and done(out) == 8
    disk(one * 6)
    assert "on from step 2" in run(data, out, *SHORT, "--resume", ranks=ranks)
    assert outcome(out) == outcome(whole(*SHORT, ranks=ranks))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_disk_that_fills_up_stops_the_run_in_one_line_and_it_goes_on_when_there_is_room(whole, data, disk, ranks):
    """The log is the first that must be written. 2 ranks are under torchrun, which has much to say of workers
    that fail."""
    place = disk(bytes_of(whole(*LONG, ranks=ranks)))
    out = place / "run"
    child = launch(data, out, *LONG) if ranks == 1 else torchrun(data, out, *LONG)
    try:
        wait(lambda: len(saved(out)) > 0, child.running if ranks == 1 else lambda: processes(out))
        filler = fill(place)
    finally:
        if ranks == 1:
            ended = child.end()
            codes, said = ended.codes, ended.said
        else:
            code, said = end(child, out)
            codes = [code]
    assert codes == [1] and said.count(f"error: {out / 'log.jsonl'}: cannot write: No space left on device; ") == 1, (
        said
    )
    assert ours(said) == [], said
    assert done(out) < 64 and saved(out)[0] == 16 and hidden(out) == []
    ended = launch(data, out, *LONG, "--resume", ranks=ranks).end()  # still full
    assert (
        failed(ended.codes)
        and ended.said.count("error: ") == 1
        and "No space left" in ended.said
        and ours(ended.said) == []
    ), ended
    filler.unlink()
    assert "on from step" in run(data, out, *LONG, "--resume", ranks=ranks)
    assert outcome(out) == outcome(whole(*LONG, ranks=ranks))


@pytest.mark.slow
def test_a_model_for_which_there_is_no_room_is_written_when_there_is(whole, data, disk, monkeypatch):
    place = disk(bytes_of(whole(*SHORT)))
    out, export = place / "run", train.export
    with monkeypatch.context() as patch:
        patch.setattr(train, "export", lambda run: (fill(place), export(run)))
        ended = here(data, out, *SHORT)
    assert ended.startswith("error: ") and "No space left" in ended and "\n" not in ended
    assert saved(out) == [6, 8] and hidden(out) == []
    (place / "filler").unlink()
    assert here(data, out, *SHORT, "--resume") is None
    assert outcome(out) == outcome(whole(*SHORT))


@pytest.mark.parametrize("place", ["file/run", "/proc/run", "x" * 300])
def test_a_folder_that_cannot_be_written_is_one_line(data, tmp_path, place):
    (tmp_path / "file").write_text("")
    ended = here(data, tmp_path / place, *SHORT)
    assert ended.startswith(f"error: {tmp_path / place}: cannot ") and "\n" not in ended
    assert os.listdir(tmp_path) == ["file"]
