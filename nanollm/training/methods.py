"""The methods of train.py: which options ask for which loss, and which options go with it.

    --preference … --loss dpo      preferences.py, on pairs of answers or on labels
    --reward …                     reward.py, on pairs of answers
    --grpo …, --ppo …              grpo.py, ppo.py, on answers that the model gives to prompts (rollouts.py)
    --teacher FOLDER               distillation.py, on text or chats
    otherwise                      next_token of losses.py: text, chats

The collator of each comes with its data: corpus.py opens it.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanollm.errors import InputError
from nanollm.model import Decoder
from nanollm.training import distillation, grpo, ppo, preferences, reward, reward_function
from nanollm.training.corpus import Corpus
from nanollm.training.distributed import World
from nanollm.training.losses import Loss, next_token
from nanollm.training.method import Method
from nanollm.training.rollouts import Reinforcement, Sampler

# Options of one method or another, with what each is where it is not given.
USUAL = {"label_smoothing": 0.0, "gamma": 1.0, "kto_weights": (1.0, 1.0)}
# Of reinforcement, by method.
SHARED = {"max_new_tokens": 256, "temperature": 1.0, "updates": 1, "epsilon": 0.2, "epsilon_high": 0.2,
          "reward_function": None, "reward_model": None}
REINFORCEMENT: dict[str, dict[str, Any]] = {
    "grpo": {"group": 8, "normaliser": "grpo", "beta": 0.0, **SHARED},
    "ppo": {"group": 1, "gae_lambda": 0.95, "value_weight": 0.1, "beta": 0.05, **SHARED},
}
# Which losses each of them is for.
FOR = {"label_smoothing": ("dpo", "robust"), "gamma": ("simpo",), "kto_weights": ("kto",), "beta": (*preferences.BETA,)}


def method_of(options: argparse.Namespace, world: World, model: Decoder, blank: Decoder, corpus: Corpus,
              load: Callable[..., Decoder], sampler: Sampler) -> Method:
    """The method of a run, whose model has its first weights. load: reads a model from a folder; sampler: answers
    prompts. Raises InputError."""
    if options.grpo or options.ppo:
        vocab = model.config.vocab
        rewards = (reward_function.by_function(options.reward_function) if options.reward_function
                   else world.on_all_ranks(lambda: reward_function.by_model(options.reward_model, vocab, load)))
        loss, judge = (grpo.grpo_loss, grpo.judge) if options.grpo else (ppo.ppo_loss, ppo.judge)
        return Reinforcement(loss, judge, sampler, rewards, model, blank, corpus, world, options)
    return Method(loss_of(options, model.config.vocab, lambda: load(options.teacher)))


def loss_of(options: argparse.Namespace, vocab: int, load: Callable[[], Decoder]) -> Loss:
    """The loss on rows of the corpus, of a model with this vocabulary. load: reads the model of --teacher. Raises
    InputError."""
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


def files(options: argparse.Namespace) -> list[Path]:
    """The files of a run that learns from answers which are compared or rewarded; else none."""
    return options.preference or options.reward or options.grpo or options.ppo or []


def extended(model: Decoder, options: argparse.Namespace) -> Decoder:
    """The model with what its method adds to it, in place."""
    if options.ppo:
        return ppo.add_value(model)
    return reward.add_score(model, options.seed) if options.reward else model


def check(options: argparse.Namespace) -> None:
    """Raise InputError for options that do not go together, before anything is read; set those of USUAL."""
    if options.preference:
        check_data(options, "--preference")
        check_loss(options)
    elif given := [name for name in ("loss", *FOR) if getattr(options, name) is not None
                   and not (name == "beta" and (options.grpo or options.ppo))]:
        raise InputError(f"--{given[0].replace('_', '-')} goes with --preference")
    if options.distill and not options.teacher:
        raise InputError(f"--distill {options.distill} is for a teacher: give its folder with --teacher")
    if options.teacher and options.z_loss:
        raise InputError("--teacher with --z-loss: the loss is a divergence of two distributions, of which log Z is no "
                         "part; leave --z-loss out")
    if options.reward:
        check_data(options, "--reward")
        options.sample_every = 0                                # what a reward model would write is of no interest
    check_reinforcement(options)


def check_reinforcement(options: argparse.Namespace) -> None:
    """Settle the options of --grpo and --ppo, and find the reward function. Raises InputError."""
    name = "grpo" if options.grpo else "ppo" if options.ppo else None
    if name is None:
        options.updates = options.updates or 1                  # what a run's record says of other methods, too
        if given := [each for usual in REINFORCEMENT.values() for each in usual if each != "beta"
                     and getattr(options, each) is not None and (each, getattr(options, each)) != ("updates", 1)]:
            raise InputError(f"--{given[0].replace('_', '-')} goes with --grpo or --ppo")
        return
    check_data(options, f"--{name}")
    if bool(options.reward_function) == bool(options.reward_model):
        raise InputError(f"--{name}: give --reward-function MODULE:NAME, or --reward-model FOLDER; one of them")
    if options.reward_function:
        reward_function.find(options.reward_function)
    else:
        reward_function.need_score(options.reward_model)
    for other in ("compile", "offload"):
        if getattr(options, other):
            raise InputError(f"--{name} with --{other}: answers are sampled from the weights as they lie on one "
                             f"device; leave --{other} out")
    usual = REINFORCEMENT[name]
    every = {each for some in REINFORCEMENT.values() for each in some}
    if wrong := sorted(each for each in every - {*usual} if getattr(options, each) is not None):
        raise InputError(f"--{wrong[0].replace('_', '-')} does not go with --{name}")
    if options.epsilon_high is None:
        options.epsilon_high = 0.28 if options.normaliser == "dapo" else options.epsilon
    for each, value in usual.items():
        if getattr(options, each) is None:
            setattr(options, each, value)
    if options.grpo and options.group < 2:
        raise InputError("--group 1: an answer is compared with others to its prompt; expected 2 or more")


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
    for name in ("reward", "grpo", "ppo", "chat", "data", "teacher", "plan", "z_loss"):
        if getattr(options, name) and method != f"--{name}":
            raise InputError(f"{method} with --{name.replace('_', '-')}: expected one of them")
    if options.long == "truncate":
        raise InputError("--long truncate: half an answer is not the one that was judged; expected drop or error")
