"""Tiny models gain nothing from threads; two pytest workers on two cores do."""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"                      # no test touches the network
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"                     # of the processes that tests start; idle threads spin, and take the core of the other worker

import pytest
import torch

if not torch.cuda.is_available():                       # read when triton is imported: kernels run in its interpreter
    os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(1)


# in the quick half these run on one fixture a lineage, or on that of every other lineage
LONG = {
    "test_bfloat16", "test_the_oracle_agrees_with_itself", "test_every_fixture_comes_back_byte_for_byte",
    "test_every_family_goes_to_our_layout_and_comes_back_byte_for_byte",
}
LONGEST = {
    "test_greedy_tokens_with_the_cache", "test_a_batch_generates_what_each_prompt_would", "test_mutants_die_or_are_explained",
    "test_bf16_in_shards", "test_without_its_origin_a_model_is_exported_all_the_same",
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """What takes longest comes first, so that all workers end together: the demo alone is a minute. Files stay whole: tests of one share runs."""
    files = {"test_resume": 1, "test_distributed": 2, "test_decoder": 3}
    items.sort(key=lambda item: 0 if item.name == "test_the_demo_beats_gzip_far" else files.get(item.path.stem, 4))
    long = [item for item in items if hasattr(item, "callspec") and item.originalname in LONG | LONGEST]
    if long:
        from tests.fixtures import QUICK
        for item in long:
            name = item.callspec.params.get("pair", item.callspec.params.get("name"))
            if name not in (QUICK if item.originalname in LONG else QUICK[::2]):
                item.add_marker(pytest.mark.slow)


def pytest_collection_finish():
    """Python need not look for garbage among the million objects of what was imported, nor after every few hundred new ones: a tenth of all time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)


def pytest_sessionfinish():
    gc.unfreeze()


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    torch.manual_seed(0)
