"""Reinforcement without files: a step against trl over transformers' logits, both methods on bandits, and what is
sampled, judged and kept."""

import argparse
import math
from types import SimpleNamespace

import pytest
import torch

import checkpoints
from nanollm.data.chat_formats import Chat
from nanollm.data.prompts import Prompt, Prompts
from nanollm.inference import many
from nanollm.model import Decoder
from nanollm.presets import transformer
from nanollm.training import grpo, methods, ppo
from nanollm.training.phase import learning
from nanollm.training.rollouts import Reinforcement, Samples, look
from tests.test_preferences import folder  # noqa: F401
from tests.test_reinforcement import trl_loss


def settled(method: str, **given) -> argparse.Namespace:
    """The options of a method, as train.py settles them."""
    every = {name: None for some in methods.REINFORCEMENT.values() for name in some}
    usual = {"grpo": None, "ppo": None, "seed": 0, "micro_batch": 2, "batch_size": 2, "dtype": "float32"}
    return argparse.Namespace(**{**every, **methods.REINFORCEMENT[method], **usual, method: ["x"], **given})


def samples_of(model: Decoder, prompts: list[int], lengths: list[int], temperature: float) -> Samples:
    """Random answers, and π_old, π_ref that are not π."""
    draw = torch.Generator().manual_seed(0)
    n, A, begins, ends = len(lengths), max(lengths), torch.tensor(prompts), torch.tensor(lengths)
    tokens = torch.randint(1, model.config.vocab, (n, max(prompts) + A), generator=draw)
    noise = [torch.randn(n, A, generator=draw) for _ in range(3)]
    blank = Samples(tokens, begins, ends, torch.ones(n, dtype=torch.int64), *[torch.zeros(n, A)] * 5)
    blank = blank._replace(tokens=tokens * blank.real)
    with torch.no_grad():
        log_p, mask = look(model, blank, temperature).log_p, blank.mask
    return blank._replace(old=log_p + 0.6 * noise[0] * mask, reference=log_p + 0.3 * noise[1] * mask)


@pytest.mark.parametrize("how", grpo.NORMALISERS)
def test_a_step_of_grpo_is_that_of_trl(folder, how):  # noqa: F811
    """The loss and the gradient of a weight, of the same answers, which are of unequal lengths behind unequal prompts,
    drawn at a temperature. trl pads prompts at their beginning, and its log-probabilities are of all that is padded."""
    transformers = pytest.importorskip("transformers")
    ours = checkpoints.load(folder, dtype=torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompts, lengths, tau, most = [3, 3, 5, 5], [4, 1, 6, 2], 0.7, 8
    options = settled("grpo", normaliser=how, temperature=tau, beta=0.2, epsilon_high=0.28, max_new_tokens=most,
                      group=2)
    samples = samples_of(ours, prompts, lengths, tau)
    samples = grpo.judge(samples, torch.tensor([1.0, 0.0, 0.25, 2.0]), None, options)
    counts = samples.lengths if how == "dapo" else samples.counts
    loss, said = grpo.grpo_loss(ours, samples, options)
    loss = loss / counts.sum()

    A, widest = max(lengths), max(prompts)
    ids, real = torch.full((4, widest + A), 9), torch.zeros(4, widest + A, dtype=torch.int64)
    for row, (p, n) in enumerate(zip(prompts, lengths, strict=True)):
        ids[row, widest - p : widest + n] = samples.tokens[row, : p + n]
        real[row, widest - p : widest + n] = 1
    logits = theirs(ids, attention_mask=real).logits[:, -A - 1 : -1] / tau
    log_p = logits.log_softmax(-1).gather(-1, ids[:, -A:, None])[..., 0]
    advantage = grpo.advantages(torch.tensor([[1.0, 0.0], [0.25, 2.0]]), scale=how != "dr_grpo").flatten()
    expected = trl_loss(how, log_p, samples.old, real[:, -A:].float(), advantage, 0.2, 0.28, 0.2, samples.reference,
                        most)
    assert abs(loss.item() - expected.item()) < 1e-6 and 0 < said["clipped"] / counts.sum() < 1
    loss.backward()
    expected.backward()
    found, known = ours.embed.weight.grad, theirs.model.embed_tokens.weight.grad
    assert known.abs().max() > 1e-4 and torch.allclose(found, known, rtol=1e-4, atol=1e-7)


def test_a_step_of_ppo_by_its_definition():
    """Value and gradient, against the equations written out token by token in float64."""
    model = ppo.add_value(Decoder(transformer(7, 16, 1, 2, 1, 24, context=16), seed=1))
    model.value.weight.data.normal_(0, 1, generator=torch.Generator().manual_seed(2))
    options = settled("ppo", beta=0.3, temperature=1.3, epsilon=0.2, epsilon_high=0.2, value_weight=0.5, gae_lambda=0.9)
    samples = samples_of(model, [2, 4], [3, 2], 1.3)
    with torch.no_grad():
        seen = look(model, samples, 1.3)
    old_values = seen.values + 0.3 * torch.tensor([[1.0, -1, 0.1], [-0.1, 1, 0]])
    samples = samples._replace(values=old_values * samples.mask)
    rewards = torch.tensor([-1.0, 2.0])
    judged = ppo.judge(samples, rewards, lambda *sums: [*sums], options)
    loss, said = ppo.ppo_loss(model, judged, options)

    log_p, values, advantages, aims, places = [], [], [], [], []
    for row, (prompt, length) in enumerate([(2, 3), (4, 2)]):
        ids = samples.tokens[row, : prompt + length]
        hidden = model.hidden(ids[None])[0]
        logits = model.head(hidden) / 1.3
        for t in range(length):
            places.append((row, t))
            log_p.append(logits[prompt + t - 1].log_softmax(-1)[ids[prompt + t]])
            values.append((hidden[prompt + t - 1] * model.value.weight[0]).sum())
        r = [-0.3 * (samples.old[row, t] - samples.reference[row, t]).item() for t in range(length)]
        r[-1] += rewards[row].item()
        V = [*samples.values[row, :length].tolist(), 0.0]
        delta = [r[t] + V[t + 1] - V[t] for t in range(length)]
        mine = [sum(0.9 ** (k - t) * delta[k] for k in range(t, length)) for t in range(length)]
        advantages += mine
        aims += [mine[t] + V[t] for t in range(length)]
    A = torch.tensor(advantages, dtype=torch.float64)
    A = (A - A.mean()) / A.std()
    expected = torch.tensor(0.0)
    for (row, t), lp, v, a, g in zip(places, log_p, values, A.tolist(), aims, strict=True):
        ratio, before = (lp - samples.old[row, t]).exp(), samples.values[row, t]
        expected = expected - torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a)
        near = before + (v - before).clamp(-0.2, 0.2)
        expected = expected + 0.5 * 0.5 * torch.max((v - g) ** 2, (near - g) ** 2)
    assert abs(loss.item() - expected.item()) < 1e-5 and 0 < said["clipped"] < 5
    for p in (model.embed.weight, model.value.weight):
        found, = torch.autograd.grad(loss, p, retain_graph=True)
        known, = torch.autograd.grad(expected, p, retain_graph=True)
        assert known.norm() > 1 and (found - known).norm() < 1e-5 * known.norm()


# ---- bandits

class OneRank(SimpleNamespace):
    """A World of one process."""
    rank, size, device = 0, 1, torch.device("cpu")

    def on_all_ranks(self, work):
        return work()

    def all_reduce(self, *values):
        return [*values]

    def all_gather(self, *values):
        return torch.tensor([values], dtype=torch.float64)

    def all_gather_objects(self, value):
        return [value]


def bandit(method: str, **given) -> tuple[Reinforcement, Decoder, argparse.Namespace, list]:
    """A model of seven tokens, of which 6 ends an answer. The best answer is "5, end": arm k pays k/10,
    and to end then a half."""
    def rewards(answered):
        return [0.1 * ids[0] * (ids[0] < 6) + 0.5 * (ids[1:] == [6]) for _, _, ids, _ in answered]

    options = settled(method, **{"max_new_tokens": 3, "temperature": 0.8, "group": 16, **given})
    model = Decoder(transformer(7, 16, 1, 2, 1, 24, context=16), seed=1)
    model = ppo.add_value(model) if method == "ppo" else model
    rows = [SimpleNamespace(ids=[p, 4], prompt=Prompt(Chat(f"line {p}", []), "", {})) for p in (1, 2)]
    words = SimpleNamespace(stop_ids=(6,), decode=str)
    corpus = SimpleNamespace(tokenizer=words, stream=SimpleNamespace(sources=[Prompts("bandit", rows)]))
    loss, judge = (grpo.grpo_loss, grpo.judge) if method == "grpo" else (ppo.ppo_loss, ppo.judge)
    made = Reinforcement(loss, judge, many.answers, rewards, model.eval(), model, corpus, OneRank(), options)
    return made, model, options, rows


@pytest.mark.parametrize("method, given, rounds", [
    ("grpo", {"normaliser": "dapo", "updates": 2, "beta": 0.01, "epsilon_high": 0.28}, 18),
    ("ppo", {"updates": 2, "beta": 0.01}, 18), *(pytest.param(*case, marks=pytest.mark.slow) for case in [
        ("grpo", {}, 40), ("grpo", {"normaliser": "dr_grpo"}, 40), ("ppo", {"beta": 0.0, "group": 32}, 40)])])
def test_a_bandit_is_learnt(method, given, rounds):
    """From one answer in 49 to nearly every one, on both prompts."""
    made, model, options, rows = bandit(method, **given)
    optimizer, found = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0), []
    for step in range(rounds * options.updates):
        batches, said = made.batches(model, [rows], step)
        found += [said] if said else []
        for batch in batches:
            with learning(model, 0):
                loss, _ = made.loss(model, batch, options)
                (loss / batch.divisor).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        p = (model(torch.tensor([[1, 4, 5], [2, 4, 5]])) / 0.8).softmax(-1)
    assert (p[:, 1, 5] * p[:, 2, 6]).min() > 0.8
    assert found[0]["reward"] < 0.4 and found[-1]["reward"] > 0.9 and len(found) == rounds
    assert max(said["sampler_difference_max"] for said in found) < 1e-4         # at this temperature, both


def test_samples_by_hand():
    """Of one round: tokens, masks, the end of an answer in the mask, an answer that was cut, the numbers of the log."""
    made, model, options, rows = bandit("grpo", group=2, batch_size=2, beta=0.5)
    said = iter([([1, 6], [-0.5, -0.25], False), ([2, 3, 4], [-1.0] * 3, True), ([6], [-2.0], False),
                 ([6], [-2.0], False)])
    asked = []
    made.sampler = lambda model, prompts, seeds, *_: (asked.extend(seeds), [next(said) for _ in prompts])[1]
    with pytest.warns(UserWarning, match="nats a token from the trainer's, more than 0.1"):
        (samples,), log = made.batches(model, [rows], 5)
    assert samples.tokens.tolist() == [[1, 4, 1, 6, 0], [1, 4, 2, 3, 4], [2, 4, 6, 0, 0], [2, 4, 6, 0, 0]]
    assert samples.mask.tolist() == [[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 0, 0]] and samples.divisor == 4
    a = 0.2 / (0.2 * math.sqrt(2) + 1e-4)                               # rewards 0.6 and 0.2, then 0 and 0
    assert torch.allclose(samples.advantage, torch.tensor([[a, a, 0], [-a, -a, -a], [0, 0, 0], [0, 0, 0]]), atol=1e-6)
    assert torch.allclose(samples.reference, samples.old) and len({*asked}) == 4
    assert (log["reward"], log["no_signal"], log["answer_tokens"], log["cut"]) == (
        pytest.approx(0.2), 0.5, 7 / 4, 0.25)
    assert log["reward_std"] == pytest.approx(0.08**0.5)
    apart = torch.tensor([-0.5, -0.25, 0]) - samples.old[0]
    assert log["sampler_difference_max"] >= apart.abs().max().item() - 1e-6
    other = samples.part(slice(2, 4))
    assert other.tokens.shape == (2, 3) and other.old.shape == (2, 1)
