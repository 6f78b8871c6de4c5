"""Tensors that do not fit: one missing, one more, one of another shape or type, one that is not finite.

All of it in each of these lineages. A new family joins them if it arranges its tensors in a way that none of them has.
"""

import functools
import math
from typing import Any

import torch
from torch import Tensor

import checkpoints
from tests.fixtures import FIXTURES
from tests.hostile.good import Case, Group, Harm, weights
from tests.oracles import write


def largest(found: dict[str, Tensor]) -> str:
    return max(found, key=lambda name: (found[name].numel(), name))


def smallest(found: dict[str, Tensor]) -> str:
    return min(found, key=lambda name: (found[name].numel(), name))


def to(choose: Any, change: Any) -> Harm:
    """One tensor becomes `change` of it."""
    def harm(found: dict[str, Tensor]) -> None:
        name = choose(found)
        found[name] = change(found[name]).contiguous()
    return weights(harm)


def with_one(value: float, place: int) -> Any:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[place] = value
        return tensor
    return change


NOT_FINITE = "holds a NaN or an infinity as float32"
CASES: dict[str, Case] = {
    "the largest missing": (weights(lambda found: found.pop(largest(found))), "1 missing:\n    "),
    "the smallest missing": (weights(lambda found: found.pop(smallest(found))), "1 missing:\n    "),
    "all missing but one": (
        weights(lambda found: [found.pop(name) for name in list(found)[1:]]),
        r"missing|num_hidden_layers is|n_layers? is|layer.* is|expert.* is|is \d+; expected",
    ),
    "two more": (
        weights(lambda found: found.update({"extra.one": torch.ones(2), "extra.two": torch.ones(2)})),
        "2 unexpected .*:\n    extra.one\n    extra.two",
    ),
    "one under another name": (
        weights(lambda found: found.update({"renamed": found.pop(largest(found))})),
        "1 missing:\n    .*\n  1 unexpected .*:\n    renamed",
    ),
    "a row fewer": (to(largest, lambda tensor: tensor[1:]), "1 of another shape:\n    "),
    "turned": (to(largest, lambda tensor: tensor.transpose(0, -1)), "1 of another shape:\n    |1 unexpected"),
    "one more dimension": (to(smallest, lambda tensor: tensor[None]), "1 of another shape:\n    "),
    "of no dimension": (to(smallest, lambda tensor: tensor.view(-1)[0].clone()), "1 of another shape:\n    "),
    "of int8": (to(largest, lambda tensor: tensor.to(torch.int8)), "(?s)of another type:.*: int8 stored"),
    "of bool": (to(smallest, lambda tensor: tensor > 0), "(?s)of another type:.*: bool stored"),
    "of float8": (
        to(largest, lambda tensor: tensor.to(torch.float8_e4m3fn)), "(?s)of another type:.*: float8_e4m3fn stored",
    ),
    "a NaN at the start": (to(largest, with_one(math.nan, 0)), NOT_FINITE),
    "a NaN at the end": (to(smallest, with_one(math.nan, -1)), NOT_FINITE),
    "∞": (to(largest, with_one(math.inf, -1)), NOT_FINITE),
    "−∞": (to(smallest, with_one(-math.inf, 0)), NOT_FINITE),
}


def lineage(name: str) -> Group:
    return Group(f"tensors of {name}", functools.partial(write, FIXTURES[name]), checkpoints.load, CASES, folder=True)


LINEAGES = (
    "llama-3.1", "llama-3.2", "mistral-v0.1", "mixtral-8x22b", "qwen2-sliding", "qwen3-sliding", "gemma-7b",
    "gemma2-27b", "gemma3-27b", "phi-2", "phi-qk-norm", "phi-4-mini", "falcon-40b", "falcon-11b", "falcon-rw-1b",
    "gpt-neox-20b", "redpajama-incite", "gpt2-stanford", "starcoder", "bloom-7b1", "mpt-clipped", "olmo-1.7-7b",
    "olmo2-7b", "olmoe-clipped", "starcoder2-15b", "stablelm-2-1.6b", "stablelm-2-12b", "command-r-plus", "command-a",
    "persimmon-8b", "glm-4-9b-hf", "glm-4-9b-0414", "chatglm2-6b", "internlm-7b", "baichuan-7b", "qwen-7b-2023-08",
    "qwen2-moe-sliding", "qwen3-moe-mixed", "deepseek-v2", "deepseek-v3", "phi-moe-window", "gpt-oss-full-first",
    "mamba-biases", "falcon-mamba-7b", "codestral-mamba", "mamba2-limits", "jamba-v0.1", "recurrentgemma-narrow",
    "rwkv-4", "stripedhyena-7b", "yuan2-2b",
)
GROUPS = {f"tensors {name}": lineage(name) for name in LINEAGES}
