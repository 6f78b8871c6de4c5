"""The project's own errors. Each message names the file, key or tensor, what was found and what was expected.

Names and values in a message were chosen by whoever wrote the file: a tensor may be called a million letters, or what
clears a terminal, or half a surrogate pair, which no terminal can print. So long lines are cut in the middle, and what
is not printable is spelled out.
"""

import difflib
from collections.abc import Iterable

WIDEST = 900                    # characters of a line
MOST = 64                       # lines


class NanollmError(Exception):
    """Base of every error that nanollm raises on purpose: bad input, never a bug of ours."""
    alone = False               # of the ranks of a run only this one met it

    def __init__(self, message: str = "") -> None:
        super().__init__("\n".join(_cut(_spelled(_cut(line))) for line in message.split("\n")[:MOST]))


def counted(count: int, noun: str) -> str:
    """A number and what is counted, for a message: 1 tensor, 2,048 tensors."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def did_you_mean(typed: str, known: Iterable[str]) -> str:
    """The end of a message on a word that there is not: what begins with it, or with all of it but the last letter, or
    else the one that is spelled most like it. "" where there is none.

    >>> did_you_mean("--temp", ["--temperature", "--template", "--top-k"])
    '; did you mean --temperature or --template?'
    """
    names = {name.lstrip("-/"): name for name in known}      # what all begin with makes no two alike
    word = typed.lstrip("-/")
    found = [name for bare, name in names.items() if word and bare.startswith(word)]
    if not found and len(word) > 3:
        found = [name for bare, name in names.items() if bare.startswith(word[:-1])]
    found = found or [names[bare] for bare in difflib.get_close_matches(word, names, 1, cutoff=0.7)]
    return f"; did you mean {' or '.join(found[:3])}?" if found else ""


def _cut(line: str) -> str:
    return line if len(line) <= WIDEST else f"{line[: WIDEST // 2]} … {line[-WIDEST // 2 + 3 :]}"


def _spelled(line: str) -> str:
    return line if line.isprintable() else "".join(char if char.isprintable() else repr(char)[1:-1] for char in line)


class ConfigError(NanollmError):
    """A model configuration that is impossible, or that asks for something not implemented."""


class CheckpointError(NanollmError):
    """A folder of weights that is damaged, incomplete, or not what its config says."""


class TokenizerError(NanollmError):
    """A tokenizer file or a chat template that cannot be used."""


class InputError(NanollmError):
    """An argument that the model or the sampler cannot honour: a token out of range, a cache that is full."""


class RunError(NanollmError):
    """A training run that cannot begin or cannot go on: its folder, its checkpoints, its numbers."""


class DataError(NanollmError):
    """Text or token shards that cannot be read or trained on: a damaged file, a wrong format, too little of it."""
