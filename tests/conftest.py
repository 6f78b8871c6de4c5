"""Tiny models gain nothing from threads; two pytest workers on two cores do."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"                      # no test touches the network
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    torch.manual_seed(0)
