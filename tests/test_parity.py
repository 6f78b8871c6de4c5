"""Every family against transformers: logits of the full pass, and 64 greedy tokens with the cache.

The folder is what transformers writes (turned into the hub's older spelling where the fixture says so), loaded through
`checkpoints.load`. The largest difference over the spread of the logits must stay below 1e-5 in float32, on any
processor; what it was on one is recorded in docs/families.md.
"""

import copy

import pytest
import torch

import checkpoints
from checkpoints.show import describe
from nanollm.inference.generation import generate, generate_batch
from tests.families_table import error, greedy_agrees
from tests.fixtures import ALL, FIXTURES
from tests.oracles import difference, reference_logits, tokens, write


@pytest.fixture(scope="module", params=ALL)
def pair(request, tmp_path_factory):
    """(fixture, transformers' model, our model), written and loaded once."""
    fixture, folder = FIXTURES[request.param], tmp_path_factory.mktemp("fixture")
    theirs = write(fixture, folder)
    return fixture, theirs, checkpoints.load(folder)


@pytest.mark.parametrize("length", [1, 24, 48, 80])
def test_logits(pair, length):
    fixture, theirs, ours = pair
    x = tokens(fixture, length=length)
    assert difference(ours(x), reference_logits(fixture, theirs, x)) < fixture.bound


def test_what_was_loaded_can_be_shown(pair):
    """checkpoints.show counts the parameters that are there, and stays within its width."""
    shown = describe(pair[2].config)
    assert f"{sum(p.numel() for p in pair[2].parameters()):,} (" in shown and max(map(len, shown.splitlines())) <= 100


def test_bfloat16(tmp_path, pair):
    """The same roundings in the same places: every logit is bit-equal to that of transformers' last right
    implementation, sdpa for most.

    Where a fixture says why it cannot be, ours must be as near to the float32 logits of the same weights, or nearer.
    """
    fixture, x = pair[0], tokens(pair[0])
    theirs = write(fixture, tmp_path, torch.bfloat16)
    ours, reference = checkpoints.load(tmp_path)(x), reference_logits(fixture, theirs, x, *fixture.attention[-1:])
    assert ours.dtype == torch.bfloat16
    if fixture.bit_equal:
        assert torch.equal(ours, reference)
        return
    exact = checkpoints.load(tmp_path, dtype=torch.float32)(x)
    assert error(ours, exact) < 1.1 * error(reference, exact)


@torch.inference_mode()
def test_the_oracle_agrees_with_itself(pair):
    """transformers' eager and sdpa attention, before either is believed. Where there is but one, its cached pass and
    its full one."""
    fixture, theirs, ours = pair
    x = tokens(fixture)
    if len(fixture.attention) > 1:
        other = reference_logits(fixture, theirs, x, fixture.attention[1])
        assert difference(ours(x), other) < fixture.bound
    elif fixture.logits is None:
        other = copy.deepcopy(theirs)(x, use_cache=True).logits
    else:                                                # nor that: a shorter sequence must have the same logits
        short, whole = reference_logits(fixture, theirs, x[:, :24]), reference_logits(fixture, theirs, x)
        other = torch.cat([short, whole[:, 24:]], 1)
    assert difference(other, reference_logits(fixture, theirs, x)) < fixture.bound


def test_greedy_tokens_with_the_cache(pair):
    """64 tokens past every window, held to the full pass of the reference."""
    assert greedy_agrees(*pair)


@torch.inference_mode()
def test_a_batch_generates_what_each_prompt_would(pair):
    """Alone a prompt is given what a full pass chooses, as the test above shows: here one pass a prompt judges the
    batch. Where angles follow the length each prompt is answered alone."""
    fixture, _, ours = pair
    prompts = [tokens(fixture, 1, n, seed=n)[0].tolist() for n in (3, 14, 7)]
    found = generate_batch(ours, prompts, 24)
    if fixture.length_dependent:
        alone = [list(generate(ours, prompt, 24)) for prompt in prompts]
    else:
        whole = [torch.tensor([prompt + answer[:-1]]) for prompt, answer in zip(prompts, found, strict=True)]
        alone = [ours(x)[0, -24:].argmax(-1).tolist() for x in whole]
    assert found == alone
    stop = alone[1][5]
    assert generate_batch(ours, prompts, 8, stop_ids=[stop])[1] == alone[1][: alone[1].index(stop) + 1]
