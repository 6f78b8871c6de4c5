"""What every test runs under: one thread, no network, kernels interpreted where there is no GPU, the same seed.

    NANOLLM_TEST_THREADS=2      threads of torch: tiny models gain nothing from a second one, two pytest workers do
    NANOLLM_TEST_ONEDNN=0       without oneDNN, the library that takes matrix products on most CPUs

The bounds of the tests hold whatever these say, and on any processor.
"""

import contextlib
import gc
import os
import signal
import sys
from collections.abc import Iterator

THREADS = os.environ.get("NANOLLM_TEST_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"                      # no test touches the network
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = THREADS                 # of the processes that tests start: idle threads spin

import pytest
import torch

if not torch.cuda.is_available():                       # read when triton is imported: kernels run in its interpreter
    os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(int(THREADS))
torch.backends.mkldnn.enabled = os.environ.get("NANOLLM_TEST_ONEDNN", "1") != "0"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """What takes longest comes first, so that all workers end together. Files stay whole: tests of one share runs."""
    files = {"test_resume": 1, "test_distributed": 2, "test_decoder": 3}
    items.sort(key=lambda item: 0 if item.name == "test_the_demo_beats_gzip_far" else files.get(item.path.stem, 4))


def pytest_collection_finish():
    """Spare Python the search for garbage among the million objects of what was imported: a tenth of all time. A run of
    the trainer in this process would undo that at its end, and a picture of its losses takes as long as its steps."""
    if runs := sys.modules.get("nanollm.training.runs"):
        runs.gc_frozen = contextlib.nullcontext
    if log := sys.modules.get("nanollm.training.log"):
        log.loss_curve = lambda *_: True                # test_train.py puts it back, and looks at the picture
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)


def pytest_sessionfinish():
    gc.unfreeze()


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    """torch.manual_seed(0), which without a GPU takes half a millisecond to note who asked for the seed."""
    torch.manual_seed(0) if torch.cuda.is_available() else torch.default_generator.manual_seed(0)


@pytest.fixture
def ctrl_c_heard() -> Iterator[None]:
    """Ctrl-C is KeyboardInterrupt, as in a terminal. What a shell starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
