"""Distillation: a student learns the whole distribution of a teacher over the next token, not the token alone.

    forward    KL(t ‖ s) = Σ_v t_v (log t_v − log s_v)       the student covers what the teacher finds likely
                                                             Hinton et al. 2015 (arXiv 1503.02531) §2, T of 1
    reverse    KL(s ‖ t) = Σ_v s_v (log s_v − log t_v)       the student keeps to what the teacher finds likely,
                                                             not all of it: Gu et al. 2023 (arXiv 2306.08543) §2.1

Both are of every target of the rows (text, or the answers of chats), and their sum is divided by the targets of the
step. The teacher is frozen; teacher and student share a vocabulary.

The logits of both would be the largest tensors of a step: PIECE of them are in memory, and the backward pass makes them
again (log_probs.py does the same).

Shapes: n targets, V vocabulary, D width of the student, D' of the teacher.
"""

import argparse
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nanollm.data.stream import Batch
from nanollm.errors import InputError
from nanollm.model import Decoder
from nanollm.training import growing
from nanollm.training.cross_entropy import PIECE
from nanollm.training.losses import Loss

KINDS = ("forward", "reverse")


def divergence(student: Tensor, teacher: Tensor, kind: str) -> Tensor:
    """Logits (n, V) of both → KL of each (n,), float32."""
    s, t = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    return (t.exp() * (t - s)).sum(-1) if kind == "forward" else (s.exp() * (s - t)).sum(-1)


def distillation(teacher: Decoder, kind: str) -> Loss:
    """The method with this teacher: see losses.py. The loss of the log is the KL, nats per target."""
    teacher = teacher.eval().requires_grad_(False)

    def loss(model: Decoder, batch: Batch, options: argparse.Namespace) -> tuple[Tensor, dict[str, Tensor]]:
        judged = batch.targets >= 0
        hidden = model.hidden(batch.tokens, batch.positions)[judged]                # (n, D)
        with torch.no_grad():
            known = teacher.hidden(batch.tokens, batch.positions)[judged]           # (n, D')
        rows = max(1, PIECE // teacher.config.vocab)
        parts: list[Any] = [
            checkpoint(piece, model.head.product(hidden[at : at + rows]), model.head.softcap, teacher,
                       known[at : at + rows], kind, use_reentrant=False) for at in range(0, len(hidden), rows)]
        total = torch.stack(parts).sum()
        return total, {"loss": total.detach()}

    return loss


def piece(product: tuple[Tensor, Tensor], softcap: float | None, teacher: Decoder, known: Tensor, kind: str) -> Tensor:
    """KL of a few targets, summed, with all their logits."""
    logits = torch.nn.functional.linear(*product).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    with torch.no_grad():
        theirs = teacher.head(known)
    return divergence(logits, theirs, kind).sum()


def need_same_vocabulary(teacher: Decoder, vocab: int, name: str) -> None:
    """Raise InputError where teacher and student do not share a vocabulary."""
    if teacher.config.vocab != vocab:
        raise InputError(f"--teacher {name}: has a vocabulary of {teacher.config.vocab}, the model one of {vocab}; "
                         "expected a teacher with the same tokenizer")


def need_room(teacher: Decoder, context: int, name: str) -> None:
    """Raise InputError where rows are longer than what the teacher was made for."""
    most = growing.reach(teacher.config)
    if most and context > most:
        raise InputError(f"--teacher {name}: made for {most} tokens, --context is {context}; what it says of later "
                         f"ones is not to be learnt: give --context {most}, or another teacher")
