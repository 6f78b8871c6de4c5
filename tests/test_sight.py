"""What a query sees, said twice: the mask that the definition uses, and the run of keys that the kernels use, must be the same."""

import pytest
import torch

from nanollm.cache import Cache
from nanollm.config import MLP, Alibi, Attention, Layer, ModelConfig, Norm, Rope
from nanollm.errors import InputError
from nanollm.frame import CAUSAL, Frame, Sight
from nanollm.model import Decoder

WINDOWS = (None, 1, 3, 100)


def same(sight: Sight, T: int, S: int) -> None:
    """Every real query's row of the mask is its run."""
    mask = sight.mask
    if mask is None:
        mask = torch.ones(1, 1, T, S, dtype=torch.bool)
    elif mask is CAUSAL:
        mask = torch.ones(T, S, dtype=torch.bool).tril()[None, None]
    elif mask.is_floating_point():
        mask = mask[:, :1] > -torch.inf
    keys = torch.arange(S)
    runs = (keys >= sight.first[..., None]) & (keys <= sight.last[..., None])                  # (B, T, S)
    real = sight.frame.rows(sight.frame.positions) >= 0
    assert torch.equal(runs & real[..., None], mask[:, 0] & real[..., None])
    assert not runs[~real.expand(runs.shape[:2])].any()
    assert sight.first.dtype == sight.last.dtype == torch.int32


def attention(window) -> Attention:
    return Attention(4, 2, 8, Rope(), window=window)


@pytest.mark.parametrize("alibi", [None, Alibi()])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("positions", [
    [[0, 1, 2, 3, 4, 5]], [[0, 1, 2, 0, 1, 0]], [[0, 0, 0, 0]], [[0, 1, -1, -1], [0, 1, 2, 3]], [[-1, -1, 0, 1], [-1, 0, 1, 0]],
    [[0, 1, -1, 0, 1, 2]], [[7, 8, 9, 0, 1]], [[-1, -1, -1, -1], [0, 1, 2, 0]]], ids=str)
def test_without_a_cache(positions, window, alibi):
    positions = torch.tensor(positions)
    same(Sight(Frame(positions, False, torch.float32), None, window, alibi, 4), positions.shape[1], positions.shape[1])
    if len(positions) == 1 and positions[0, -1] == 5:
        same(Sight(Frame(positions, True, torch.float32), None, window, alibi, 4), 6, 6)


def test_the_last_token_of_a_run_is_where_distance_is_counted_from():
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    sight = Sight(Frame(positions, False, torch.float32), None, alibi=Alibi(), heads=4)
    distance = (sight.last[..., None] - torch.arange(6))[:, None]
    visible = sight.mask > -torch.inf
    assert torch.equal((-sight.slopes[:, None, None] * distance)[visible], sight.mask[visible])


def test_coarse_alibi_is_no_run():
    sight = Sight(Frame(torch.arange(6)[None], True, torch.float32), None, alibi=Alibi(coarse=True), heads=4)
    assert sight.first is None and sight.last is None and sight.mask.shape == (1, 4, 6, 6)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("chunks", [[(3, 3)], [(4, 4), (1, 1), (1, 1)], [(2, 2), (5, 5), (1, 1)], [(3, 1), (1, 1), (1, 0)], [(6, 2), (2, 2), (1, 1)]], ids=str)
def test_with_a_cache(chunks, window):
    """Two rows, each fed the tokens that its number in a chunk says, then padding; rings go round."""
    config = ModelConfig(vocab=8, dim=16, layers=(Layer(attention(window), MLP(16), Norm(), None, Norm()),))
    cache, regular = Cache(config, 2, 24), all(a == b for a, b in chunks)
    for lengths in chunks * 2:
        T = max(lengths)
        offsets = torch.arange(T)
        positions = torch.where(offsets < torch.tensor(lengths)[:, None], cache.lengths[:, None] + offsets, -1)
        _, positions = cache.advance(torch.zeros(2, T, dtype=torch.long), None if regular else positions)
        frame = Frame(positions, regular, torch.float32, cache)
        state = cache.states[0]
        plan = frame.plan(state)
        keys, _ = state.extend(torch.zeros(2, 2, T, 8), torch.zeros(2, 2, T, 8), plan)
        sight = Sight(frame, plan, window)
        if plan.join:
            assert sight.first is None and sight.last is None
        else:
            same(sight, T, keys.shape[2])


@pytest.mark.parametrize("positions", [[[0, 2]], [[0, -1, 1]], [[1, 1]], [[2, 1]], [[0, 1], [0, 3]]], ids=str)
def test_positions_rise_by_one(positions):
    config = ModelConfig(vocab=8, dim=16, layers=(Layer(attention(None), MLP(16), Norm(), None, Norm()),))
    tokens = torch.zeros(len(positions), len(positions[0]), dtype=torch.long)
    with pytest.raises(InputError, match="positions rise by one inside a document.* \\(row ., token ."):
        Decoder(config)(tokens, torch.tensor(positions))


def test_padding_between_the_tokens_of_a_cached_row_is_refused():
    config = ModelConfig(vocab=8, dim=16, layers=(Layer(attention(None), MLP(16), Norm(), None, Norm()),))
    with pytest.raises(InputError, match="padding, before or behind them"):
        Decoder(config)(torch.zeros(1, 3, dtype=torch.long), torch.tensor([[0, -1, 1]]), Cache(config, 1, 8))
