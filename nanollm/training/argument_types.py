"""What an argument of train.py may be: functions that argparse calls on its text."""

import argparse
import math

from nanollm import cli

whole, whole_or_0 = cli.whole(), cli.whole(0)


def rate(text: str) -> float:
    """A number from 0 on, for an option."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: expected a finite number, 0 or more")
    return value


def above_0(text: str) -> float:
    """A number above 0, for an option."""
    if not (value := rate(text)):
        raise argparse.ArgumentTypeError(f"{text}: expected a number above 0")
    return value


def share(text: str) -> float:
    """A number from 0 on, below 1, for an option."""
    if (value := rate(text)) >= 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a number from 0 on, below 1")
    return value


def which(text: str) -> str:
    """last, best or a step, for --export."""
    if text not in ("last", "best") and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text}: expected last, best or the number of a step")
    return text


def column(text: str) -> str:
    """name=column, for an option."""
    name, _, column = text.partition("=")
    if not (name and column):
        raise argparse.ArgumentTypeError(f"{text}: expected NAME=COLUMN, such as prompt=question")
    return text


def span(text: str) -> tuple[int, int]:
    """Two steps a:b with a < b, for an option."""
    a, colon, b = text.partition(":")
    if not colon or not a.isdigit() or not b.isdigit() or int(a) >= int(b):
        raise argparse.ArgumentTypeError(f"{text}: expected a:b with a < b, which skips steps a+1 … b")
    return int(a), int(b)
