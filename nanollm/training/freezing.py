"""Freezing: some parameters are trained, the others stay as they are, to the bit.

    trained      ∂L/∂w is computed, and the optimizer keeps its state (AdamW: two numbers for each)
    frozen       requires_grad is False: no gradient, no state, no weight decay

        --freeze PART …       freezes what has one of these parts between the dots of its name
        --train-last N        freezes all but the last N layers, the final norm and the head
        --expand N            freezes all but the new layers (growing.py), unless --expand-all

    layers.3.mixer.q.weight       "mixer", "q", "layers.3" and "mixer.q" are parts of it, "layer" is none

The backward pass ends at the first layer that has something to train. That is what makes --train-last cheap: of L
layers, N are passed backwards (Lee et al. 2019, arXiv 1911.03090: the last quarter of BERT's layers is enough for 90 %
of the quality). A tied head is the embedding: --train-last then trains both.
"""

import argparse
import re
from collections.abc import Collection

from torch import nn

from nanollm.errors import InputError
from nanollm.model import Decoder
from nanollm.training.growing import new_layers


def freeze(model: Decoder, options: argparse.Namespace) -> None:
    """Freeze what the options say, in place. To call before the model is sharded. Raises InputError for a part that no
    name has, for more layers than there are, and where nothing would be trained."""
    if options.freeze:
        freeze_parts(model, options.freeze)
    if options.train_last:
        train_last(model, options.train_last)
    if options.expand and not options.expand_all:
        train_layers(model, new_layers(len(model.layers), options.expand))
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError("nothing would be trained: --freeze, --train-last and --expand together freeze every "
                         "parameter")


def freeze_parts(model: nn.Module, parts: Collection[str]) -> None:
    """Freeze every parameter whose name has one of `parts` between its dots. Raises InputError for one that no name
    has."""
    named = dict(model.named_parameters(remove_duplicate=False))        # a tied head under both of its names
    for part in parts:
        found = [name for name in named if f".{part}." in f".{name}."]
        if not found:
            raise InputError(f"--freeze {part}: no parameter has this between the dots of its name; there are "
                             f"{', '.join(known_parts(named))}")
        for name in found:
            named[name].requires_grad_(False)


def known_parts(names: Collection[str]) -> list[str]:
    """The parts of names, each once, layers as layers.0 … layers.29."""
    layers = [int(found[1]) for name in names if (found := re.match(r"layers\.(\d+)\.", name))]
    parts = dict.fromkeys(part for name in names for part in name.split(".") if not part.isdigit())
    return [f"layers.{min(layers)} … layers.{max(layers)}" if part == "layers" and layers else part for part in parts]


def train_last(model: Decoder, count: int) -> None:
    """Freeze all but the last `count` layers, the final norm and the head."""
    depth = len(model.layers)
    if count > depth:
        raise InputError(f"--train-last {count}: the model has {depth} layers")
    kept = {*model.norm.parameters(), *model.head.parameters()}
    kept |= added(model)
    kept |= {p for layer in list(model.layers)[depth - count :] for p in layer.parameters()}
    for p in set(model.parameters()) - kept:
        p.requires_grad_(False)


def train_layers(model: Decoder, numbers: Collection[int]) -> None:
    """Freeze all but these layers."""
    kept = added(model) | {p for number in numbers for p in model.layers[number].parameters()}
    for p in set(model.parameters()) - kept:
        p.requires_grad_(False)


def added(model: Decoder) -> set[nn.Parameter]:
    """What a method added to the model, and is always trained: the score of a reward model, the value head of PPO."""
    return {p for name, p in model.named_parameters() if name.startswith(("score.", "value."))}
