"""Guesses change how many tokens a pass yields, never which: whatever is guessed, the answer is `generate`'s."""

import random

import pytest
import torch

from nanollm.config import ModelConfig
from nanollm.errors import InputError
from nanollm.inference.generation import generate
from nanollm.inference.speculative import DraftModel, look_up, speculate
from nanollm.model import Decoder
from tests.oracles import make_loud
from tests.test_consistency import BY_LENGTH, KINDS
from tests.test_engine import VOCAB, decoder

PROMPT = [5, 17, 3, 44, 8, 5, 17]


@pytest.mark.parametrize("name", [name for name in KINDS if name not in BY_LENGTH])
def test_the_tokens_are_those_of_plain_decoding(name):
    """Guesses that are right, wrong, and right up to somewhere; greedy and drawn with a seed."""
    model, draw = decoder(KINDS[name]), random.Random(0)
    for how in ({}, {"temperature": 0.8, "seed": 3, "frequency_penalty": 0.5}):
        plain = list(generate(model, PROMPT, 16, **how))

        def guess(said, most, plain=plain):
            right = plain[len(said) - len(PROMPT) :][:most]
            at = draw.randint(0, most)
            return [*right[:at], *((token + 1) % VOCAB for token in right[at:])]

        for each in (guess, look_up, DraftModel(model, 32)):
            stream = speculate(model, PROMPT, 16, each, **how)
            assert list(stream) == plain and stream.answer.ended == "length"


def test_right_guesses_save_passes_and_a_draft_model_is_asked_for_no_more(monkeypatch):
    model = decoder(KINDS["hybrid"])
    passes = []
    hook = model.embed.register_forward_hook(lambda _, args, __: passes.append(args[0].shape[1]))
    plain = list(generate(model, PROMPT, 20))
    assert len(passes) == 20
    passes.clear()
    found = list(speculate(model, PROMPT, 20, lambda said, most: plain[len(said) - len(PROMPT) :][:most]))
    assert found == plain and passes == [6, 5, 5, 5, 5]
    hook.remove()
    small = Decoder(ModelConfig(vocab=VOCAB, dim=32, layers=KINDS["mamba"]), seed=1).eval()
    make_loud(small)
    assert list(speculate(model, PROMPT, 20, DraftModel(small, 30))) == plain
    assert list(speculate(model, PROMPT, 20, DraftModel(small, 5))) == plain      # too short to guess anything
    assert list(speculate(model, PROMPT, 20, lambda said, most: [VOCAB])) == plain      # what the model does not have


def test_stops_and_log_probabilities():
    model = decoder(KINDS["full"])
    plain = generate(model, PROMPT, 12, logprobs=1)
    tokens = list(plain)
    stream = speculate(model, PROMPT, 12, lambda said, most: tokens[len(said) - len(PROMPT) :][:most],
                       stop_ids=[tokens[6]], logprobs=1)
    assert list(stream) == tokens[: tokens.index(tokens[6]) + 1] and stream.answer.ended == "stop"
    for one, other in zip(stream.answer.logprobs, plain.answer.logprobs, strict=False):
        assert one.chosen.token == other.chosen.token and one.chosen.raw == pytest.approx(other.chosen.raw, abs=1e-5)
    with pytest.raises(InputError, match="use generate"):
        speculate(decoder(KINDS["dynamic"]), PROMPT, 4, look_up)


def test_what_is_drawn_without_a_seed_is_distributed_as_the_model_says():
    """Two tokens of a vocabulary of 6, 400 times, with the likeliest of another model as guesses: Pearson's χ² beside
    p(a) p(b|a) of the full forward pass, below the 99.9 % quantile of its distribution (35 degrees of freedom)."""
    config = ModelConfig(vocab=6, dim=16, layers=KINDS["full"][:1])
    model, small = (Decoder(config, seed=seed).eval() for seed in (0, 1))
    for each in (model, small):
        make_loud(each)
    model.head.weight.data *= 0.1                       # no pair is rare
    prompt, vocab, n = [1], range(6), 400
    with torch.no_grad():
        p = model(torch.tensor([[*prompt, a] for a in vocab]))[:, -2:].double().softmax(-1)     # (6, 2, 6)
    expected = (p[0, 0, :, None] * p[:, 1]).flatten() * n
    torch.manual_seed(0)
    guess, found = DraftModel(small, 8), torch.zeros(36)
    for _ in range(n):
        a, b = speculate(model, prompt, 2, guess, temperature=1.0)
        found[6 * a + b] += 1
    assert expected.min() > 5
    assert ((found - expected) ** 2 / expected).sum() < 66.6


def test_look_up():
    assert look_up([1, 2, 3, 4, 9, 2, 3], 2) == [4, 9] and look_up([1, 2, 3], 4) == [] and look_up([7], 4) == []
    assert look_up([1, 2, 5, 1, 2, 6, 1, 2], 1) == [6]
