"""The decoder of a config on the meta device, with what each of its modules was made from, and what is left of it."""

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from checkpoints.flatten.constants import Constants
from checkpoints.flatten.sources import is_ours
from checkpoints.flatten.values import World
from checkpoints.flatten.write import PLACE, Writer
from nanollm.config import ModelConfig
from nanollm.errors import ConfigError
from nanollm.layers.linear import Linear
from nanollm.model import Decoder


@contextlib.contextmanager
def recorded() -> Iterator[dict[int, dict[type, World]]]:
    """Note what the __init__ of each module class is given inside the block."""
    made: dict[int, dict[type, World]] = {}
    originals: dict[type, Any] = {}

    def subclasses(kind: type) -> Iterator[type]:
        one: type
        for one in kind.__subclasses__():
            yield one
            yield from subclasses(one)

    def wrap(kind: type, init: Any) -> Any:
        signature = inspect.signature(init)

        @functools.wraps(init)
        def run(self: nn.Module, *args: Any, **named: Any) -> None:
            bound = signature.bind(self, *args, **named)
            bound.apply_defaults()
            made.setdefault(id(self), {})[kind] = {k: v for k, v in bound.arguments.items() if k != "self"}
            init(self, *args, **named)

        return run

    try:
        for kind in {one for one in subclasses(nn.Module) if is_ours(one) and one is not Linear}:
            if "__init__" in vars(kind):
                originals[kind] = vars(kind)["__init__"]
                kind.__init__ = wrap(kind, originals[kind])     # type: ignore[misc]  # restored below
        yield made
    finally:
        for kind, init in originals.items():
            kind.__init__ = init                                # type: ignore[misc]


def prepared(config: ModelConfig) -> Writer:
    """All that is left of the decoder of a config."""
    with recorded() as made, torch.device("meta"):
        model = Decoder(config)
    kinds = list(dict.fromkeys(config.layers))
    first = {kind: config.layers.index(kind) for kind in kinds}
    writer = Writer(model, [model.layers[first[kind]] for kind in kinds], made, Constants(config))
    writer.kind_of_layer = [kinds.index(layer) for layer in config.layers]
    writer.settle()
    for index, layer in enumerate(model.layers):
        if any(getattr(one, PLACE) != index for one in layer.modules() if writer.has_place(one)):
            raise ConfigError("some layers have a vector of their own and others none; a flattened file counts all")
    return writer
