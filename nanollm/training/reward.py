"""A reward model: a decoder that reads a prompt and an answer, and says in one number how good the answer is.

    r(x, y) = w · h_T                     h_T what the head reads at the last token of the answer, w (D,)
    P(y_w better than y_l) = σ(r_w − r_l)                                   Bradley & Terry 1952
    loss = −log σ(r_w − r_l − m)          Ouyang et al. 2022 (arXiv 2203.02155) eq. 1; the margin m, by how much the
                                          answer was found better: Touvron et al. 2023 (arXiv 2307.09288) eq. 2

Only differences count: a constant added to all rewards changes nothing, so w has no bias. h_T is taken at the last
token that is *not padding*, which is the stop id of the answer: a padding id may be the same id, so it is counted and
not looked for. The product is in float32, whatever the dtype of the decoder.

A run folder has the decoder, or its adapter, as every run writes it, and beside it score.safetensors with w as
"weight", (1, D): transformers' AutoModelForSequenceClassification with num_labels=1 calls this Linear `score`.

Shapes: B pairs, T tokens, D width.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from nanollm.data.preferences import PairBatch
from nanollm.errors import RunError
from nanollm.init import normal, stream
from nanollm.model import Decoder

FILE = "score.safetensors"


class Score(nn.Module):
    """w of the equation."""
    INIT = {"weight": normal(0.02)}

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, dim))

    def forward(self, hidden: Tensor) -> Tensor:                # (…, D) → (…,) float32
        return (hidden.float() @ self.weight.float().T)[..., 0]


def add_score(model: Decoder, seed: int) -> Decoder:
    """Give a decoder a Score as `model.score`, in place, unless it has one, and return it. Its first values follow from
    the seed."""
    if not hasattr(model, "score"):
        with model.embed.weight.device:
            model.score = Score(model.config.dim)
        weight = model.score.weight
        if not weight.is_meta:
            weight.data.normal_(0, 0.02, generator=stream("score.weight", seed, weight.device))
    return model


def rewards(model: Decoder, tokens: Tensor, lengths: Tensor) -> Tensor:
    """tokens (B, T), padded at the end, lengths (B,) → the reward of each sequence (B,)."""
    assert isinstance(model.score, Score)
    hidden = model.hidden(tokens)
    return model.score(hidden[torch.arange(len(tokens), device=tokens.device), lengths - 1])


def bradley_terry(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """r_w, r_l (B,) → (B,)."""
    return -F.logsigmoid(chosen - rejected - margin)


def reward_loss(model: Decoder, batch: PairBatch, options: argparse.Namespace) -> tuple[Tensor, dict[str, Tensor]]:
    """The method of --reward: see losses.py. For the log: how often the better answer has the larger reward."""
    chosen, rejected = rewards(model, batch.tokens, batch.lengths).chunk(2)
    losses, difference = bradley_terry(chosen, rejected, batch.margins), chosen - rejected
    said = {"loss": losses, "margin": difference, "accuracy": (difference > 0).float()}
    return losses.sum(), {key: value.detach().sum() for key, value in said.items()}


# ---- on disk

def taken_off(model: Decoder) -> Score | None:
    """The Score of a model, which is a plain decoder again; None where it has none. The value head of PPO is of no use
    without its run, and goes."""
    score = getattr(model, "score", None)
    for name in ("score", "value"):
        if hasattr(model, name):
            delattr(model, name)
    return score


def write(score: Score | None, folder: Path) -> None:
    """Put a Score, where there is one, into the folder of its model."""
    if score is not None:
        save_file({"weight": score.weight.detach().float().contiguous()}, folder / FILE, {"format": "pt"})


def read(model: Decoder, folder: Path) -> Decoder:
    """Give a decoder the Score of a run folder, in place, and return it. Raises RunError."""
    try:
        weight = load_file(folder / FILE)["weight"]
    except (OSError, KeyError) as error:
        raise RunError(f"{folder / FILE}: cannot be read: {error}; expected that of a run with --reward") from None
    if weight.shape != (1, model.config.dim):
        raise RunError(f"{folder / FILE}: is for a width of {weight.shape[-1]}, the model has {model.config.dim}")
    add_score(model, 0).score.weight.data.copy_(weight)         # type: ignore[union-attr, operator]
    return model
