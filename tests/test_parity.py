"""Every core family against transformers: logits of the full pass, and 64 greedy tokens with the cache.

The folder is what transformers writes (turned into the hub's older spelling where the fixture says so), loaded through
`checkpoints.load`. The largest difference over the spread of the logits must stay below 1e-5 in float32.
"""

import copy

import pytest
import torch
import transformers

import checkpoints
from nanollm.generation import generate, generate_batch
from tests.oracles import FIXTURES, difference, hf_config, make_loud, reference_logits, tokens, write

BOUND = 1e-5


@pytest.fixture(scope="module", params=FIXTURES)
def pair(request, tmp_path_factory):
    """(fixture, transformers' model, our model), written and loaded once."""
    fixture, folder = FIXTURES[request.param], tmp_path_factory.mktemp("fixture")
    theirs = write(fixture, folder)
    return fixture, theirs, checkpoints.load(folder)


@pytest.mark.parametrize("length", [1, 24, 48, 80])
def test_logits(pair, length):
    fixture, theirs, ours = pair
    x = tokens(fixture, length=length)
    assert difference(ours(x), reference_logits(theirs, x)) < BOUND


def test_the_oracle_agrees_with_itself(pair):
    """transformers' eager and sdpa attention, before either is believed."""
    fixture, theirs, _ = pair
    if fixture.kind == "mamba":
        x = tokens(fixture)                              # no attention to choose: the cached pass must equal the full one
        assert difference(copy.deepcopy(theirs)(x, use_cache=True).logits, reference_logits(theirs, x)) < BOUND
        return
    other = transformers.AutoModelForCausalLM.from_config(hf_config(fixture), attn_implementation="sdpa").eval()
    make_loud(other)
    x = tokens(fixture)
    assert difference(reference_logits(other, x), reference_logits(theirs, x)) < BOUND


def test_greedy_tokens_with_the_cache(pair):
    """64 tokens past every window. Where angles follow the length, transformers' own cache differs from its full pass;
    the full pass is then the reference, token by token."""
    fixture, theirs, ours = pair
    prompt = tokens(fixture, batch=1, length=12)
    if fixture.length_dependent:
        expected = prompt
        for _ in range(64):
            expected = torch.cat([expected, reference_logits(theirs, expected)[:, -1:].argmax(-1)], 1)
    else:
        expected = theirs.generate(prompt, max_new_tokens=64, do_sample=False, eos_token_id=None)
    assert list(generate(ours, prompt[0].tolist(), 64)) == expected[0, 12:].tolist()


def test_a_batch_generates_what_each_prompt_would(pair):
    fixture, _, ours = pair
    prompts = [tokens(fixture, 1, n, seed=n)[0].tolist() for n in (3, 14, 7)]
    alone = [list(generate(ours, prompt, 24)) for prompt in prompts]
    assert generate_batch(ours, prompts, 24) == alone
    stop = alone[1][5]
    assert generate_batch(ours, prompts, 24, stop_ids=[stop])[1] == alone[1][: alone[1].index(stop) + 1]
