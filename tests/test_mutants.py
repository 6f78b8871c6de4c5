"""Would the parity tests notice? Each config field of each distinct layer is changed: the logits must change with it.

A mutant is the loaded model with one field of its config reset to the default, or, where it has no other default,
doubled, flipped or dropped; the weights stay. It is killed if its logits leave the bound of test_parity, or if its
parameters no longer fit. A cast order shows in bfloat16 only, and is tried there. What survives is listed in
tests/mutants.txt, with the reason why nothing could notice it.

    python -m tests.test_mutants            writes that list anew
    python -m tests.test_mutants NAME …     only what it says of these fixtures
"""

import collections
import copy
import dataclasses
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

import checkpoints
from nanollm import config as c
from nanollm.errors import NanollmError
from nanollm.model import Decoder
from tests.fixtures import FIXTURES, slow_but
from tests.oracles import difference, reference_logits, tokens, write

REPORT = Path(__file__).with_name("mutants.txt")
LENGTH = 48

ONE_ROUNDING = "the stream is float32, so either order rounds once, at the end; mamba-biases kills it"
PAST_ORIGINAL = "48 tokens are past the original context, where the long list holds; test_parity at 24 tokens kills it"
ONE_STEP = "beta_fast is beta_slow: the ramp is a step, between the same two channels; deepseek-v3 kills it"

# field → why no logits of a full float32 pass can depend on it, in any fixture
EVERYWHERE = {
    "context": "a note for the caller; nothing in the decoder reads it",
    "tied": "two copies of one tensor give the same logits; test_init checks that they are one parameter",
}
# (fixture, field) → the same, in that fixture
REASONS = {
    ("mamba-130m", "cast_after_gain"): ONE_ROUNDING,
    ("mamba-2.8b", "cast_after_gain"): ONE_ROUNDING,
    ("mamba-original", "cast_after_gain"): ONE_ROUNDING,
    ("falcon-mamba-7b", "cast_after_gain"): ONE_ROUNDING,
    ("mamba2-130m", "cast_after_gain"): ONE_ROUNDING,
    ("codestral-mamba", "cast_after_gain"): ONE_ROUNDING,
    ("mamba2-limits", "cast_after_gain"): ONE_ROUNDING,
    ("phi-3-mini-128k", "short"): PAST_ORIGINAL,
    ("phi-3.5-mini", "short"): PAST_ORIGINAL,
    ("phi-4-mini", "short"): PAST_ORIGINAL,
    ("phi-3.5-moe", "short"): PAST_ORIGINAL,
    ("minicpm3-4b", "short"): PAST_ORIGINAL,
    ("lfm2-8b-a1b", "renormalize"): "1e-6 or 2e-6, beside a sum of sigmoids near 2; test_modules kills it",
    ("gemma4-e2b", "kept"): "a later layer keeps its own before anyone reads",
    **{(name, "kept"): "no later layer reads them" for name in (
        "gemma4-31b", "gemma4-26b-a4b", "gemma4-12b", "gemma4-biases")},
    **{("kimi-k2", field): ONE_STEP for field in ("original", "slow", "truncate")},
}


def another(owner: Any, field: dataclasses.Field) -> Any:
    """Another value for a field, or itself if there is none to try."""
    value = getattr(owner, field.name)
    if field.default is not dataclasses.MISSING and value != field.default:
        return field.default
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value * 2
    if isinstance(value, float):
        return value * 2
    if isinstance(value, tuple):
        return tuple(2 * number for number in value)
    if isinstance(value, str):
        return next((v for v in get_args(field.type) if v != value), value)
    return value


def mutations(owner: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path of the field, the owner with that one field changed) for every field, nested ones included."""
    for field in dataclasses.fields(owner):
        value, here = getattr(owner, field.name), f"{path}.{field.name}".lstrip(".")
        if field.name == "layers":
            for layer in dict.fromkeys(value):          # each distinct layer, wherever it stands
                at = value.index(layer)
                for name, changed in mutations(layer, f"layers[{at}]"):
                    layers = tuple(changed if each == layer else each for each in value)
                    try:
                        yield name, changed and dataclasses.replace(owner, layers=layers)
                    except NanollmError:
                        yield name, None                # layers that do not go together
            continue
        try:
            other = another(owner, field)
            if other != value:
                yield here, dataclasses.replace(owner, **{field.name: other})
        except NanollmError:
            yield here, None                            # the config itself refuses it
        if dataclasses.is_dataclass(value):
            for name, changed in mutations(value, here):
                try:
                    yield name, changed and dataclasses.replace(owner, **{field.name: changed})
                except NanollmError:
                    yield name, None


def weights(model: Decoder, mutant: c.ModelConfig) -> dict[str, torch.nn.Parameter]:
    """Those of the model, by the mutant's names."""
    return dict(model.state_dict(keep_vars=True)) | ({} if mutant.tied else {"head.weight": model.head.weight})


def logits(decoder: Decoder, x: torch.Tensor, found: dict[str, torch.nn.Parameter]) -> torch.Tensor:
    """With these weights, of which there may be more."""
    decoder.load_state_dict({name: found[name] for name in decoder.state_dict()}, assign=True)
    decoder.tie()
    with torch.inference_mode():
        return decoder(x)


def fate(model: Decoder, mutant: c.ModelConfig | None, x: torch.Tensor, reference: torch.Tensor, narrow: Decoder,
         rounded: torch.Tensor, bound: float) -> str:
    """"refused", "shape", "logits", "bfloat16", or "survived". narrow: the model in bfloat16; rounded: its logits."""
    if mutant is None:
        return "refused"
    try:
        with torch.device("meta"):
            decoder = Decoder(mutant)
    except NanollmError:                                # a layer that does not fit the stream
        return "refused"
    found, ours = weights(model, mutant), {name: p.shape for name, p in decoder.named_parameters()}
    unlike = any(name not in found or found[name].shape != shape for name, shape in ours.items())
    if unlike or set(dict(model.named_parameters())) - set(ours):
        return "shape"
    if not difference(logits(decoder, x, found), reference) < bound:
        return "logits"
    return "survived" if torch.equal(logits(decoder, x, weights(narrow, mutant)), rounded) else "bfloat16"


def fates(name: str) -> dict[str, str]:
    """Path of the field → what became of its mutant, for each mutant of a fixture."""
    fixture = FIXTURES[name]
    with tempfile.TemporaryDirectory() as folder:
        theirs = write(fixture, Path(folder))
        model = checkpoints.load(folder)
    x = tokens(fixture, length=LENGTH)
    reference = reference_logits(fixture, theirs, x)
    narrow = copy.deepcopy(model).bfloat16()
    with torch.inference_mode():
        rounded = narrow(x)                              # test_parity: bit-equal to transformers there
    return {path: fate(model, mutant, x, reference, narrow, rounded, fixture.bound)
            for path, mutant in mutations(model.config)}


# Whose effect is about as large as the bound: on one processor they survive, on another they die.
AT_THE_BOUND = {("lfm2-8b-a1b", "renormalize")}


def settled(name: str, some: dict[str, str]) -> dict[str, str]:
    """Survivors without those."""
    return {path: why for path, why in some.items() if (name, path.rpartition(".")[2]) not in AT_THE_BOUND}


def survivors(name: str, found: dict[str, str]) -> dict[str, str]:
    """Path of the field → why its mutant survives, but for those that survive everywhere."""
    fields = {path: path.rpartition(".")[2] for path, fate in found.items() if fate == "survived"}
    own = {path: field for path, field in fields.items() if field not in EVERYWHERE}
    return {path: REASONS.get((name, field), "UNEXPLAINED") for path, field in own.items()}


# ---- the list

HEAD = "What changes of a config the comparison with transformers cannot notice, and why (tests/test_mutants.py).\n"


def listed() -> dict[str, dict[str, str]]:
    """Fixture → path of the field → reason, as tests/mutants.txt has them."""
    found: dict[str, dict[str, str]] = {}
    name = ""
    for line in REPORT.read_text().splitlines()[2:]:
        if line.startswith("    "):
            path, _, reason = line.strip().partition(": ")
            found[name][path] = reason
        elif line:
            name = line
            found[name] = {}
    return found


def document(found: dict[str, dict[str, str]]) -> str:
    """tests/mutants.txt."""
    sections = {"everywhere": EVERYWHERE} | {name: found[name] for name in FIXTURES if found.get(name)}
    texts = [f"{name}\n" + "".join(f"    {path}: {reason}\n" for path, reason in some.items())
             for name, some in sections.items()]
    return f"{HEAD}\n" + "\n".join(texts)


# what `make test` mutates: each field of a config that some fixture sets is set in one of these
EVERY_FIELD = {
    "deepseek-v3", "recurrentgemma-narrow", "mamba2-limits", "gpt-oss-full-first", "phi-qk-norm", "mamba-biases",
    "gemma2-27b", "gemma3-27b", "phi-4-mini", "rwkv-4", "stripedhyena-7b", "command-r-plus", "falcon-rw-1b",
    "internlm-7b", "llama-3.1", "falcon-mamba-7b", "qwen-7b-2023-08", "yuan2-2b", "gpt2-stanford", "mpt-clipped",
    "phi-moe-window", "qwen2-moe-sliding", "baichuan2-7b", "qwen3-next-mixed", "granite-3-2b", "ministral-3-3b",
    "opt-1.3b", "glm-5.2", "llama-4-scout", "nemotron-3-super", "granite-4.0-h-tiny", "falcon-h1-0.5b", "lfm2-1.2b",
    "mimo-v2-flash", "laguna-xs-2", "mistral-small-4", "kolibri-1",
    "gemma4-31b", "gemma4-e2b", "gemma4-26b-a4b",
}


@pytest.mark.parametrize("name", slow_but(EVERY_FIELD, FIXTURES))
def test_mutants_die_or_are_explained(name):
    found = survivors(name, fates(name))
    assert "UNEXPLAINED" not in found.values(), found
    expected = listed().get(name, {})
    assert settled(name, found) == settled(name, expected), (
        f"python -m tests.test_mutants {name} writes tests/mutants.txt anew")


def test_the_list_is_of_fixtures_that_there_are_and_each_reason_is_given_once():
    found = listed()
    assert document(found) == REPORT.read_text()
    assert found.keys() - FIXTURES.keys() == {"everywhere"} and found["everywhere"] == EVERYWHERE
    given = {(name, path.rpartition(".")[2]) for name, some in found.items() for path in some if name != "everywhere"}
    assert given == REASONS.keys()


def test_every_change_of_another_kind_is_noticed():
    """Of a loaded Llama: what changes logits, what changes shapes, what only bfloat16 shows, and what nothing shows."""
    found = fates("llama-3")
    assert found["layers[0].mixer.rope.theta"] == "logits" and found["layers[0].mixer.heads"] == "shape"
    assert found["layers[0].pre_mixer.cast_after_gain"] == "bfloat16" and found["context"] == "survived"


if __name__ == "__main__":
    torch.set_num_threads(1)
    names = sys.argv[1:] or [*FIXTURES]
    kept = listed() if sys.argv[1:] else {}
    for name in names:
        found = fates(name)
        counts = ", ".join(f"{count} {fate}" for fate, count in collections.Counter(found.values()).most_common())
        print(f"{name}: {len(found)} mutants: {counts}", flush=True)
        kept[name] = survivors(name, found)
    REPORT.write_text(document(kept))
