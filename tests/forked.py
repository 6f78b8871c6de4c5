"""Processes without the wait for Python and torch: each is forked from a server that has imported what they need, and
has run none of it.

    ended = forked.start(2, train.run, "--out", folder, …).end()   as torchrun --nproc-per-node 2 train.py --out … would
    ended.codes, ended.said                                         [0, 0], and all they wrote

A new process takes 2 to 3 seconds of a core before the first line of train.py runs, and the agent of torchrun takes
as many: most of what tests of many ranks cost. Here each pytest worker pays that once (multiprocessing's
"forkserver"). The server has a single thread and no group of processes, so what is forked from it is as good as new;
gloo, autograd and the checkpoint's thread begin in the rank itself.

What torchrun does for its ranks is done here too: the variables of the environment; a store outside of all ranks, on
127.0.0.1; where one
ends badly the others are sent SIGTERM, and 30 seconds later SIGKILL. A single process gets none of that, as python
train.py gets none.
What torchrun says, how it hands signals on, and what it leaves behind when it is killed are tested with torchrun.
"""

import contextlib
import gc
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import connection, forkserver
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from nanollm import cli
from nanollm.training import log, runs

ROOT = Path(__file__).parent.parent
# train comes first: it says how torch shall take memory. The last line is what a run imports on its way.
IMPORTED = ["train", "generate", "tests.killed", "tests.ranks", "tests.forked", "torch._dynamo", "safetensors.torch"]
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(IMPORTED)


@dataclass(frozen=True)
class Ended:
    codes: list[int]            # of each rank; -9 where SIGKILL ended it
    out: str                    # of all ranks
    err: str

    @property
    def said(self) -> str:
        return self.out + self.err


class Started:
    def __init__(self, processes: list, folder: Path, store: dist.TCPStore | None) -> None:
        self.processes, self.folder, self.store = processes, folder, store

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self.processes]

    def running(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def end(self, seconds: float = 300) -> Ended:
        """Wait for all of them. Nothing of them is left, whatever happens."""
        waiting, until, asked = list(self.processes), time.monotonic() + seconds, False
        try:
            while waiting and connection.wait(
                [process.sentinel for process in waiting], max(0.0, until - time.monotonic())
            ):
                waiting = [process for process in waiting if process.is_alive()]
                if not asked and any(process.exitcode for process in self.processes):
                    asked, until = True, min(until, time.monotonic() + 30)
                    for process in waiting:
                        process.terminate()
        finally:
            for process in self.processes:
                process.kill()
                process.join()
            out, err = ((self.folder / name).read_text(errors="replace") for name in ("out", "err"))
            shutil.rmtree(self.folder)
        assert asked or not waiting, f"still at work after {seconds} seconds:\n{out}{err}"
        return Ended([process.exitcode for process in self.processes], out, err)


def start(ranks: int, function: Callable[[], None], *arguments: object, stdin: str = "", **environment: str) -> Started:
    """`function` as the main function of a script (cli.main), in so many processes, with these arguments on the
    command line."""
    folder, store, common = Path(tempfile.mkdtemp(prefix="ranks-")), None, dict(environment)
    for name, content in (("in", stdin), ("out", ""), ("err", "")):
        (folder / name).write_text(content)
    if ranks > 1:
        listener = socket.create_server(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        store = dist.TCPStore(
            "127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )
        common |= {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True",
            "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
            "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
        }
    serve()
    processes = []
    for rank in range(ranks):
        mine = common | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {})
        processes.append(context.Process(target=become, args=(function, [*map(str, arguments)], mine, folder)))
        processes[-1].start()
    return Started(processes, folder, store)


def high_water() -> int:
    """The most memory that this process has held at once, in bytes. Linux alone tells."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


def serve() -> None:
    """Start the server, if there is none: it has to find what it shall import, and reads this environment once."""
    with mock.patch.dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive"):
        forkserver.ensure_running()


def become(function: Callable[[], None], arguments: list[str], environment: dict[str, str], folder: Path) -> None:
    """In the new process: the place, the words and the files that a script started from a shell would have."""
    for number, (name, how) in enumerate(
        (("in", os.O_RDONLY), ("out", os.O_WRONLY | os.O_APPEND), ("err", os.O_WRONLY | os.O_APPEND))
    ):
        file = os.open(folder / name, how)
        os.dup2(file, number)
        os.close(file)
    run_as_script(function, arguments, environment)


def run_as_script(function: Callable[[], None], arguments: list[str], environment: dict[str, str]) -> None:
    """The same, once 0, 1 and 2 are its files."""
    gc.freeze()  # the collector need not look at, and so copy, what was imported; nor does a run, once more
    runs.gc_frozen = contextlib.nullcontext
    log.loss_curve = lambda *_: True                            # a picture takes as long as the steps of a toy
    multiprocessing.set_start_method(None, force=True)          # what it starts itself it starts as any process would
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.stdin = open(0, closefd=False)
    sys.argv = [f"{function.__module__}.py", *arguments]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    cli.main(function)
