"""Deltas: what tuning added to a model, published where the model itself may not be (Vicuna v0 and v1.1, Alpaca).

    python -m checkpoints.delta make BASE TUNED OUT          OUT = TUNED − BASE
    python -m checkpoints.delta apply BASE DELTA OUT         OUT = BASE + DELTA

    sums       in float32, a tensor at a time, rounded to the dtype that the tensor has in TUNED or DELTA (or --dtype).
               In 16 bits TUNED − BASE is rounded, so BASE + (TUNED − BASE) often differs from TUNED in its last bits.
               make --dtype float32 takes twice the room and rounds at 2⁻²⁴ of the larger one: nearly all bits stay
    new rows   TUNED may have more tokens than BASE. For them BASE counts as 0, as in FastChat up to 0.1.9 (its [PAD]),
               or with --new-rows mean as the mean of its rows, as in Alpaca's weight_diff.py
    config     OUT has config.json and tokenizer of TUNED or DELTA. Where BASE's config says something else, a warning
               names it

FastChat, fastchat/model/apply_delta.py and make_delta.py; Stanford Alpaca, weight_diff.py. OUT appears whole, or not at
all. Every value is checked: a NaN or an infinity ends it.
"""

import argparse
import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from checkpoints import convert, export
from checkpoints.families.family import difference
from checkpoints.layouts import hub
from checkpoints.source import Source, open_source
from checkpoints.storage import stream, writing
from nanollm import cli
from nanollm.errors import CheckpointError, InputError, counted

ROWS = ("zero", "mean")
TABLES = ("embed.weight", "head.weight", "head.bias")       # those with a row for each token


def check(base: Source, other: Source) -> None:
    """Raise CheckpointError unless both have the same parameters, but for rows that `other` has beside those of BASE.
    A warning names what else their configs say."""
    ours, theirs = base.parameters(), other.parameters()
    if lacking := sorted(ours.keys() ^ theirs.keys()):
        has, lacks = (base, other) if lacking[0] in ours else (other, base)
        raise CheckpointError(f"{lacks.folder}: has no {lacking[0]}, which {has.folder} has; of their parameters "
                              f"{len(lacking)} are in one of them only, so they are not one model and its delta")
    for name, one in ours.items():
        own, more = tuple(one.shape), tuple(theirs[name].shape)
        if name in TABLES and own[1:] == more[1:] and own[0] > more[0]:
            raise CheckpointError(f"{other.folder}: {name} has {more[0]} rows, {base.folder} has {own[0]}; the last "
                                  "ones would be lost")
        if own != more and not (name in TABLES and own[1:] == more[1:]):
            raise CheckpointError(f"{other.folder}: {name} has the shape {more}, in {base.folder} it is {own}")
    for source in (base, other):
        if source.integers:
            raise CheckpointError(f"{source.folder}: its weights have {source.integers}; take the folder that it was "
                                  "made from")
    if other.layout != "hf":
        raise CheckpointError(f"{other.folder}: layout {other.layout}, expected a Hugging Face folder; "
                              "python -m checkpoints.convert makes one of it")
    if {rope for rope in layouts_of(base)} != {rope for rope in layouts_of(other)}:
        raise CheckpointError(f"{base.folder}: its RoPE turns other pairs of channels than that of {other.folder}, so "
                              "rows of q and k stand in another order; python -m checkpoints.convert BASE first")
    same = dataclasses.replace(base.config, vocab=other.config.vocab)
    if same != other.config:
        warnings.warn(f"{base.folder}: {difference(same, other.config, 'config').replace('would be read as', 'is')} in "
                      f"{other.folder}, which is what the new folder says", stacklevel=2)


def layouts_of(source: Source) -> set[str]:
    """Which channels RoPE turns together, over all layers."""
    ropes = (getattr(layer.mixer, "rope", None) for layer in source.config.layers)
    return {rope.layout for rope in ropes if rope is not None}


def combine(base: Source, other: Source, sign: int, folder: Path, *, dtype: torch.dtype | None = None,
            new_rows: str = "zero", shard_bytes: int = 5_000_000_000,
            done: Callable[[int], None] = lambda count: None) -> export.Export:
    """Write OTHER + sign · BASE to a new folder. dtype None: that of each tensor in OTHER. `done` is called with the
    bytes of each part when it is written.

    Raises CheckpointError for models that do not fit together, a value that is not finite, a full disk; nothing is
    written then."""
    check(base, other)
    parameters = other.parameters()
    dtypes = {name: other.dtype(name, dtype) if dtype else other.stored_dtypes[name] for name in parameters}
    origin = export.origin_of(other)
    export.need_companions(origin)
    written = export.plan_export(other.config, parameters, dtypes, origin, "hf", dtype or other.working_dtype)
    convert.need_room(folder, written.nbytes)
    wide = dict.fromkeys(parameters, torch.float32)
    own = {name: step for step in other.steps for name in step.ours}        # the step of OTHER that reads a parameter
    with writing.new_folder(folder) as draft, convert.one_thread():
        places = written.lay_out(draft, shard_bytes)
        with stream.Writer() as out:
            for move in convert.moves(base.steps, written.steps):
                reads = list({id(own[name]): own[name] for step in move.writes for name in step.ours}.values())
                found, before = convert.in_memory(reads, other, wide), convert.in_memory(move.reads, base, wide)
                for name, value in found.items():
                    add(value, before[name], sign, new_rows)
                for step in move.writes:
                    written.save_step(step, found, places, out)
                out.drain()                                  # before there is memory for the next
                done(move.size(places, written))
        export.copy_companions(origin, draft, folder, written)
    return written


def add(value: Tensor, base: Tensor, sign: int, new_rows: str = "zero") -> None:
    """value (V, …) += sign · base (V', …) with V' ≤ V, in place. For the rows that base lacks: see the head."""
    value[: len(base)] += sign * base
    if new_rows == "mean" and len(base) < len(value):
        value[len(base) :] += sign * base.mean(0)


def run() -> None:
    """The command."""
    parser = cli.Parser(prog="python -m checkpoints.delta", description=__doc__,
                        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("make", "apply"), help="make: TUNED − BASE; apply: BASE + DELTA")
    parser.add_argument("base", metavar="BASE", help="the model that was tuned: a folder, or owner/name on the hub")
    parser.add_argument("other", metavar="TUNED_OR_DELTA", help="what it was tuned to, or the delta: the same")
    parser.add_argument("out", metavar="OUT", help="folder to write, which does not exist yet, or is empty")
    parser.add_argument("--dtype", choices=convert.DTYPES, default="auto",
                        help="dtype of the weights of OUT (default auto: as in TUNED or DELTA, tensor by tensor)")
    parser.add_argument("--new-rows", choices=ROWS, default="zero",
                        help="what BASE counts as for tokens that it lacks: 0 (default, FastChat) or the mean of its "
                             "rows (Alpaca)")
    parser.add_argument("--allow-pickle", action="store_true",
                        help="permission to read .bin and .pth files, from people you trust, though none of what they "
                             "name is run")
    args = parser.parse_args()
    out = Path(args.out)
    paths = [hub.local_path(name, args.allow_pickle) for name in (args.base, args.other)]
    for path in paths:
        if path.resolve() in (out.resolve(), *out.resolve().parents):
            raise InputError(f"OUT {out} is inside {path}; expected a folder outside it")
    base, other = (open_source(path, allow_pickle=args.allow_pickle) for path in paths)
    sign, dtype = (1 if args.what == "apply" else -1), convert.DTYPES[args.dtype]
    total = sum(writing.nbytes(dtype or one.dtype, one.shape) for one in other.stored.values())
    with tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar:
        written = combine(base, other, sign, out, dtype=dtype, new_rows=args.new_rows, done=bar.update)
    kinds = sorted({str(dtype).removeprefix("torch.") for dtype, _ in written.tensors.values()})
    more = other.config.vocab - base.config.vocab
    counts_as = "0" if args.new_rows == "zero" else "the mean of its rows"
    rows = f"; for {counted(more, 'new row')} BASE counts as {counts_as}" if more else ""
    print(f"{out}: {counted(len(written.tensors), 'tensor')}, {written.nbytes:,} bytes, summed in float32, stored in "
          f"{' and '.join(kinds)}{rows}")


if __name__ == "__main__":
    cli.main(run)
