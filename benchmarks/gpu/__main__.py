"""All that a session on one GPU has to find out, in one command that can be stopped at any moment.

    python -m benchmarks.gpu --minutes 8 --out DIR                      all parts
    python -m benchmarks.gpu --minutes 5 --out DIR --parts decode,facts some; they run in the order of the table
    python -m benchmarks.gpu --minutes 1 --out DIR --dry-run            all parts in tiny shapes on a CPU: does it run?

    part        of the time    what
    facts            5 %       the machine; copy bandwidth and product rate, the roofline of all below
    checks          22 %       tests/kernels on the device
    kernels         25 %       each kernel: share of the roofline, beside eager PyTorch and torch.compile
    tuning          12 %       the kernels furthest from the roofline, tuned; the tables in DIR/tuning
    decode          20 %       three models, 16, 8 and 4 bits: eager, CUDA graph, torch.compile; share of bandwidth
    training        16 %       steps of a 1B model: MFU and peak memory, with and without kernels

What a part does not use is left to those behind it. Each part is a process (items.py), so neither an error nor a GPU
that stops answering takes the others along; one that dies is started again behind the item in which it died, and one
whose time is over is killed. DIR/results.json and DIR/results.md are rewritten after each result, as a whole.
"""

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.lines import append, ended, lines
from benchmarks.gpu.report import PartState, Report

ROOT = Path(__file__).parent.parent.parent
PARTS = {                                               # name: share of the time, what it does
    "facts": (5, "The machine, and what it reaches."),
    "checks": (22, "tests/kernels on the device."),
    "kernels": (25, "Each operation beside PyTorch; shares are of the roofline, above 1 x we are faster."),
    "tuning": (12, "The kernels furthest from the roofline; the tables are in the folder tuning."),
    "decode": (20, "One sequence, random weights, a prompt of 512 tokens."),
    "training": (16, "Whole steps of a 1B model in bfloat16."),
}
GRACE = 2.0                                             # seconds between a part's deadline and its end
STARTS = 12                                             # processes of one part
# of a dry run: kernels run in Triton's interpreter, and torch.compile returns what it is given
DRY = {"TRITON_INTERPRET": "1", "TORCH_COMPILE_DISABLE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8, metavar="M", help="when all must be over (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results: a new one")
    parser.add_argument("--parts", metavar="NAME,…", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--child", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = options.parts.split(",") if options.parts else list(PARTS)
    if wrong := [name for name in names if name not in PARTS]:
        parser.error(f"--parts: there is no {wrong[0]!r}; there are {', '.join(PARTS)}")
    options.chosen = [name for name in PARTS if name in names]
    if options.minutes <= 0:
        parser.error(f"--minutes {options.minutes}: expected more than 0")
    if not options.child and (options.out / "results.json").exists():
        parser.error(f"--out {options.out}: it has the results of another session; give a new folder")
    return options


@dataclass
class Session:
    """The process that starts the others, and tells what they find."""
    options: argparse.Namespace
    report: Report
    deadline: float
    running: subprocess.Popen | None = None

    def run(self) -> None:
        parts = self.report.parts
        for n, part in enumerate(parts):
            left = self.deadline - time.time()
            part.allotted = max(0.0, left) * PARTS[part.name][0] / sum(PARTS[each.name][0] for each in parts[n:])
            self.play(part, time.time() + part.allotted)
        self.report.state = "done"

    def play(self, part: PartState, deadline: float) -> None:
        """One part: processes, until it is done or its time is over."""
        start, file = time.time(), self.report.out / f"{part.name}.jsonl"
        part.state = "running"
        while part.state == "running":
            part.starts += 1
            self.watch(part, start, deadline)
            begun = [name for name, line in ended(lines(file)).items() if line["state"] in ("begun", "so far")]
            code = self.running.returncode if self.running else 0
            out_of_time = time.time() > deadline
            words = "out of time" if out_of_time else f"died: the process ended with {code}"
            for name in begun:
                append(file, name, words, error="" if out_of_time else self.last_words(part))
            if out_of_time:
                part.state = "out of time"
            elif code == 0:
                states = {line["state"] for line in ended(lines(file)).values()}
                part.state = "out of time" if states & {"no time", "out of time"} else "done"
            elif not begun and code == 1 or part.starts >= STARTS:              # it failed outside of its items
                part.state, part.problem = "failed", self.last_words(part)
        part.seconds = time.time() - start
        self.tell()

    def watch(self, part: PartState, start: float, deadline: float) -> None:
        """Start a process and rewrite the results whenever it has told something, until it ends or is killed."""
        asked = [sys.executable, "-m", "benchmarks.gpu", "--child", part.name, "--deadline", str(deadline), "--out",
                 str(self.report.out.resolve()), *["--dry-run"] * self.report.dry]
        environment = os.environ | {"PYTHONUNBUFFERED": "1"} | (DRY if self.report.dry else {})
        file, size = self.report.out / f"{part.name}.jsonl", -1
        with (self.report.out / f"{part.name}.log").open("ab") as log:
            self.running = subprocess.Popen(asked, cwd=ROOT, env=environment, stdout=log, stderr=log,
                                            start_new_session=True)
        try:
            while self.running.poll() is None and time.time() < deadline + GRACE:
                if (now := file.stat().st_size if file.exists() else 0) != size:
                    size, part.seconds = now, time.time() - start
                    self.tell()
                time.sleep(0.2)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.running.pid, signal.SIGKILL)     # whatever it has left behind, too
            self.running.wait()

    def last_words(self, part: PartState) -> str:
        """The end of what a part has printed."""
        return (self.report.out / f"{part.name}.log").read_text(errors="replace")[-3000:]

    def tell(self) -> None:
        self.report.write()


def has_gpu() -> bool:
    import torch  # a dry run's own process does without

    return torch.cuda.is_available() and torch.version.cuda is not None


def stop(number: int, frame: object) -> None:
    """SIGTERM, as Ctrl-C."""
    raise KeyboardInterrupt


def main() -> None:
    options = parse()
    if options.child:
        from benchmarks.gpu.items import be_child  # it imports torch
        be_child(options.child, options.out, options.deadline, options.dry_run)
    if not options.dry_run and not has_gpu():
        sys.exit("benchmarks.gpu needs an NVIDIA GPU, and torch sees none here; --dry-run runs tiny shapes on a CPU")
    options.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, stop)
    parts = [PartState(name, PARTS[name][1]) for name in options.chosen]
    report = Report(options.out, f"python -m benchmarks.gpu {shlex.join(sys.argv[1:])}", options.dry_run, parts)
    session = Session(options, report, time.time() + 60 * options.minutes)
    report.write()
    try:
        session.run()
    except KeyboardInterrupt:
        report.state = "stopped"
        sys.exit(130)
    finally:
        for part in parts:
            part.state = "stopped" if part.state == "running" else part.state
        report.write()
        print((options.out / "results.md").read_text())


if __name__ == "__main__":
    main()
