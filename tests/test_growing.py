"""Layers, tokens and context that a model gets before it is tuned: growing.py, against transformers."""

import argparse
import dataclasses
import json
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import checkpoints
from nanollm.config import MLP, Attention, Layer, ModelConfig, Rope
from nanollm.errors import InputError
from nanollm.model import Decoder
from nanollm.training import growing
from tests import oracles
from tests.fixtures import FIXTURES, ONCE, slow_but

NOTHING = dict(init=Path("model"), tokenizer=None, out=Path("run"), seed=0, expand=None, expand_all=False,
               grow_vocab=None, grow_from=None, add_tokens=None, rope_scaling=None, rope_factor=None)
BLOCK = Layer(Attention(4, 2, 8, Rope()), MLP(48))


def asked(**more) -> argparse.Namespace:
    return argparse.Namespace(**NOTHING | more)


def small(layers: int = 6, **more) -> Decoder:
    return Decoder(ModelConfig(61, 32, (BLOCK,) * layers, context=64, **more), seed=1).eval()


@torch.inference_mode()
def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    found = model(ids)
    return found if isinstance(found, torch.Tensor) else found.logits


def saved(model: Decoder, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("error")                      # it is written as its family, and nothing stays behind
        checkpoints.save(model, folder)
    return folder


def theirs(folder: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", experts_implementation="eager").eval()


def fixture(name: str, folder: Path) -> Decoder:
    oracles.write(FIXTURES[name], folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return checkpoints.load(folder)


# ---- LLaMA-Pro

@pytest.mark.parametrize("name", slow_but(ONCE, FIXTURES))
def test_new_layers_change_no_logit_of_any_family_by_a_bit(name, tmp_path):
    model = fixture(name, tmp_path / "model")
    ids = oracles.tokens(FIXTURES[name])
    grown = growing.grow(model, asked(expand=len(model.layers)))
    assert len(grown.layers) == 2 * len(model.layers)
    assert torch.equal(logits(grown, ids), logits(model, ids))
    # and each of them can learn: something in it has a gradient
    grown.requires_grad_(True)
    grown(ids).square().mean().backward()
    for number in growing.new_layers(len(grown.layers), len(model.layers)):
        assert max(p.grad.abs().max() for p in grown.layers[number].parameters() if p.grad is not None) > 0, number


def published_groups(layers: int, expand: int) -> list[tuple[int, bool]]:
    """The loop of LLaMA-Pro's block_expansion.py (TencentARC): which layer stands where, and whether it is new."""
    split, output = layers // expand, []
    for i in range(layers):
        output.append((i, False))
        if (i + 1) % split == 0:
            output.append((i, True))
    return output


@pytest.mark.parametrize(("layers", "expand"), [(6, 2), (6, 3), (6, 6), (6, 1), (8, 4)])
def test_new_layers_stand_where_llama_pro_puts_them(layers, expand):
    model = small(layers)
    grown = growing.grow(model, asked(expand=expand))
    expected = published_groups(layers, expand)
    assert [place for place, (_, new) in enumerate(expected) if new] == growing.new_layers(layers + expand, expand)
    for place, (number, new) in enumerate(expected):
        old = dict(model.layers[number].named_parameters())
        for name, value in grown.layers[place].named_parameters():
            zero = new and name in ("mixer.o.weight", "ffn.down.weight")
            assert torch.equal(value, torch.zeros_like(value) if zero else old[name]), (place, name)
            assert not new or value.data_ptr() != old[name].data_ptr()


def test_layers_that_do_not_come_out_even_are_spread_and_too_many_are_refused():
    assert growing.new_layers(7 + 3, 3) == [2, 5, 9]        # copies of layers 1, 3 and 6
    with pytest.raises(InputError, match="--expand 7: the model has 6 layers"):
        growing.grow(small(), asked(expand=7))


def test_a_pattern_of_layers_keeps_its_kinds():
    slides = dataclasses.replace(BLOCK, mixer=dataclasses.replace(BLOCK.mixer, window=5))
    model = Decoder(ModelConfig(61, 32, (slides, BLOCK, slides, BLOCK), context=64), seed=1).eval()
    grown = growing.grow(model, asked(expand=2))
    assert grown.config.layers == (slides, BLOCK, BLOCK, slides, BLOCK, BLOCK)


@pytest.mark.parametrize("name", ["llama-3.1", "gemma-2", "qwen3", "mixtral"])
def test_transformers_loads_the_deeper_folder_with_equal_logits(name, tmp_path):
    if name not in FIXTURES:
        pytest.fail(f"{name}: {sorted(FIXTURES)}")
    model = fixture(name, tmp_path / "model")
    grown = growing.grow(model, asked(expand=1))
    folder = saved(grown, tmp_path / "deeper")
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == len(model.layers) + 1
    ids = oracles.tokens(FIXTURES[name])
    assert oracles.difference(logits(grown, ids), logits(theirs(folder), ids)) <= FIXTURES[name].bound
    assert torch.equal(logits(checkpoints.load(folder), ids), logits(model, ids))
