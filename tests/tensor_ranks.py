"""What the ranks of tests/test_tensor_parallel.py run, by forked.py: a part each of model after model.

    OUT FOLDER … [--quantize KIND]      the first rank writes to OUT, as JSON, what was found of each folder
"""

import json
import sys
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

import checkpoints
import generate as script
from checkpoints.parts import load_part
from checkpoints.storage.files import Stored
from nanollm.cache import Cache
from nanollm.inference.request import Request
from nanollm.inference.sample import Sampling
from nanollm.model import Decoder
from nanollm.training.distributed import World, world

PROMPT = 40             # past every window and original context of the fixtures, with 4 tokens one by one


@torch.inference_mode()
def logits(model: Decoder) -> list[Tensor]:
    """Of one pass, and of a prompt and tokens one by one."""
    tokens = torch.randint(0, model.config.vocab, (2, PROMPT + 4), generator=torch.Generator().manual_seed(1))
    cache = Cache(model.config, 2, PROMPT + 4, torch.float32, torch.device("cpu"))
    parts = [tokens[:, :PROMPT], *tokens[:, PROMPT:].split(1, -1)]
    return [model(tokens), torch.cat([model(part, None, cache) for part in parts], 1)]


def apart(ours: Tensor, reference: Tensor) -> float:
    """As oracles.difference."""
    return ((ours - reference).abs().max() / (reference.max() - reference.min())).item()


def measured(group: World, folder: Path, quantize: str | None) -> dict | None:
    read, whole_read = 0, Stored.read_run

    def counted(stored: Stored, first: int, run: Tensor) -> None:
        nonlocal read
        read += run.nbytes * (type(stored) is Stored)
        whole_read(stored, first, run)

    with mock.patch.object(Stored, "read_run", counted):
        part = load_part(folder, group.rank, group.size, quantize=quantize)
    held = sum(parameter.nbytes for parameter in part.parameters())
    found = logits(part)
    bits = group.all_gather_objects([one.view(torch.int32).sum().item() for one in found])
    sizes = group.all_gather_objects([read, held])
    if group.rank:
        return None
    whole = checkpoints.load(folder)
    reference = logits(whole)
    error = [apart(*pair) for pair in zip(logits(checkpoints.load(folder, quantize=quantize)), reference, strict=True)]
    alike = bits == bits[:1] * len(bits)
    return {"apart": [apart(*pair) for pair in zip(found, reference, strict=True)], "alike": alike,
            "read": [one[0] for one in sizes], "held": [one[1] for one in sizes], "tied": whole.config.tied,
            "whole": sum(parameter.nbytes for parameter in whole.parameters()), "quantised": error}


def run() -> None:
    out, *folders = sys.argv[1:]
    quantize = None
    if "--quantize" in folders:
        folders, quantize = folders[:-2], folders[-1]
    with world("cpu") as group:
        found: dict = {Path(folder).name: measured(group, Path(folder), quantize) for folder in folders}
        asked = Request(None, 8 + group.rank, Sampling(temperature=1.0))        # type: ignore[arg-type]  # no tokenizer
        drawn = script.fitted_alike(asked, load_part(folders[0], group.rank, group.size), 1, 1, group)
        found["requests"] = group.all_gather_objects([drawn.max_new_tokens, drawn.sampling.seed])
        if group.rank == 0:
            Path(out).write_text(json.dumps(found))
