"""GRPO against trl, PPO against cases by hand."""

from collections import defaultdict
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from nanollm.training import grpo, ppo


def trl_loss(how: str, log_p, old, mask, advantage, low, high, beta, reference, longest):
    """trl's own code, given log-probabilities in the place of a model."""
    trl = pytest.importorskip("trl")
    me = MagicMock()
    me._metrics = defaultdict(lambda: defaultdict(list))
    me.accelerator.gather = lambda x: x
    me.accelerator.num_processes = 1
    me.args = SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1)
    me._get_per_token_logps_and_entropies.return_value = log_p, torch.zeros_like(log_p), None
    for name, value in dict(
            aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, loss_type=how,
            importance_sampling_level="token", epsilon_low=low, epsilon_high=high, use_vllm=False, beta=beta,
            max_completion_length=longest, current_gradient_accumulation_steps=1, _entropy_bonus_enabled=False).items():
        setattr(me, name, value)
    inputs = {"prompt_ids": torch.zeros(len(mask), 1), "prompt_mask": torch.ones(len(mask), 1), "advantages": advantage,
              "completion_ids": torch.zeros_like(mask), "completion_mask": mask, "old_per_token_logps": old,
              "ref_per_token_logps": reference, "num_items_in_batch": mask.sum()}
    return trl.GRPOTrainer._compute_loss(me, None, inputs)


@pytest.mark.parametrize("how", grpo.NORMALISERS)
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_grpo_is_that_of_trl(how, beta):
    """Value and gradient, off policy, so that ratios are clipped on both sides; answers of unequal lengths."""
    log_p, old, reference = (-3 * torch.rand(6, 9) for _ in range(3))
    lengths = torch.tensor([9, 1, 4, 7, 9, 2])
    mask = (torch.arange(9) < lengths[:, None]).float()
    advantage = grpo.advantages(torch.randn(2, 3)).flatten()
    ours, theirs = (log_p.clone().requires_grad_() for _ in range(2))
    found = grpo.normalised(grpo.grpo(ours, old, mask, advantage, 0.2, 0.28, beta, reference), mask, how, 12)
    expected = trl_loss(how, theirs, old, mask, advantage, 0.2, 0.28, beta, reference, 12)
    found.backward()
    expected.backward()
    assert abs(found.item() - expected.item()) < 1e-6 and torch.allclose(ours.grad, theirs.grad, atol=1e-7)
    assert 0 < (ours.grad[mask > 0] == 0).float().mean() < 1 or beta         # of some tokens the ratio is clipped


def test_on_policy_the_value_is_0_and_the_gradient_is_not():
    log_p = (-torch.rand(4, 5)).requires_grad_()
    advantage = grpo.advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0]])).flatten()
    loss = grpo.normalised(grpo.grpo(log_p, log_p.detach(), torch.ones(4, 5), advantage), torch.ones(4, 5), "grpo", 5)
    loss.backward()
    assert abs(loss.item()) < 1e-7 and torch.allclose(log_p.grad, -advantage[:, None].expand(4, 5) / 20)


def test_advantages_of_a_group_by_hand():
    """Rewards 1, 2, 3: mean 2, standard deviation 1 with the divisor G − 1; equal rewards teach nothing."""
    rewards = torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]])
    assert torch.allclose(grpo.advantages(rewards), torch.tensor([[-1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]) / 1.0001)
    assert grpo.advantages(rewards, scale=False).tolist() == [[-1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]


def test_kl_is_never_below_0_and_0_where_nothing_moved():
    log_p, reference = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-1.0, -1.0, -3.0])
    expected = torch.tensor([0.0, torch.e - 1 - 1, torch.exp(torch.tensor(-2.5)) + 2.5 - 1])
    assert torch.allclose(grpo.k3(log_p, reference), expected)
    with pytest.raises(ValueError, match="normaliser 'mean'; expected one of grpo, dr_grpo, dapo"):
        grpo.normalised(torch.zeros(1, 1), torch.ones(1, 1), "mean", 1)


# ---- PPO, by hand

def test_rewards_of_tokens_by_hand():
    """β = ½. The first answer has two tokens, the second three."""
    log_p, reference = torch.tensor([[-1.0, -2, -9], [-1, -1, -1]]), torch.tensor([[-2.0, -2, 0], [-1, -3, -1.5]])
    found = ppo.token_rewards(torch.tensor([4.0, -1.0]), log_p, reference, torch.tensor([[1.0, 1, 0], [1, 1, 1]]), 0.5)
    assert found.tolist() == [[-0.5, 4.0, 0.0], [0.0, -1.0, -1.25]]


def test_gae_by_hand():
    """γ = ½, λ = ½; r = 0, 0, 1 and V = 1, 2, 3. One answer ended; one is cut there, and 4 is still to come.

    ended   δ₂ = 1 − 3 = −2          A₂ = −2              cut   δ₂ = 1 + ½·4 − 3 = 0     A₂ = 0
            δ₁ = ½·3 − 2 = −½        A₁ = −½ + ¼·(−2) = −1                             A₁ = −½
            δ₀ = ½·2 − 1 = 0         A₀ = 0 + ¼·(−1) = −¼                              A₀ = −⅛
    """
    rewards, values = torch.tensor([[0.0, 0, 1]] * 2), torch.tensor([[1.0, 2, 3]] * 2)
    advantage, aim = ppo.gae(rewards, values, torch.ones(2, 3), torch.tensor([0.0, 4.0]), 0.5, 0.5)
    assert advantage.tolist() == [[-0.25, -1.0, -2.0], [-0.125, -0.5, 0.0]]
    assert aim.tolist() == [[0.75, 1.0, 1.0], [0.875, 1.5, 3.0]]


def test_padding_behind_an_answer_changes_nothing():
    rewards, values = torch.randn(1, 4), torch.randn(1, 4)
    alone = ppo.gae(rewards, values, torch.ones(1, 4), torch.zeros(1))
    padded = ppo.gae(torch.cat([rewards, torch.full((1, 3), 9.0)], 1), torch.cat([values, torch.full((1, 3), 7.0)], 1),
                     torch.tensor([[1.0] * 4 + [0.0] * 3]), torch.zeros(1))
    for a, b in zip(alone, padded, strict=True):
        assert torch.allclose(a, b[:, :4]) and not b[:, 4:].any()
    mask = torch.tensor([[1.0] * 4 + [0.0] * 3])
    white = ppo.whitened(padded[0], mask)
    assert abs(white.sum()) < 1e-5 and abs(white[mask > 0].var() - 1) < 1e-4 and not white[mask == 0].any()


def test_with_lambda_1_the_advantage_is_the_return_less_the_value():
    """An independent formulation: G_t = Σ γᵏ r_{t+k} + γⁿ V behind the end."""
    rewards, values, after = torch.randn(3, 5), torch.randn(3, 5), torch.randn(3)
    _, aim = ppo.gae(rewards, values, torch.ones(3, 5), after, gamma=0.9, lam=1.0)
    for t in range(5):
        expected = sum(0.9 ** k * rewards[:, t + k] for k in range(5 - t)) + 0.9 ** (5 - t) * after
        assert torch.allclose(aim[:, t], expected, atol=1e-5)


def test_the_value_is_clipped_by_hand():
    """ε = 0.2, V_old = 1, G = 2. V = 1.5 would be clipped to 1.2, which is worse; V = 0.5 is worse unclipped."""
    value = torch.tensor([1.5, 0.5, 1.1]).requires_grad_()
    loss = ppo.value_loss(value, torch.ones(3), torch.full((3,), 2.0), 0.2)
    assert torch.allclose(loss, torch.tensor([0.32, 1.125, 0.405]))
    loss.sum().backward()
    assert torch.allclose(value.grad, torch.tensor([0.0, -1.5, -0.9]))       # no gain, no gradient


@pytest.mark.parametrize("ratio, advantage, gradient", [
    (1.5, 1.0, 0.0), (1.1, 1.0, -1.1), (0.5, 1.0, -0.5), (0.5, -1.0, 0.0), (1.5, -1.0, 1.5), (0.9, -1.0, 0.9)])
def test_the_policy_is_clipped_by_hand(ratio, advantage, gradient):
    """Where the step has gone too far in the direction that pays, there is no gradient; back there always is one."""
    log_p = torch.tensor([[ratio]]).log().requires_grad_()
    grpo.clipped(log_p, torch.zeros(1, 1), torch.tensor([[advantage]]), 0.2, 0.2).sum().backward()
    assert log_p.grad.item() == pytest.approx(gradient, abs=1e-6)
