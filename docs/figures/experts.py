"""The load of experts: a router on random tokens, and what the balance loss makes of it.

    balance = E · Σ_e f_e P_e       f: share of the tokens that chose e, P: mean probability of e
                                    Fedus et al. 2021 (arXiv 2101.03961) eq. 4; `Balance` in nanollm/training/losses.py

Tokens have a common part, as hidden states do, so a router that was drawn at random prefers the same few experts for
all of them. No model is trained here: the router takes STEPS steps down the gradient of the balance loss alone.
"""

import torch
from torch import nn

from docs.figures.drawing import Axes, Picture, normal
from nanollm.config import MLP
from nanollm.config import MoE as MoEConfig
from nanollm.layers.moe import MoE
from nanollm.training.losses import Balance

EXPERTS, TOP_K, DIM, TOKENS, STEPS = 8, 2, 16, 512, 60


def draw() -> Picture:
    """Two panels."""
    before, after, losses = balanced()
    picture = Picture(770, 308, "The load of eight experts, before and after the balance loss, and the loss by step")
    load = Axes(picture, (56, 68, 378, 184), (0, 9), (0, 0.8))
    load.ticks([(e + 1, str(e)) for e in range(EXPERTS)], [(y / 4, f"{y / 4:.0%}") for y in range(4)])
    load.named("Load", "expert", f"share of {TOKENS} tokens that visit it, {TOP_K} of {EXPERTS} each")
    load.bars([(e + 0.8, share) for e, share in enumerate(before)], "b", 16)
    load.bars([(e + 1.2, share) for e, share in enumerate(after)], "a", 16)
    load.curve([(0, TOP_K / EXPERTS), (9, TOP_K / EXPERTS)], "f dash")
    for y, kind, words in ((84, "b", "router as drawn"), (102, "a", f"after {STEPS} steps"), (120, "dim", "– –  even")):
        picture.text(430, y, words, f"end small {kind}")
    loss = Axes(picture, (510, 68, 220, 184), (0, STEPS), (1.9, 3.1))
    loss.ticks([(x, str(x)) for x in (0, 20, 40, 60)], [(y / 2, f"{y / 2:g}") for y in range(4, 7)])
    loss.named("Balance loss", "step", f"E Σ f P, {TOP_K} where the load is even")
    loss.curve(enumerate(losses), "a")
    return picture


def balanced() -> tuple[list[float], list[float], list[float]]:
    """f before and after, and the balance loss of each step."""
    moe = MoE(MoEConfig(EXPERTS, TOP_K, MLP(1), renormalize=True), DIM)
    common = torch.tensor(normal(1, DIM, seed=1))
    tokens = torch.tensor(normal(TOKENS, DIM, seed=2)) + 1.4 * common
    moe.router.weight = nn.Parameter(torch.tensor(normal(EXPERTS, DIM, seed=3)) * 0.2)
    balance, loads, losses = Balance(moe), [], []
    for step in range(STEPS + 1):
        loss = balance.loss([moe.router(tokens)], None) / TOKENS
        losses.append(balance.close(lambda *sums: [*sums]))
        loads.append(balance.shares[0])
        if step:                            # the gradient needs the shares of the step before
            slope, = torch.autograd.grad(loss, moe.router.weight)
            moe.router.weight.data -= 0.02 * slope
    return loads[0], loads[-1], losses
