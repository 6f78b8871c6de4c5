"""Would the parity tests notice? Each config field of each distinct layer is changed, and the logits must change with it.

A mutant is the loaded model with one field of its config reset to the default, or, where it has no other default,
doubled, flipped or dropped; the weights stay. It is killed if its logits leave the bound of test_parity, or if its
parameters no longer fit. A cast order shows in bfloat16 only, and is tried there. Survivors are listed by name with the reason why nothing could notice them.

    python -m tests.test_mutants      writes tests/mutants.txt anew
"""

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
from tests.fixtures import FIXTURES
from tests.oracles import difference, reference_logits, tokens, write

REPORT = Path(__file__).with_name("mutants.txt")
LENGTH = 48

ONE_ROUNDING = "the stream is float32, so either order rounds once, at the end; mamba-biases kills it"
PAST_ORIGINAL = "48 tokens are past the original context, where the long list holds; test_parity at 24 tokens kills it"

# (fixture or *, field) → why no logits of a full float32 pass can depend on it
REASONS = {
    ("*", "context"): "a note for the caller; nothing in the decoder reads it",
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
    ("*", "tied"): "two copies of one tensor give the same logits; test_init checks that they are one parameter",
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
                    yield name, changed and dataclasses.replace(owner, layers=tuple(changed if each == layer else each for each in value))
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


def fate(model: Decoder, mutant: c.ModelConfig | None, x: torch.Tensor, reference: torch.Tensor, narrow: Decoder, rounded: torch.Tensor, bound: float) -> str:
    """"refused", "shape", "logits", "bfloat16", or "survived". narrow and rounded: the model itself in bfloat16, and its logits."""
    if mutant is None:
        return "refused"
    try:
        with torch.device("meta"):
            decoder = Decoder(mutant)
    except NanollmError:                                # a layer that does not fit the stream
        return "refused"
    found, ours = weights(model, mutant), {name: p.shape for name, p in decoder.named_parameters()}
    if any(name not in found or found[name].shape != shape for name, shape in ours.items()) or set(dict(model.named_parameters())) - set(ours):
        return "shape"
    if not difference(logits(decoder, x, found), reference) < bound:
        return "logits"
    return "survived" if torch.equal(logits(decoder, x, weights(narrow, mutant)), rounded) else "bfloat16"


def report(name: str) -> list[str]:
    """The lines of one fixture."""
    fixture = FIXTURES[name]
    with tempfile.TemporaryDirectory() as folder:
        theirs = write(fixture, Path(folder))
        model = checkpoints.load(folder)
    x = tokens(fixture, length=LENGTH)
    reference = reference_logits(fixture, theirs, x)
    narrow = copy.deepcopy(model).bfloat16()
    with torch.inference_mode():
        rounded = narrow(x)                                                     # test_parity: bit-equal to transformers there
    fates = [(path, fate(model, mutant, x, reference, narrow, rounded, fixture.bound)) for path, mutant in mutations(model.config)]
    count = lambda kind: sum(f == kind for _, f in fates)
    survivors = [path for path, f in fates if f == "survived"]
    lines = [f"{name:18} {len(fates):4} mutants: {count('logits'):3} killed by logits, {count('bfloat16')} in bfloat16, {count('shape'):3} by shapes, {count('refused'):3} by the config, {len(survivors)} survived"]
    for path in survivors:
        field = path.rpartition(".")[2]
        reason = REASONS.get((name, path)) or REASONS.get((name, field)) or REASONS.get(("*", field)) or "UNEXPLAINED"
        lines.append(f"    {path}: {reason}")
    return lines


HEAD = "What changes of the config the comparison with transformers notices (tests/test_mutants.py).\n\n"


@pytest.mark.parametrize("name", FIXTURES)
def test_mutants_die_or_are_explained(name):
    lines = report(name)
    assert not [line for line in lines if line.endswith("UNEXPLAINED")], "\n".join(lines)
    committed = REPORT.read_text()
    assert "\n".join(lines) + "\n" in committed, "tests/mutants.txt differs; python -m tests.test_mutants writes it anew:\n" + "\n".join(lines)


def test_the_report_names_every_fixture_and_no_other():
    named = [line.split()[0] for line in REPORT.read_text().splitlines()[2:] if line and not line.startswith(" ")]
    assert named == list(FIXTURES)


if __name__ == "__main__":
    torch.set_num_threads(1)
    REPORT.write_text(HEAD + "\n".join("\n".join(report(name)) for name in FIXTURES) + "\n")
    sys.stdout.write(REPORT.read_text())
