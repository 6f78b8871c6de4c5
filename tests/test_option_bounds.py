"""Numbers on the command line that no machine can hold: one line that names the bound, before memory is taken."""

import sys

import pytest

from checkpoints import compare
from checkpoints.show.__main__ import run as show
from nanollm.data import prepare
from nanollm.errors import InputError
from nanollm.training import options

HUGE = "99999999999999999999"


@pytest.mark.parametrize("run, args", [
    (show, ["llama-toy", "--context", HUGE]), (show, ["llama-toy", "--context", "9223372036854775807"]),
    (compare.run, ["folder", "--tokens", HUGE]), (compare.run, ["folder", "--batch", "0"]),
    (compare.run, ["folder", "--seed", HUGE]), (prepare.run, ["--out", "folder", "--vocab", HUGE]),
    (prepare.run, ["--out", "folder", "--vocab", "300", "--shard-tokens", HUGE]),
    *((lambda: options.parse("", sys.argv[1:]), [option, HUGE])
      for option in ("--context", "--steps", "--batch-size", "--world-size", "--seed", "--vocab")),
])
def test_a_number_beyond_every_machine(monkeypatch, capsys, run, args):
    monkeypatch.setattr(sys, "argv", ["command", *args])
    with pytest.raises(SystemExit):
        run()
    assert f"argument {args[-2]}: {args[-1]}: expected a whole number from " in capsys.readouterr().err


@pytest.mark.parametrize("batch, tokens, expected", [
    (2, 100_000_000, "1 row of 1 to 2048 tokens"), (10_000, 48, "at most 65536 tokens in all"),
])
def test_random_tokens_have_a_bound(batch, tokens, expected):
    with pytest.raises(InputError, match=expected):
        compare.need_bounds(2048, batch, tokens)
    compare.need_bounds(None, 2, 48)
