"""What a query sees, said twice: the mask that the definition uses, and the run of keys that the kernels use, must be
the same."""

import pytest
import torch

from nanollm.cache import Cache
from nanollm.config import MLP, Alibi, Attention, Layer, ModelConfig, Norm, Rope
from nanollm.errors import InputError
from nanollm.layers.forward_context import ForwardContext
from nanollm.layers.mask import CAUSAL, AttentionMask
from nanollm.model import Decoder

WINDOWS = (None, 1, 3, 100)


def same(mask: AttentionMask, T: int, S: int) -> None:
    """Every real query's row of the mask is its run."""
    dense = mask.dense
    if dense is None:
        dense = torch.ones(1, 1, T, S, dtype=torch.bool)
    elif dense is CAUSAL:
        dense = torch.ones(T, S, dtype=torch.bool).tril()[None, None]
    elif dense.is_floating_point():
        dense = dense[:, :1] > -torch.inf
    keys = torch.arange(S)
    runs = (keys >= mask.first[..., None]) & (keys <= mask.last[..., None])  # (B, T, S)
    real = mask.ctx.rows(mask.ctx.positions) >= 0
    assert torch.equal(runs & real[..., None], dense[:, 0] & real[..., None])
    assert not runs[~real.expand(runs.shape[:2])].any()
    assert mask.first.dtype == mask.last.dtype == torch.int32


def attention(window) -> Attention:
    return Attention(4, 2, 8, Rope(), window=window)


@pytest.mark.parametrize("alibi", [None, Alibi()])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(
    "positions",
    [
        [[0, 1, 2, 3, 4, 5]], [[0, 1, 2, 0, 1, 0]], [[0, 0, 0, 0]], [[0, 1, -1, -1], [0, 1, 2, 3]],
        [[-1, -1, 0, 1], [-1, 0, 1, 0]], [[0, 1, -1, 0, 1, 2]], [[7, 8, 9, 0, 1]], [[-1, -1, -1, -1], [0, 1, 2, 0]],
    ],
    ids=str,
)
def test_without_a_cache(positions, window, alibi):
    positions = torch.tensor(positions)
    same(
        AttentionMask(ForwardContext(positions, False, torch.float32), None, window, alibi, 4), positions.shape[1],
        positions.shape[1],
    )
    if len(positions) == 1 and positions[0, -1] == 5:
        same(AttentionMask(ForwardContext(positions, True, torch.float32), None, window, alibi, 4), 6, 6)


def test_the_last_token_of_a_run_is_where_distance_is_counted_from():
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    mask = AttentionMask(ForwardContext(positions, False, torch.float32), None, alibi=Alibi(), heads=4)
    distance = (mask.last[..., None] - torch.arange(6))[:, None]
    visible = mask.dense > -torch.inf
    assert torch.equal((-mask.slopes[:, None, None] * distance)[visible], mask.dense[visible])


def test_coarse_alibi_is_no_run():
    mask = AttentionMask(
        ForwardContext(torch.arange(6)[None], True, torch.float32), None, alibi=Alibi(coarse=True), heads=4
    )
    assert mask.first is None and mask.last is None and mask.dense.shape == (1, 4, 6, 6)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(
    "chunks",
    [[(3, 3)], [(4, 4), (1, 1), (1, 1)], [(2, 2), (5, 5), (1, 1)], [(3, 1), (1, 1), (1, 0)], [(6, 2), (2, 2), (1, 1)]],
    ids=str,
)
def test_with_a_cache(chunks, window):
    """Two rows, each fed the tokens that its number in a chunk says, then padding; rings go round."""
    config = ModelConfig(vocab=8, dim=16, layers=(Layer(attention(window), MLP(16), Norm(), None, Norm()),))
    cache, regular = Cache(config, 2, 24), all(a == b for a, b in chunks)
    for lengths in chunks * 2:
        T = max(lengths)
        offsets = torch.arange(T)
        positions = torch.where(offsets < torch.tensor(lengths)[:, None], cache.lengths[:, None] + offsets, -1)
        _, positions = cache.advance(torch.zeros(2, T, dtype=torch.long), None if regular else positions)
        ctx = ForwardContext(positions, regular, torch.float32, cache)
        state = cache.states[0]
        slots = ctx.slots(state)
        keys, _ = state.extend(torch.zeros(2, 2, T, 8), torch.zeros(2, 2, T, 8), slots)
        mask = AttentionMask(ctx, slots, window)
        if slots.join:
            assert mask.first is None and mask.last is None
        else:
            same(mask, T, keys.shape[2])


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
