"""In what a model differs from Llama, in words: its config beside that of a plain layer of the same sizes.

    x += attention(RMSNorm(x));  x += down(silu(gate(h)) · up(h)),  h = RMSNorm(x)          then RMSNorm, and a head

Sizes are no difference (heads, widths, θ, ε, how many layers). Every other field of a config that is not at its default
has its words in WORDS, of its module or below, and a test asks for them; a part of another class is described in the
words that the class itself begins with.
"""

import dataclasses
import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from checkpoints.show.drawing import PARTS, WIDTH, Kind, brief
from nanollm.config import MLP, Attention, Mixer, ModelConfig, MoE, Norm, Positions, Rope, Sines
from nanollm.layers import MODULES

SIZES = frozenset("""
    vocab dim layers context heads kv_heads head_dim hidden eps theta
    Layer.mixer Layer.ffn Indexer.top ClippedGLU.slope ClippedGLU.limit
""".split())                                                # a Llama has them too, or they are said with the part

PLACES = {
    "pre_mixer": "norm before the mixer", "post_mixer": "norm after the mixer",
    "pre_ffn": "norm before the feed-forward", "post_ffn": "norm after the feed-forward",
    "final_norm": "last norm", "embed_norm": "norm of the embedding", "qk_norm": "norm of q and k",
    "mixer": "mixer", "rope": "rotation", "ffn": "feed-forward", "model": "model", "layer": "wiring",
}
WORDS: dict[str, str | dict[Any, str]] = {
    "Norm.kind": {"layer": "LayerNorm: the mean is taken out", "rms_outer": "ε stands outside the root"},
    "Norm.offset": "the gain is stored less {}",
    "Norm.cast_after_gain": "rounded after the gain, not before it",
    "Norm.bias": "a bias",
    "Norm.gain": "no gain",
    "Norm.scope": {"each": "a gain for each head", "all": "over all heads as one vector",
                   "rotated": "after the rotation"},
    "Indexer.layout": {"interleaved": "neighbouring channels turn together"},
    "Alibi.coarse": "its penalties rounded to bfloat16",
    "Rope.layout": {"interleaved": "neighbouring channels turn together (2j, 2j + 1), not (j, j + d/2)"},
    "Rope.rounds": {"tables": "cos, sin and the result are rounded, the products are not",
                    "result": "only the result is rounded"},
    "Rope.fraction": "only the first {} of each head turns",
    "Rope.scaling": "angles stretched for longer contexts: {}",
    "Layer.residual_scale": "what mixer and feed-forward add to the stream times {}",
    "Layer.end": "ends with {}",
    "PerLayerInput.norm": "made of the embedding, and normalised",
    "LayerEnd.inputs": "reads {}",
    "LayerEnd.norm": "norm of what it adds",
    "PerLayerInput.activation": "{} in place of gelu_tanh",
    "Layer.parallel": "mixer and feed-forward read the same x and are added together",
    "ModelConfig.tied": "the head is the embedding",
    "ModelConfig.float32_residual": "what the layers add up is kept in float32",
    "ModelConfig.embed_scale": "the embedding times {}",
    "ModelConfig.positions": {
        int: "a learned table of {} positions is added to the embedding",
        Positions: "a learned table of {} is added to the embedding",
        Sines: "sines and cosines of the position are added to the embedding"},
    "ModelConfig.head_bias": "a bias on the head",
    "ModelConfig.head_scale": "logits times {}",
    "ModelConfig.head_softcap": "logits become {0}·tanh(logit / {0})",
    "ModelConfig.unit_head": "every row of the head is brought to length 1",
}


def different(config: ModelConfig, kinds: Sequence[Kind]) -> list[str]:
    """Each difference: in which layers if not in all, where, and what. Places that differ alike are said together."""
    said: dict[tuple[str, str], list[str]] = {}                         # (place, words) → kinds of layers
    found: dict[tuple[str, str], dict[str, None]] = {}                  # (which layers, words) → places, in order
    for kind in kinds:
        for place, words in of_layer(kind.layer, config.dim):
            said.setdefault((place, words), []).append(kind.name)
    for (place, words), where in said.items():
        layers = ""
        if len(where) < len(kinds):
            layers = ", ".join(where) if len(where) < 4 else f"{len(where)} of {len(kinds)} kinds"
        found.setdefault((layers, words), {})[PLACES[place]] = None
    for place, words in of_model(config):
        found.setdefault(("", words), {})[PLACES[place]] = None
    lines = [f"{f'[{layers}] ' if layers else ''}{', '.join(places)}: {words}"
             for (layers, words), places in found.items()]
    wrapped = [textwrap.wrap(line, WIDTH - 2, subsequent_indent="    ", break_on_hyphens=False) for line in lines]
    return ["\n".join(parts) for parts in wrapped] or ["in nothing"]


def of_layer(layer: Any, dim: int) -> Iterator[tuple[str, str]]:
    """(place, words) of one layer."""
    yield from (("layer", words) for words in fields(layer, skip=PARTS))
    for place in PARTS:
        part = getattr(layer, place)
        if place == "mixer":
            yield from of_mixer(part, dim)
        elif place == "ffn":
            yield from of_ffn(part)
        else:
            branch = {"pre_mixer": layer.mixer, "pre_ffn": layer.ffn}.get(place)
            expected = branch is not None
            yield from of_norm(place, part, expected)


def of_mixer(mixer: Any, dim: int) -> Iterator[tuple[str, str]]:
    """Attention against attention, anything else by what its class says of itself; a kind of attention by both."""
    if mixer is None:
        yield "mixer", "none, the feed-forward is all"
        return
    if type(mixer) is not Attention:
        yield "mixer", f"{type(mixer).__name__} in place of attention: {purpose(mixer)}"
    if not isinstance(mixer, Attention):
        yield from (("mixer", words) for words in fields(mixer))
        for part in (getattr(mixer, field.name) for field in dataclasses.fields(mixer)):
            if isinstance(part, Attention):
                yield from of_mixer(part, dim)
            elif isinstance(part, Mixer):
                yield "mixer", f"{type(part).__name__}: {purpose(part)}"
                yield from (("mixer", words) for words in fields(part))
            elif isinstance(part, Rope):
                yield from (("rope", words) for words in fields(part))
    else:
        if mixer.heads * mixer.head_dim != dim:
            yield "mixer", f"the heads are {mixer.heads * mixer.head_dim} wide together, the stream {dim}"
        yield from (("mixer", words) for words in fields(mixer, skip=("qk_norm", "rope")))
        rotation = ["none, q and k stay as they are"] if mixer.rope is None else fields(mixer.rope)
        yield from (("rope", words) for words in rotation)
        yield from of_norm("qk_norm", mixer.qk_norm, expected=False)


def of_ffn(ffn: Any) -> Iterator[tuple[str, str]]:
    """An MLP against SwiGLU."""
    if ffn is None:
        yield "ffn", "none, the mixer is all"
    elif isinstance(ffn, MLP):
        yield from (("ffn", words) for words in fields(ffn))
    else:
        what = f"{ffn.top_k} of {ffn.experts} experts a token" if isinstance(ffn, MoE) else purpose(ffn)
        if isinstance(ffn, MoE) and not isinstance(ffn.expert, MLP):
            what += f", each {purpose(ffn.expert)}"
        yield "ffn", "; ".join([f"{type(ffn).__name__} in place of an MLP: {what}", *fields(ffn)])


def of_norm(place: str, norm: Norm | None, expected: bool) -> Iterator[tuple[str, str]]:
    """A norm where Llama has one, or where it has none."""
    if norm is None:
        yield from [(place, "none")] * expected
        return
    words = ", ".join(fields(norm))
    if words or not expected:
        yield place, words if expected else (f"there is one, {words}" if words else "there is one")


def of_model(config: ModelConfig) -> Iterator[tuple[str, str]]:
    """What surrounds the layers."""
    yield from (("model", words) for words in fields(config, skip=("final_norm", "embed_norm")))
    yield from of_norm("embed_norm", config.embed_norm, expected=False)
    yield from of_norm("final_norm", config.final_norm, expected=True)


def words_of(kind: type) -> dict[str, Any]:
    """The words for the fields of a class of the config: its module's, or the ones above."""
    module = MODULES.get(kind)
    if module is None:
        return WORDS
    return {f"{kind.__name__}.{field}": words for field, words in getattr(module, "WORDS", {}).items()}


def fields(owner: Any, skip: Sequence[str] = ()) -> Iterator[str]:
    """The words for each field that is not at its default, and no size."""
    known = words_of(type(owner))
    for field in dataclasses.fields(owner):
        value, name = getattr(owner, field.name), f"{type(owner).__name__}.{field.name}"
        needed = field.default is dataclasses.MISSING       # said only where it is a choice, and taken
        usual = value == field.default or (needed and (name not in known or value is False))
        if usual or field.name in skip or SIZES & {name, field.name}:
            continue
        words = known.get(name, f"{field.name} {{}}")
        text = words.get(value, words.get(type(value))) if isinstance(words, dict) else words
        yield str(text).format(brief(value))
        if field.name == "alibi":
            yield from fields(value)


def purpose(part: Any) -> str:
    """What a class's docstring begins with, without the file that it names: selective state space, first generation."""
    whole = re.sub(r",? \w+\.py\b", "", " ".join((type(part).__doc__ or "").split()))
    said = whole.replace(";", ". ").split(". ")[0].rstrip(".")
    return said[:1].lower() + said[1:]
