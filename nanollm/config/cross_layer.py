"""Attention whose values are normalised, attention to what a layer before keeps, and the end of a layer, as data.

Each class names the file of nanollm/layers that explains it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nanollm.config.checks import Part, need, need_sizes
from nanollm.config.parts import ACTIVATIONS, Activation, Attention, Norm


@dataclass(frozen=True)
class NormedValueAttention(Attention):
    """Attention whose values are normalised, and may be what the keys are made of, normed_values.py."""
    value_norm: Norm = Norm(gain=False)     # of every head of v
    values_are_keys: bool = False           # v is k before its norm and rotation, and has no matrix; Gemma 4 31B's
                                            # layers without a window
    kept: bool = False                      # later layers with this window attend to its keys and values; of E2B's 15
                                            # layers that have their own the last sliding and the last full one

    def __post_init__(self) -> None:
        super().__post_init__()
        need_plain(self)
        need(self.value_norm.scope == "head", self, "value_norm", "a norm whose scope is 'head'")


@dataclass(frozen=True)
class CrossLayerAttention(Attention):
    """Attention to the keys and values that the nearest layer before with this window keeps, cross_layer.py."""

    def __post_init__(self) -> None:
        super().__post_init__()
        need_plain(self)


def need_plain(owner: Attention) -> None:
    """What neither of them has."""
    plain = owner.clip is None and not owner.sinks and owner.alibi is None and owner.growth is None
    need(plain, owner, "clip", "None, as alibi, growth and sinks")
    need(owner.qk_norm is None or owner.qk_norm.scope == "head", owner, "qk_norm", "a norm whose scope is 'head'")


@dataclass(frozen=True)
class PerLayerInput(Part):
    """A short vector a token that each layer has for itself, per_layer.py."""
    width: int                              # P, numbers in it; Gemma 4 E2B 256
    norm: Norm = Norm()                     # of its part that is made of the embedding
    activation: Activation = "gelu_tanh"    # of the gate of the stream that it is multiplied by

    def __post_init__(self) -> None:
        need_sizes(self, "width")
        need(self.activation in ACTIVATIONS, self, "activation", f"one of {', '.join(ACTIVATIONS)}")
        need(self.norm.scope == "head", self, "norm", "a norm whose scope is 'head'")


@dataclass(frozen=True)
class LayerEnd(Part):
    """What is done with the stream at the end of a layer: it is multiplied by a learned number, layer_end.py."""
    inputs: PerLayerInput | None = None     # before that a vector of the layer's own is read; None: nothing is
    norm: Norm | None = None                # of what that adds

    def __post_init__(self) -> None:
        need(self.norm is None or (self.inputs is not None and self.norm.scope == "head"), self, "norm",
             "None where there are no inputs, or a norm whose scope is 'head'")


def need_sources(layers: Sequence[Any]) -> None:
    """Layers that attend to what a layer before keeps must find it there, in heads of the same number and width; and of
    PerLayerInput a model has one."""
    kept: dict[int | None, Attention] = {}
    for layer in layers:
        mixer = layer.mixer
        if isinstance(mixer, NormedValueAttention) and mixer.kept:
            kept[mixer.window] = mixer
        if isinstance(mixer, CrossLayerAttention):
            source = kept.get(mixer.window)
            alike = source is not None and (source.kv_heads, source.head_dim) == (mixer.kv_heads, mixer.head_dim)
            need(alike, mixer, "window", "that of a layer before that keeps as many keys and values, as wide")
    inputs = {layer.end.inputs for layer in layers if layer.end is not None} - {None}
    if len(inputs) > 1:
        need(False, inputs.pop(), "width", "the same PerLayerInput in all layers that have one")
