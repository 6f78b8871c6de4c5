"""Log-likelihoods and perplexity: batches give what each pair gives alone in transformers, windows score each token
once, and perplexity is transformers' to 1e-6."""

import math

import pytest
import torch
from torch.nn import functional as F

import checkpoints
from nanollm.errors import InputError
from nanollm.inference import scoring
from nanollm.inference.perplexity import perplexity, windows
from nanollm.inference.scoring import scores
from tests.fixtures import FIXTURES
from tests.oracles import write

DRAW = torch.Generator().manual_seed(0)
LENGTHS = ((1, 1), (7, 3), (7, 1), (2, 9), (11, 4), (5, 1))


def ids(count: int, vocab: int = 64) -> list[int]:
    return torch.randint(0, vocab, (count,), generator=DRAW).tolist()


@pytest.fixture(scope="module", params=["llama-3.1", "mixtral-8x22b", "mamba-130m"])
def pair(request, tmp_path_factory):
    """Ours and transformers'."""
    folder = tmp_path_factory.mktemp(request.param) / "model"
    theirs = write(FIXTURES[request.param], folder)
    return checkpoints.load(folder), theirs


@torch.inference_mode()
def by_hand(model, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """All logits of one row, in transformers."""
    whole = torch.tensor([context + continuation])
    logits = model(whole).logits[0, len(context) - 1 : -1].double()
    return -F.cross_entropy(logits, whole[0, len(context) :], reduction="sum").item(), bool(
        (logits.argmax(-1) == whole[0, len(context) :]).all())


@pytest.mark.parametrize("budget", [None, 20, 1])
def test_scores_are_those_of_each_pair_alone(pair, budget):
    ours, theirs = pair
    pairs = [(ids(a), ids(b)) for a, b in LENGTHS]
    likeliest = theirs(torch.tensor([pairs[0][0]])).logits[0, -1].argmax().item()
    pairs += [(pairs[1][0], [token]) for token in range(4)] + [(pairs[0][0], [likeliest])]
    found = dict(scores(ours, pairs, budget))
    assert sorted(found) == [*range(len(pairs))]
    for index, (context, continuation) in enumerate(pairs):
        total, greedy = by_hand(theirs, context, continuation)
        assert found[index].total == pytest.approx(total, abs=1e-4, rel=1e-5) and found[index].greedy == greedy
    assert found[len(pairs) - 1].greedy


def test_what_is_read_alike_is_computed_once(pair, monkeypatch):
    read, real = [], scoring.last_layer
    monkeypatch.setattr(scoring, "last_layer", lambda model, batch: read.extend(batch) or real(model, batch))
    context = ids(6)
    assert len(list(scores(pair[0], [(context, [letter]) for letter in range(4)]))) == 4 and len(read) == 1


def test_a_gpu_without_room_gets_smaller_batches(pair, monkeypatch):
    real, tried = scoring.last_layer, []

    def crowded(model, batch):
        tried.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, batch)

    pairs = [(ids(5), ids(1)) for _ in range(8)]
    expected = {index: score.total for index, score in scores(pair[0], pairs)}
    monkeypatch.setattr(scoring, "last_layer", crowded)
    found = {index: score.total for index, score in scores(pair[0], pairs, 40)}
    assert tried == [8, 4, 2, 2, 2, 2] and found == pytest.approx(expected, abs=1e-5)
    monkeypatch.setattr(scoring, "last_layer", lambda model, batch: crowded(model, [*batch] * 3))
    with pytest.raises(InputError, match="row of 5 tokens does not fit"):
        list(scores(pair[0], pairs, 40))


def test_what_cannot_be_scored_is_said(pair):
    for bad, said in ((([], [1]), "context of 0 tokens"), (([1], []), "continuation of 0"),
                      (([1], [64_000]), "token 64000 is outside")):
        with pytest.raises(InputError, match=said):
            list(scores(pair[0], [bad]))


def test_the_windows_of_the_file_head():
    assert list(windows(9, 4, 4)) == [(0, 1, 5), (4, 5, 9)]
    assert list(windows(9, 4, 2)) == [(0, 1, 5), (2, 5, 7), (4, 7, 9)]


@pytest.mark.parametrize("length", [2, 3, 8, 9, 23])
@pytest.mark.parametrize(("window", "stride"), [(1, 1), (4, 4), (4, 1), (5, 3), (30, 7)])
def test_each_token_is_scored_once_and_with_enough_before_it(length, window, stride):
    scored = []
    for begin, first, end in windows(length, window, stride):
        assert 0 <= begin < first < end <= length and end - 1 - begin <= window
        assert begin == 0 or first - begin >= window - stride + 1
        scored += range(first, end)
    assert scored == [*range(1, length)]


@pytest.mark.parametrize(("window", "stride"), [(16, 16), (16, 5), (64, 64)])
def test_perplexity_is_transformers(pair, window, stride):
    ours, theirs = pair
    text, total = ids(50), 0.0
    for begin, first, end in windows(50, window, stride):
        total -= by_hand(theirs, text[begin:first], text[first:end])[0]
    found = perplexity(ours, text, window, stride, budget=40)
    assert found.tokens == 49 and found.perplexity == pytest.approx(math.exp(total / 49), rel=1e-6)
    assert found.bits_per_byte(100) == pytest.approx(total / math.log(2) / 100, rel=1e-6)


def test_the_loss_by_place(pair):
    """In windows of 4 with a stride of 4, place 2 is that of tokens 2, 6, 10 …, which have 2 tokens before them."""
    ours, theirs = pair
    text = ids(13)
    found = perplexity(ours, text, 4, 4)
    by_place = [-sum(by_hand(theirs, text[at : at + place], [text[at + place]])[0] for at in (0, 4, 8)) / 3
                for place in (1, 2, 3, 4)]
    assert found.counts.tolist() == [3] * 4
    assert found.by_place(4) == [(place, pytest.approx(loss, rel=1e-5)) for place, loss in enumerate(by_place, 1)]
    assert found.by_place(2) == [(2, pytest.approx(sum(by_place[:2]) / 2, rel=1e-5)),
                                 (4, pytest.approx(sum(by_place[2:]) / 2, rel=1e-5))]


def test_perplexity_of_nothing_and_strides_that_leave_out_tokens(pair):
    with pytest.raises(InputError, match="text is empty"):
        perplexity(pair[0], [1], 4, 4)
    with pytest.raises(InputError, match="stride 5, window 4: expected 1 to 4"):
        perplexity(pair[0], [1, 2, 3], 4, 5)
