"""What a model does only while it learns: noise on embeddings, against transformers; LongLoRA's attention, against its
dense definition."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor
from transformers.integrations.neftune import activate_neftune

import checkpoints
from nanollm.config import MLP, Attention, Layer, LogLength, ModelConfig, Rope
from nanollm.errors import InputError
from nanollm.layers.forward_context import ForwardContext
from nanollm.layers.mask import AttentionMask
from nanollm.model import Decoder
from nanollm.training import distributed
from nanollm.training.neftune import add_noise
from nanollm.training.phase import learning
from nanollm.training.shifted_attention import groups_of, shift_attention
from tests import oracles
from tests.fixtures import FIXTURES

KEY = 0, 3, 1, 2


# ---- NEFTune

def test_the_noise_is_that_of_transformers_with_the_same_seed(tmp_path):
    reference = oracles.write(FIXTURES["llama-3.1"], tmp_path)
    model, ids = checkpoints.load(tmp_path), oracles.tokens(FIXTURES["llama-3.1"])
    plain = model(ids)
    add_noise(model, 5.0)
    activate_neftune(reference, 5.0)
    with learning(model, *KEY), learning(reference, *KEY):
        torch.manual_seed(7)
        embedded = model.embed(ids)
        torch.manual_seed(7)
        theirs = reference.get_input_embeddings()(ids)
        # transformers rounds the bound to float32 before it draws
        assert (embedded - theirs).abs().max() <= 1e-6 * (5.0 / math.sqrt(ids.shape[1] * embedded.shape[2]))
        torch.manual_seed(7)
        logits = model(ids)
        torch.manual_seed(7)
        assert oracles.difference(logits, reference(ids).logits) <= 1e-5
    assert oracles.difference(logits, plain) > 1e-2
    assert torch.equal(model(ids), plain)                   # eval mode


def noise(model: Decoder, ids: Tensor, *key: int) -> Tensor:
    with learning(model, *key):
        return (model.embed(ids) - model.embed.weight[ids]).detach()


def test_the_noise_follows_from_seed_step_rank_and_micro_batch_and_has_its_size():
    model = Decoder(ModelConfig(61, 64, (Layer(Attention(4, 2, 16, Rope()), MLP(48)),), context=256))
    add_noise(model, 10.0)
    ids = torch.randint(0, 61, (8, 128))
    first, bound = noise(model, ids, *KEY), 10 / math.sqrt(128 * 64)
    torch.rand(5)                                           # whatever was drawn meanwhile
    assert torch.equal(noise(model, ids, *KEY), first)
    for place in range(4):
        other = [*KEY]
        other[place] += 1
        assert (noise(model, ids, *other) - first).abs().mean() > bound / 2
    assert first.abs().max() <= bound * (1 + 1e-5) and first.abs().max() > 0.99 * bound
    assert first.std() == pytest.approx(bound / math.sqrt(3), rel=0.01) and abs(first.mean()) < 0.02 * bound
    assert first.flatten(1).norm(dim=1).mean() == pytest.approx(10 / math.sqrt(3), rel=0.01)


@pytest.mark.parametrize("how", distributed.RECOMPUTE)
def test_what_is_computed_again_sees_the_same_noise(how):
    config = ModelConfig(61, 32, (Layer(Attention(4, 2, 8, Rope()), MLP(48)),) * 2, context=64)
    ids, gradients = torch.randint(0, 61, (2, 20)), []
    for recompute in ("none", how):
        model = Decoder(config, seed=1)
        add_noise(model, 5.0)
        for layer in model.layers:
            layer.forward = distributed.recomputed(layer.forward, recompute)
        with learning(model, *KEY):
            model(ids).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


# ---- LongLoRA

def dense(mixer, x: Tensor, ctx, group: int) -> Tensor:
    """The paper's attention as a mask over all pairs of tokens: a head sees the earlier tokens of its own group, and
    groups of the second half of the heads begin G/2 later."""
    q, k, v = mixer.placed(*mixer.project(x), ctx)
    H, T = q.shape[1], q.shape[2]
    k, v = (z.repeat_interleave(H // z.shape[1], 1) for z in (k, v))
    scores = q @ k.mT * mixer.scale
    if mixer.config.softcap is not None:
        scores = mixer.config.softcap * torch.tanh(scores / mixer.config.softcap)
    documents = (ctx.positions == 0).cumsum(1)
    mask = torch.zeros(len(x), H, T, T, dtype=torch.bool)
    for h in range(H):
        s = group // 2 if h >= H // 2 else 0
        for i in range(T):
            for j in range(i + 1):
                mask[:, h, i, j] = (i + s) // group == (j + s) // group
                if mixer.config.window is not None and i - j >= mixer.config.window:
                    mask[:, h, i, j] = False
    mask &= (documents[:, :, None] == documents[:, None])[:, None]
    mask &= ((ctx.positions < 0)[:, :, None] == (ctx.positions < 0)[:, None])[:, None]
    scores = scores.masked_fill(~mask, -1e30)
    if mixer.sinks is not None:
        scores = torch.cat([scores, mixer.sinks[None, :, None, None].expand(len(x), H, T, 1)], -1)
    return mixer.o((scores.softmax(-1)[..., :T] @ v).transpose(1, 2).flatten(-2))


PACKED = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7, -1, -1],
                       [*range(24)], [-1, -1, *range(15), *range(7)]])
VARIANTS = {
    "plain": {}, "one key head": dict(kv_heads=1), "a key head a query": dict(kv_heads=4), "window": dict(window=5),
    "softcap": dict(softcap=3.0), "sinks": dict(sinks=True), "log n": dict(growth=LogLength(6)),
}


@pytest.mark.parametrize("positions", [None, PACKED], ids=["regular", "packed"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_groups_equal_the_dense_definition(variant, positions):
    attention = dataclasses.replace(Attention(4, 2, 8, Rope()), **VARIANTS[variant])
    config = ModelConfig(61, 32, (Layer(attention, MLP(48)),) * 2, context=64)
    grouped, by_hand = Decoder(config, seed=1), Decoder(config, seed=1)
    for model in (grouped, by_hand):
        oracles.make_loud(model)
    shift_attention(grouped, 8, 24)
    ids, gradients, found = torch.randint(0, 61, (3, 24)), [], []
    for layer in by_hand.layers:
        layer.mixer.forward = lambda x, ctx, state=None, mixer=layer.mixer: dense(mixer, x, ctx, 8)
    for model in (grouped, by_hand):
        with learning(model, *KEY):
            logits = model(ids, positions)
            logits = logits if positions is None else logits[positions >= 0]
            logits.square().mean().backward()
        found.append(logits.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert oracles.difference(*found) < 1e-5
    assert (gradients[0] - gradients[1]).abs().max() < 1e-5 * gradients[1].abs().max()
    full = grouped(ids, positions)                          # eval mode: full attention, to the bit
    assert torch.equal(full, Decoder.__call__(fresh(config), ids, positions))
    assert oracles.difference(found[0], full if positions is None else full[positions >= 0]) > 1e-2


@pytest.mark.parametrize("by", [0, 4])
def test_the_runs_of_keys_that_kernels_read_say_what_the_mask_says(by):
    ctx = ForwardContext(PACKED, False, torch.float32)
    mask = AttentionMask(groups_of(ctx, 8, by), None, 5)
    keys = torch.arange(8)
    run = (keys >= mask.first[..., None]) & (keys <= mask.last[..., None])
    real = PACKED.roll(-by, 1).reshape(-1, 8) >= 0
    assert torch.equal(run[real], mask.dense[:, 0][real])


def fresh(config: ModelConfig) -> Decoder:
    model = Decoder(config, seed=1)
    oracles.make_loud(model)
    return model.eval()


def test_no_token_sees_a_later_one_and_every_one_reaches_back():
    config = ModelConfig(61, 32, (Layer(Attention(4, 2, 8, Rope()), MLP(48)),) * 3, context=64)
    model = fresh(config)
    shift_attention(model, 8, 32)
    ids = torch.randint(0, 61, (1, 32))
    with learning(model, *KEY):
        before = model(ids)
        for place in range(32):
            other = ids.clone()
            other[0, place] = (ids[0, place] + 1) % 61
            change = (model(other) - before)[0].abs().amax(1)
            assert (change[:place] == 0).all() and change[place] > 0
        assert change.shape == (32,)
    other = ids.clone()
    other[0, 6] = (ids[0, 6] + 1) % 61
    with learning(model, *KEY):                             # groups 0 … 7 and, shifted, 4 … 11: from 6 to 11 at once,
        change = (model(other) - before)[0].abs().amax(1)   # and on to 15, 19 by the layers after it
    assert (change[6:20] > 0).all() and (change[20:] == 0).all()


def test_one_group_is_plain_attention():
    config = ModelConfig(61, 32, (Layer(Attention(4, 2, 8, Rope()), MLP(48)),) * 2, context=64)
    model, ids = fresh(config), torch.randint(0, 61, (2, 16))
    plain = model(ids)
    shift_attention(model, 16, 16)
    with learning(model, *KEY):
        assert torch.equal(model(ids), plain)


@pytest.mark.parametrize(("name", "group", "message"), [
    ("deepseek-v2", 16, r"layers\.0\.mixer is LatentAttention; only plain attention"),
    ("mamba-130m", 16, r"layers\.0\.mixer is Mamba; only plain attention"),
    ("bloom-7b1", 16, r"layers\.0\.mixer is attention with ALiBi"),
    ("llama-3.1", 7, "--shift-attention 7: expected an even number that divides --context 48"),
    ("llama-3.1", 20, "--shift-attention 20: expected an even number that divides --context 48"),
])
def test_what_cannot_be_cut_is_refused(name, group, message, tmp_path):
    oracles.write(FIXTURES[name], tmp_path)
    with pytest.raises(InputError, match=message):
        shift_attention(checkpoints.load(tmp_path), group, 48)


def test_an_odd_number_of_heads_is_refused():
    model = Decoder(ModelConfig(61, 24, (Layer(Attention(3, 3, 8, Rope()), MLP(48)),), context=64))
    with pytest.raises(InputError, match="attention with 3 heads; half of an even number"):
        shift_attention(model, 8, 16)
