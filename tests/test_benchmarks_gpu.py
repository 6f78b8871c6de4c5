"""benchmarks/gpu without a GPU: it all runs in tiny shapes; what fails, hangs, dies or is killed costs only itself."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import checks, decode, items
from benchmarks.gpu.items import Item, OutOfTime, Setting, limit
from benchmarks.gpu.lines import POISONED, append, ended, lines
from benchmarks.gpu.report import PartState, Report
from nanollm.inference.quantize import quantize
from nanollm.model import Decoder
from nanollm.presets import preset

ROOT = Path(__file__).parent.parent
HOUR = ("--minutes", "60", "--dry-run")                         # a machine may be busy: no test here is about time


def start(out: Path, *options: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "benchmarks.gpu", "--out", str(out), *HOUR, *options], cwd=ROOT,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def told(out: Path) -> dict:
    """results.json, as a strict reader reads it."""
    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return json.loads((out / "results.json").read_text(), parse_constant=refuse)


@pytest.mark.slow
def test_a_dry_run_of_everything(tmp_path):
    run = start(tmp_path)
    output, _ = run.communicate()
    found = told(tmp_path)
    parts = {part["part"]: part for part in found["parts"]}
    problems = [(item["item"], item["state"], item.get("error")) for part in found["parts"] for item in part["items"]
                if item["state"] != "done"]
    assert run.returncode == 0 and found["state"] == "done" and found["dry_run"] and not problems, output
    assert [part["state"] for part in found["parts"]] == ["done"] * len(command.PARTS), output

    def rows(part):
        return [item["row"] for item in parts[part]["items"]]

    assert {"machine", "bandwidth", "products", "launch"} == {item["item"] for item in parts["facts"]["items"]}
    assert rows("checks")[0]["passed"] == 3 and rows("checks")[0]["failures"] == []
    whole = [row for row in rows("kernels") if "operation" in row]
    assert len(whole) == 3 and all(row["of roofline"] > 0 and row["compiled of roofline"] > 0 for row in whole)
    assert rows("tuning")[0]["tried"] >= 1
    tables = sorted(path.name for path in (ROOT / "kernels/tuning").glob("*.json"))
    assert sorted(path.name for path in (tmp_path / "tuning").glob("*.json")) == tables
    for name in tables:
        assert json.loads((tmp_path / "tuning" / name).read_text()).keys() == json.loads(
            (ROOT / "kernels/tuning" / name).read_text()).keys()
    ways = {(row["bits"], row["how"]) for row in rows("decode")} - {(16, "transformers")}
    assert ways == {(bits, how) for bits in (16, 8, 4) for how in decode.HOW}
    assert all(row["differs from eager"] < 0.01 for row in rows("decode") if row["how"] != "transformers")
    losses = [(row["first loss"], row["last loss"]) for row in rows("training")]
    assert len(losses) == 4 and all(one == pytest.approx(losses[0]) for one in losses) and losses[0][1] < losses[0][0]
    text = (tmp_path / "results.md").read_text()
    assert text in output and "no figure here means anything" in text
    again = start(tmp_path)
    assert "results of another session" in again.communicate()[0] and again.returncode == 2


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_killed_in_the_middle(tmp_path, how):
    """What was found is there, and no process goes on."""
    run = start(tmp_path, "--parts", "facts,decode")
    while not (lines(tmp_path / "decode.jsonl") or run.poll() is not None):
        time.sleep(0.05)
    run.send_signal(how)
    run.communicate()
    found = told(tmp_path)
    assert found["state"] == ("stopped" if how == signal.SIGTERM else "running")
    assert found["parts"][0]["state"] == "done" and "copy" in found["parts"][0]["items"][1]["row"]["here"]
    assert "| memory | copy" in (tmp_path / "results.md").read_text()
    deadline = time.time() + 60
    while processes_of(tmp_path) and time.time() < deadline:
        time.sleep(0.1)
    assert not processes_of(tmp_path)


def processes_of(out: Path) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes().decode(errors="replace"))
        except OSError:                                         # it has just ended
            pass
    return [line for line in found if str(out) in line and "benchmarks.gpu" in line]


# ---- a part

@pytest.fixture
def part(monkeypatch, tmp_path):
    """Runs a part of these items as a child does."""
    def run(*made: Item, left: float = 3600) -> list[tuple[str, str]]:
        module = types.SimpleNamespace(items=lambda setting: iter(made))
        monkeypatch.setitem(sys.modules, "benchmarks.gpu.fake", module)
        items.run("fake", Setting(tmp_path, time.time() + left, False))
        return states(tmp_path)

    return run


def states(out: Path) -> list[tuple[str, str]]:
    return [(name, line["state"]) for name, line in ended(lines(out / "fake.jsonl")).items()]


def forever(tell):
    tell({"so far": 1})
    while True:
        try:
            time.sleep(0.01)
        except Exception:                                       # as code under test may do
            pass


def broken(tell):
    raise ValueError("a broken kernel")


def test_an_item_that_fails_or_hangs_costs_only_itself(part, tmp_path):
    made = Item("one", broken), Item("two", forever, seconds=0.1), Item("three", lambda tell: {"x": 1.5})
    with pytest.raises(SystemExit) as end:                      # what was interrupted may be half done: a new process
        part(*made)
    assert end.value.code == POISONED
    assert part(*made) == [("one", "failed"), ("two", "out of time"), ("three", "done")]
    one, two, three = ended(lines(tmp_path / "fake.jsonl")).values()
    assert "ValueError: a broken kernel" in one["error"] and "in broken" in one["error"]
    assert two["row"] == {"so far": 1} and three["row"] == {"x": 1.5}


def test_a_spoilt_gpu_ends_the_process_and_the_next_goes_on(part, monkeypatch, tmp_path):
    made = Item("one", broken), Item("two", lambda tell: {}), Item("three", lambda tell: {})
    monkeypatch.setattr(items, "poisoned", lambda: len(states(tmp_path)) == 1)
    with pytest.raises(SystemExit) as end:
        part(*made)
    assert end.value.code == POISONED
    assert part(*made) == [("one", "failed"), ("two", "done"), ("three", "done")]


def test_nothing_is_begun_at_the_end(part):
    assert part(Item("one", forever), left=0.1) == [("one", "no time")]


def test_limit():
    with pytest.raises(OutOfTime, match="after 0 seconds"), limit(0.05):
        while True:
            try:
                time.sleep(1)
            except Exception:
                pass
    time.sleep(0.06)                                            # and it does not ring again


# ---- the process that waits

class Played(command.Session):
    """Its children are played: each does what the next of `acts` says, and returns a code."""

    def watch(self, part, start, deadline):
        self.running = types.SimpleNamespace(returncode=self.acts.pop(0)(self.report.out / f"{part.name}.jsonl"))


def played(tmp_path: Path, *acts, seconds: float = 3600) -> PartState:
    part = PartState("facts", "words")
    session = Played(None, Report(tmp_path, "a command", True, [part]), time.time() + 3600)
    session.acts = list(acts)
    (tmp_path / "facts.log").write_text("the last words")
    session.play(part, time.time() + seconds)
    assert not session.acts
    return part


def test_a_part_whose_process_dies_goes_on_behind_the_item(tmp_path):
    def dies(file):
        append(file, "one", "done", row={"x": 1})
        append(file, "two", "begun")
        return -signal.SIGSEGV

    part = played(tmp_path, dies, lambda file: append(file, "three", "done", row={}) or POISONED, lambda file: 0)
    assert part.state == "done" and part.starts == 3
    one, two, three = told(tmp_path)["parts"][0]["items"]
    assert (one["state"], two["state"], three["state"]) == ("done", "died: the process ended with -11", "done")
    assert two["error"] == "the last words"


def test_a_part_that_cannot_begin_has_failed(tmp_path):
    part = played(tmp_path, lambda file: 1)
    assert part.state == "failed" and part.problem == "the last words"
    assert "the last words" in (tmp_path / "results.md").read_text()


def test_a_part_that_was_killed_is_out_of_time(tmp_path):
    part = played(tmp_path, lambda file: append(file, "one", "begun") or -signal.SIGKILL, seconds=-1)
    assert part.state == "out of time" and told(tmp_path)["parts"][0]["items"][0]["state"] == "out of time"


def test_the_table_of_parts():
    said = dict(re.findall(r"^    (\w+) +(\d+) %", command.__doc__, re.MULTILINE))
    assert said == {name: str(share) for name, (share, _) in command.PARTS.items()}
    assert sum(share for share, _ in command.PARTS.values()) == 100


# ---- what is told

def test_results_are_strict_json_whatever_was_measured(tmp_path):
    append(tmp_path / "facts.jsonl", "a case", "done", row={"ms": float("inf"), "of roofline": 0.25, "n": float("nan")})
    append(tmp_path / "facts.jsonl", "a case | compiled", "done", row={"x compiled": 1234.5})
    with (tmp_path / "facts.jsonl").open("a") as file:
        file.write('{"item": "half a li')
    Report(tmp_path, "a command", False, [PartState("facts", "Words.")]).write()
    assert told(tmp_path)["parts"][0]["items"][0]["row"]["ms"] == "inf"
    table = "| ms | of roofline | n | x compiled |\n|---|---|---|---|\n| inf | 25% | nan | 1,234 |"
    assert table in (tmp_path / "results.md").read_text()


# ---- the tests of the kernels

TESTS = """
import os, pytest
def test_one(): pass
def test_two(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
def test_three(): os.kill(os.getpid(), 9)
def test_four(): assert 1 == 2
@pytest.mark.skip
def test_five(): pass
def test_six(): pass
"""


@pytest.mark.slow
def test_tests_go_on_in_a_new_process_behind_one_that_spoils_the_gpu_or_dies(tmp_path):
    (tmp_path / "test_some.py").write_text(TESTS)
    file = checks.File(tmp_path / "test_some.py", tmp_path / "some.jsonl", "not slow", False)
    while not file.over():
        time.sleep(0.05)
    row = file.row()
    assert (row["passed"], row["failed"], row["skipped"], row["starts"]) == (2, 3, 1, 3), file.output.read_text()
    two, three, four = file.failures()
    assert "illegal memory access" in two and "ended with -9" in three and "assert 1 == 2" in four


def test_the_tests_of_every_kernel_are_run(tmp_path):
    names = [path.stem for path in checks.files(Setting(tmp_path, 0, False))]
    there = {path.stem for path in (ROOT / "tests/kernels").glob("test_*.py")}
    assert names[0] == "test_attention" and set(names) == there - {"test_compiled"}


# ---- figures

def test_bytes_a_token():
    """Llama-3.2-1B has 1,235,814,400 weights, of which one matrix is embedding and head; 16 layers of 8 heads of 64."""
    with torch.device("meta"):
        model = Decoder(preset("llama-1b")).bfloat16()
    model.tie()
    assert decode.bytes_a_token(model, 0) == 2 * 1_235_814_400
    assert decode.bytes_a_token(model, 100) == 2 * 1_235_814_400 + 100 * 16 * 2 * 8 * 64 * 2
    toy = Decoder(decode.DRY["toy"]())
    whole = decode.bytes_a_token(toy, 0)
    matrices = sum(x.numel() for name, x in toy.named_parameters() if name.startswith("layers") and x.ndim == 2)
    scales = sum(len(x) for name, x in toy.named_parameters() if name.startswith("layers") and x.ndim == 2)
    assert decode.bytes_a_token(quantize(toy, 8), 0) == whole - 3 * matrices + 4 * scales
    with torch.device("meta"):
        untied = Decoder(preset("llama-8b"))                    # of the embedding a token reads one row: it is left out
    assert decode.bytes_a_token(untied, 0) == 4 * (8_030_261_248 - 128256 * 4096)


def test_the_shapes_are_those_of_the_models():
    """Parameters as their model cards count them."""
    counts = {}
    for name, config in decode.SHAPES.items():
        with torch.device("meta"):
            model = Decoder(config())
        counts[name] = sum(p.numel() for p in model.parameters())
    assert counts == {"Llama-3.2-1B": 1_235_814_400, "Qwen2.5-0.5B": 494_032_768, "Llama-3-8B": 8_030_261_248}


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="says what to do without a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path)], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 1 and "needs an NVIDIA GPU" in done.stderr and "Traceback" not in done.stderr


def test_a_wrong_option_is_told(tmp_path):
    wrong = (["--parts", "facts,nothing"], "there is no 'nothing'"), (["--minutes", "0"], "more than 0")
    for options, words in wrong:
        done = subprocess.run([sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path), *options], cwd=ROOT,
                              capture_output=True, text=True, env=os.environ)
        assert done.returncode == 2 and words in done.stderr and not list(tmp_path.iterdir())
