"""The methods of train.py: which options ask for which loss, and which options go with it.

    --preference … --loss dpo      preferences.py, on pairs of answers or on labels
    --reward …                     reward.py, on pairs of answers
    --teacher FOLDER               distillation.py, on text or chats
    otherwise                      next_token of losses.py: text, chats

The collator of each comes with its data: corpus.py opens it.
"""

import argparse
from collections.abc import Callable

from nanollm.errors import InputError
from nanollm.model import Decoder
from nanollm.training import distillation, preferences, reward
from nanollm.training.losses import Loss, next_token

# Options of one method or another, with what each is where it is not given.
USUAL = {"label_smoothing": 0.0, "gamma": 1.0, "kto_weights": (1.0, 1.0)}
# Which losses each of them is for.
FOR = {"label_smoothing": ("dpo", "robust"), "gamma": ("simpo",), "kto_weights": ("kto",), "beta": (*preferences.BETA,)}


def loss_of(options: argparse.Namespace, vocab: int, load: Callable[[], Decoder]) -> Loss:
    """The loss of a run, of a model with this vocabulary. load: reads the model of --teacher. Raises InputError."""
    if options.teacher:
        teacher = load()
        distillation.need_same_vocabulary(teacher, vocab, str(options.teacher))
        distillation.need_room(teacher, options.context, str(options.teacher))
        return distillation.distillation(teacher, options.distill or "forward")
    if options.reward:
        return reward.reward_loss
    if not options.preference:
        return next_token
    return preferences.label_loss if options.loss == "kto" else preferences.preference_loss


def compares(options: argparse.Namespace) -> bool:
    """Whether a run learns from answers that are compared."""
    return bool(options.preference or options.reward)


def extended(model: Decoder, options: argparse.Namespace) -> Decoder:
    """The model with what its method adds to it, in place."""
    return reward.add_score(model, options.seed) if options.reward else model


def check(options: argparse.Namespace) -> None:
    """Raise InputError for options that do not go together, before anything is read; set those of USUAL."""
    if options.preference:
        check_data(options, "--preference")
        check_loss(options)
    elif given := [name for name in ("loss", *FOR) if getattr(options, name) is not None]:
        raise InputError(f"--{given[0].replace('_', '-')} goes with --preference")
    if options.distill and not options.teacher:
        raise InputError(f"--distill {options.distill} is for a teacher: give its folder with --teacher")
    if options.teacher and options.z_loss:
        raise InputError("--teacher with --z-loss: the loss is a divergence of two distributions, of which log Z is no "
                         "part; leave --z-loss out")
    if options.reward:
        check_data(options, "--reward")
        options.sample_every = 0                                # what a reward model would write is of no interest


def check_loss(options: argparse.Namespace) -> None:
    """Settle --loss and its numbers. Raises InputError."""
    options.loss = options.loss or "dpo"
    for name, losses in FOR.items():
        if getattr(options, name) is not None and options.loss not in losses:
            raise InputError(f"--{name.replace('_', '-')} goes with --loss {', '.join(losses)}; found {options.loss}")
    if options.beta == 0:
        raise InputError("--beta 0: nothing would be learnt; expected a number above 0")
    if options.loss == "robust" and not 0 < (options.label_smoothing or 0) < 0.5:
        raise InputError("--loss robust: give --label-smoothing, the share of wrong labels, above 0 and below 0.5")
    for name, value in USUAL.items():
        if getattr(options, name) is None and options.loss in FOR[name]:
            setattr(options, name, value)


def check_data(options: argparse.Namespace, method: str) -> None:
    """Raise InputError for options that do not go with answers that are compared."""
    if not options.init:
        raise InputError(f"{method} tunes a model that exists: name its folder with --init")
    for name in ("reward", "chat", "data", "teacher", "plan", "z_loss"):
        if getattr(options, name) and method != f"--{name}":
            raise InputError(f"{method} with --{name.replace('_', '-')}: expected one of them")
    if options.long == "truncate":
        raise InputError("--long truncate: half an answer is not the one that was judged; expected drop or error")
