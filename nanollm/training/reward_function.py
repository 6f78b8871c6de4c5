"""The reward of an answer: by a function of the user's, or by a reward model.

    def three_words(completions, **columns):                                rewards.py in the working folder
        return [float(len(text.split()) == 3) for text in completions]      --reward-function rewards:three_words

The function is called as trl calls its own, all by name: `prompts`, `completions` and `completion_ids`, and each column
of the prompts' file, lists with one entry an answer. Prompts that were given as text have texts for completions, those
given as messages have lists of one message. It returns a number for each. What trl passes beyond the columns
(trainer_state, log_extra, log_metric) it does not get here. A process calls it once for all of its answers of a step.

Whatever the module does when it is imported is done: this runs the user's code, and the user's alone. It is looked for
among what is installed and in the working folder, and nowhere else.
"""

import importlib
import inspect
import json
import math
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from nanollm.data.prompts import Prompt
from nanollm.errors import InputError, RunError, did_you_mean
from nanollm.model import Decoder
from nanollm.training import reward

# (prompt, what was answered, its ids, prompt and answer as ids) of each → a reward each
Answered = tuple[Prompt, str, list[int], list[int]]
Rewards = Callable[[Sequence[Answered]], list[float]]
TAKEN = ("prompts", "completions", "completion_ids")            # what a function gets beside the columns
LIBRARIES = tuple(sysconfig.get_path(name) for name in ("stdlib", "platlib", "purelib"))


def find(name: str) -> Callable[..., Any]:
    """The function of --reward-function. Raises InputError."""
    module, colon, function = name.partition(":")
    if module.endswith(".py"):
        plain = os.path.normpath(module.removesuffix(".py")).replace(os.sep, ".")
        raise InputError(f"--reward-function {name}: expected a module, which is imported, and not its file: leave out "
                         f".py: {plain}:{function or 'NAME'}")
    if not colon or not all(part.isidentifier() for part in (*module.split("."), function)):
        raise InputError(f"--reward-function {name}: expected MODULE:NAME, such as rewards:three_words for a function "
                         "three_words in rewards.py, in the working folder or installed")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())            # last, so that no file of the user's hides a library of ours
    try:
        found = importlib.import_module(module)
    except Exception as error:                  # of any kind: it is the user's code
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            near = did_you_mean(module, [path.stem for path in Path().glob("*.py")])
            raise InputError(f"--reward-function {name}: no module {error.name}; expected one in {os.getcwd()}, or one "
                             f"that is installed{near}") from None
        raise InputError(f"--reward-function {name}: importing {module} failed: {described(error)}") from error
    if not callable(getattr(found, function, None)):
        there = [key for key, value in vars(found).items() if callable(value) and not key.startswith("_")]
        raise InputError(f"--reward-function {name}: {getattr(found, '__file__', module)} has no function {function}; "
                         f"there {'are' if len(there) > 1 else 'is'} {', '.join(there) or 'none'}")
    chosen: Callable[..., Any] = getattr(found, function)
    if problem := refused(chosen, dict.fromkeys(TAKEN), whole=False):
        raise InputError(f"--reward-function {name}: {problem}")
    return chosen


def refused(function: Callable[..., Any], given: dict[str, Any], whole: bool) -> str | None:
    """Why a function cannot be called with these, by name, for a message; None where it can. whole: it gets no more."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):             # one that is not written in Python
        return None
    try:
        (signature.bind if whole else signature.bind_partial)(**given)
    except TypeError as error:
        code = getattr(function, "__code__", None)
        where = f" ({code.co_filename}, line {code.co_firstlineno})" if code else ""
        return (f"it is called with {', '.join(given)} by name, and {error}{where}; expected def "
                f"{getattr(function, '__name__', 'f')}(prompts, completions, completion_ids, **columns)")
    return None


def by_function(name: str) -> Rewards:
    """The rewards of --reward-function. They raise RunError where the function fails, or returns what is no reward."""
    function = find(name)

    def rewards(answered: Sequence[Answered]) -> list[float]:
        prompts = [prompt for prompt, *_ in answered]
        columns = {key: [prompt.columns.get(key) for prompt in prompts]
                   for key in dict.fromkeys(key for prompt in prompts for key in prompt.columns)}
        given = {"prompts": [prompt.given for prompt in prompts],
                 "completions": [prompt.answer(text) for prompt, text, *_ in answered],
                 "completion_ids": [ids for _, _, ids, _ in answered], **columns}
        if problem := refused(function, given, whole=True):
            raise RunError(f"--reward-function {name}: {problem}")
        try:
            found = function(**given)
            found = found.tolist() if hasattr(found, "tolist") else found
            found = [*found] if isinstance(found, Iterable) else found
        except Exception as error:              # of any kind: it is the user's code
            raise RunError(f"--reward-function {name}: {described(error)}") from error
        if not isinstance(found, list):
            raise RunError(f"--reward-function {name}: returned {found!r}; expected a list of {len(answered)} numbers, "
                           "one for each answer")
        if len(found) != len(answered):
            raise RunError(f"--reward-function {name}: returned {len(found)} rewards for {len(answered)} answers; "
                           "expected one each")
        for value, (prompt, text, *_) in zip(found, answered, strict=True):
            if not isinstance(value, (int, float)) or not math.isfinite(value):
                raise RunError(f"--reward-function {name}: returned {value!r} for the answer {json.dumps(text[:80])} "
                               f"to {prompt.chat.where}; expected a finite number")
        return [float(value) for value in found]

    return rewards


def need_score(folder: Path) -> None:
    """Raise InputError where a folder is not that of a run with --reward."""
    if not (folder / reward.FILE).exists():
        raise InputError(f"--reward-model {folder}: has no {reward.FILE}; expected the folder of a run with --reward")


def by_model(folder: Path, vocab: int, load: Callable[..., Decoder]) -> Rewards:
    """The rewards of --reward-model, the run folder of a run with --reward. load: reads a folder, beside an adapter.
    Raises InputError and RunError."""
    need_score(folder)
    base, adapter = str(folder), folder / "adapter_config.json"
    if adapter.exists():
        base = json.loads(adapter.read_text())["base_model_name_or_path"]
    model = reward.read(load(base, adapter=folder if adapter.exists() else None), folder).eval().requires_grad_(False)
    if model.config.vocab != vocab:
        raise InputError(f"--reward-model {folder}: has a vocabulary of {model.config.vocab}, the model one of {vocab};"
                         " expected one with the same tokenizer")
    device = model.embed.weight.device

    def rewards(answered: Sequence[Answered]) -> list[float]:
        found = list[float]()
        for *_, whole in answered:              # one by one: no padding, and the same number whatever stands beside it
            with torch.no_grad():
                one = reward.rewards(model, *(torch.tensor([each], device=device) for each in (whole, len(whole))))
            found += one.tolist()
        return found

    return rewards


def described(error: Exception) -> str:
    """An error of the user's code, and the last line of it that was at work: what it calls of a library is not it."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{type(error).__name__}: {error.msg} ({error.filename}, line {error.lineno})"
    lines = [at for at in traceback.extract_tb(error.__traceback__)
             if not at.filename.startswith("<") and at.filename not in (__file__, importlib.__file__)]
    own = [at for at in lines if not at.filename.startswith(LIBRARIES)] or lines
    where = f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {error}{where}"
