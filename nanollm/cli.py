"""What all commands share: an unknown option comes with a suggestion, a warning is one line, bad input ends in one line
and exit code 1, and so does a file that the system does not let us read or write, or a full disk."""

import argparse
import errno
import io
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, NoReturn

from nanollm.errors import NanollmError, did_you_mean

LARGE = 1 << 31                 # of a number of tokens, rows or steps: sizes beyond it overflow 64 bits when multiplied
FULL = (errno.ENOSPC, errno.EDQUOT)
SEEDS = (-(1 << 63), (1 << 63) - 1)


class Parser(argparse.ArgumentParser):
    """argparse that does not guess: options are written out, and a misspelt one is answered with the nearest."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)
        # what begins like a negative number is a value, -5GB too: its option says what is wrong with it
        self._negative_number_matcher = re.compile(r"-\.?\d")

    def parse_args(  # type: ignore[override]  # argparse also takes a namespace of another class; nobody here has one
        self, args: Sequence[str] | None = None, namespace: None = None
    ) -> argparse.Namespace:
        """As argparse does, but an unknown option is answered with the nearest that is known."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"unknown option {unknown[0]}{self.nearest(unknown[0].split('=')[0])}")
        return parsed

    def error(self, message: str) -> NoReturn:
        """In one line; argparse would print all options before it."""
        self.exit(2, f"{self.prog}: error: {message}\n")

    def nearest(self, option: str) -> str:
        """The end of the message: which option may have been meant."""
        known = [known for action in self._actions for known in action.option_strings]
        return did_you_mean(option, known) or "; --help lists them"


class Once(argparse.Action):
    """An option of which a second would replace the first, unseen: that is an error."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any,
                 option: str | None = None) -> None:
        """Keep the value."""
        if getattr(namespace, self.dest) is not None:
            parser.error(f"{option} twice: expected one")
        setattr(namespace, self.dest, values)


def whole(low: int = 1, high: int = LARGE) -> Callable[[str], int]:
    """The type of an option that is a whole number, for argparse, which ends the process for one out of bounds."""
    def read(text: str) -> int:
        value = int(text.replace("_", ""))
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text}: expected a whole number from {low} to {high}")
        return value

    read.__name__ = "int"                                  # argparse says: invalid int value
    return read


def one_line(message: Warning | str, category: type[Warning], filename: str, lineno: int, *more: Any) -> None:
    """In place of warnings.showwarning: without the line of our code that gave it, but for Python's own kinds."""
    where = "warning" if category is UserWarning else f"{filename}:{lineno}: {category.__name__}"
    print(f"{where}: {message}", file=sys.stderr, flush=True)


def quiet_ctrl_c() -> None:
    """End without a traceback on a Ctrl-C that comes before `main`: while torch is imported, which takes seconds."""
    usual = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            raise SystemExit(130)
        usual(kind, error, trace)

    sys.excepthook = hook


def main(run: Callable[[], None]) -> None:
    """Run a script: an error of our own becomes one line on standard error, Ctrl-C a quiet end, a warning `warning: …`.

    Where all ranks of a run fail alike, only the first prints the error.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):           # a terminal that has no é is shown \xe9
            stream.reconfigure(errors="backslashreplace")
    ending: str | int = 0
    try:
        with warnings.catch_warnings():
            warnings.showwarning = one_line      # type: ignore[assignment]
            run()
            if sys.stdout is not None:                     # closed: `>&-`
                sys.stdout.flush()                         # a full disk or a closed pipe is met here, not after the end
    except NanollmError as error:
        ending = f"error: {error}" if error.alone or os.environ.get("RANK", "0") == "0" else 1
    except PermissionError as error:
        ending = f"error: {error.filename or 'a file'}: {error.strerror or 'permission denied'}"
    except KeyboardInterrupt:
        ending = 130
    except BrokenPipeError:                                # `… | head` has seen enough
        _give_up_output()
    except OSError as error:
        if error.errno not in FULL:
            raise
        ending = f"error: {error.filename or _full()}: {error.strerror}"
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # Not by way of Python's own end: a thread of gloo that wants the interpreter then is cut off, and brings the
        # process down (SIGABRT)
        if isinstance(ending, str):
            print(ending, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1 if isinstance(ending, str) else ending)
    if ending:
        sys.exit(ending)


def _full() -> str:
    """What was written to when a disk turned out to be full: the system does not say."""
    try:
        sys.stdout.flush()
    except OSError:
        _give_up_output()
        return "standard output"
    return "standard output or a file"


def _give_up_output() -> None:
    """Let what is still to be printed go nowhere: at its end Python would try again, and complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
