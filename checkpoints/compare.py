"""Where does a model differ: from transformers' of the same folder, or from the model in another folder?

    python -m checkpoints.compare FOLDER               our model and transformers', on the same random tokens
    python -m checkpoints.compare FOLDER OTHER         two folders, in any layouts: configs and weights, no model is run
    python -m checkpoints.compare FOLDER OTHER --run   … and both in our decoder, on the same random tokens

    tiny (llama, hf) and transformers 5.23.0, 2 × 48 tokens, float32          here the rows of q in layer 1 are reversed

               largest difference  relative
    embedding                   0         0
    layers.0                    0         0
    layers.1              2.6e+01   2.8e-01   ← the first above 1e-05
    layers.2              4.6e+01   4.6e-01
    norm                  4.0e+00   4.6e-01
    logits                6.5e+00   4.3e-01

    inside layers.1  it reads  it gives
    pre_mixer               0         0
    mixer.q                 0   6.9e-01   ←
    mixer.k                 0         0
    …

    different from layers.1 on, at mixer.q: it reads the same and gives something else: its weights, or the order of
    their rows

How parts are found and compared: tracing.py. Of two folders: between.py. Differences are relative to the spread of the
other's values. The exit code is 0 if all of them are within the bound and 1 if not. Default bounds: 1e-5 in float32,
0.05 in 16 bits, 1e-5 for stored weights. In float32 that is rounding; a wrong model is far above it, except where
random tokens do not reach what is wrong.

Both models are in memory when they run, each in --dtype. transformers reads only folders of its own layout, and none of
its code from the hub is run.
"""

import argparse
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from checkpoints import between, folding, tracing
from checkpoints.between import Weight
from checkpoints.convert import DTYPES
from checkpoints.layouts import hub
from checkpoints.source import Source, open_source
from checkpoints.tracing import Part, Side
from nanollm import cli
from nanollm.config.positions import places
from nanollm.errors import CheckpointError, ConfigError, InputError
from nanollm.training import plot

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.05}
MOST = 1 << 16                  # random tokens of a run: both models keep what every layer makes of them
UNQUOTED = re.compile(r"pip install ([\w.-]+[<>][\w.<>=,]+)")
INSTALL = "comparing with transformers needs it: pip install -e \".[test]\""


class Report(NamedTuple):
    """What was found, as text, and whether all of it is within the bound."""
    lines: list[str]
    same: bool


def transformers_side(folder: Path, dtype: torch.dtype) -> tuple[Side, str, list[str]]:
    """transformers' model of a folder, its version, and what it warns of.

    Raises InputError without transformers, CheckpointError if it does not read the folder."""
    try:
        import transformers  # only here: it takes seconds, and nothing else needs it
    except ImportError:
        raise InputError(INSTALL) from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True,
            output_loading_info=True)
    except Exception as error:                   # an unknown family, a missing key or file: they have no common base
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        reason = UNQUOTED.sub(r'pip install "\1"', reason)       # a shell takes > for a file
        raise CheckpointError(f"{folder}: transformers does not read it: {reason}. "
                              "Give a second folder to compare with") from None
    if model.config.to_dict().get("quantization_config", {}).get("quant_method") == "bitsandbytes":
        model = model.dequantize().to(dtype)     # or it rounds activations too
    if hasattr(model.config, "rescale_every"):
        model.config.rescale_every = 0           # RWKV halves the stream every so many layers, for float16 only
    lost = sorted(info["missing_keys"])
    notes = [f"transformers found no {lost[0]} ({len(lost)} such), and has drawn it at random"] if lost else []
    side = Side(model.eval(), lambda tokens: model(tokens, use_cache=False).logits, model.base_model_prefix)
    return side, transformers.__version__, notes


# ---- two models that run

def run_both(ours: Side, theirs: Side, outline: Sequence[Part], parts: Mapping[str, Sequence[Part]], tokens: Tensor,
             bound: float, picture: Path | None = None) -> Report:
    """outline: the parts to compare by depth; parts: those inside each block.

    Raises InputError if a picture is wanted and there is no matplotlib."""
    depths = dict(tracing.by_depth(ours, theirs, outline, tokens))
    relative = [(name, gap.relative) for name, gap in depths.items()]
    if picture is not None and not plot.error_by_depth(picture, relative, bound):
        raise InputError("--plot needs matplotlib: pip install -e \".[test]\"")
    beyond = next((name for name, gap in depths.items() if not gap.within(bound)), None)
    width = max(map(len, depths))
    lines = [f"{'':{width}}  {'largest difference':>18}  {'relative':>8}"]
    for name, gap in depths.items():
        mark = f"   ← the first above {bound:g}" if name == beyond else ""
        lines.append(f"{name:{width}}  {number(gap.largest):>18}  {number(gap.relative):>8}{mark}")
    lines += [f"not compared: {part.ours[0]}, there is no {part.theirs} in the other model" for part in outline
              if part.ours[0] not in depths and part.ours[0] != "embed_norm"]
    if beyond is None:
        name, worst = max(depths.items(), key=lambda one: one[1].relative)
        most = "there is no difference"
        if worst.relative:
            most = f"the largest relative difference is {number(worst.relative)}, at {name}"
        return Report([*lines, "", f"equal within {bound:g}: {most}"], True)
    if beyond not in parts:
        place = "before the first" if beyond == "embedding" else "after the last"
        return Report([*lines, "", f"different from {beyond} on, which is {place} layer"], False)
    inside = tracing.look_inside(ours, theirs, parts[beyond], tokens)
    part, meaning = inside.verdict(bound)
    verdict = f"different from {beyond} on{', at ' * bool(part)}{part}: {meaning}"
    return Report([*lines, "", *_inside(inside, beyond, part), "", verdict], False)


def _inside(inside: tracing.Inside, block: str, first: str) -> Iterator[str]:
    names = {line.name: line.name.removeprefix(f"{block}.") for line in inside.lines}
    width = max(map(len, ("inside " + block, *names.values())))
    yield f"{'inside ' + block:{width}}  it reads  it gives"
    for line in inside.lines:
        mark = "   ←" if names[line.name] == first else ""
        yield f"{names[line.name]:{width}}  {number(line.read.relative):>8}  {number(line.gave.relative):>8}{mark}"
    for reason in inside.skipped:
        yield f"not compared: {reason.replace(f'{block}.', '')}"


def number(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"


# ---- two folders

def compare_folders(a: Source, b: Source, bound: float) -> Report:
    """Configs, then weights by pattern, the worst first."""
    fields = between.fields(a.config, b.config)
    lines = [f"configs: {len(fields) or 'no'} difference{'s' * (len(fields) != 1)}"]
    width = max((len(one.name) for one in fields), default=0)
    lines += [f"  {one.name:{width}}  {one.a}  ≠  {one.b}" + ("" if one.counts else "   (no logit depends on it)")
              for one in fields]
    groups: dict[str, list[Weight]] = {}
    for weight in between.weights(a, b):
        groups.setdefault(folding.pattern(weight.name), []).append(weight)
    weights = [weight for group in groups.values() for weight in group]
    lines += ["", f"weights: {sum(weight.same for weight in weights):,} of {len(weights):,} parameters are equal"]
    rows = [_row(group) for group in sorted(groups.values(), key=lambda group: -max(map(_badness, group)))]
    width, middle = (max(len(row[column]) for row in rows) for column in (0, 1))
    lines.append(f"  {'':{width}}  {'':{middle}}  largest difference  relative")
    lines += [f"  {name:{width}}  {how:{middle}}  {largest:>18}  {relative:>8}{where}"
              for name, how, largest, relative, where in rows]
    counted = sum(one.counts for one in fields)
    apart = sum(not (weight.same or weight.gap.within(bound)) for weight in weights)
    ending = (f"different: {counted} field{'s' * (counted != 1)} of the config, "
              f"{apart:,} of {len(weights):,} parameters by more than {bound:g}")
    same = not counted and not apart
    return Report([*lines, "", f"equal within {bound:g}" if same else ending], same)


def _badness(weight: Weight) -> float:
    return -1.0 if weight.how == "equal" else 0.0 if weight.same else weight.gap.relative


def _row(group: list[Weight]) -> tuple[str, str, str, str, str]:
    """One pattern: its parameters, how many are what, and the worst of them."""
    worst = max(group, key=_badness)
    kinds = dict.fromkeys(weight.how for weight in group)
    counts = [f"{sum(weight.how == kind for weight in group)} {kind}" for kind in kinds]
    known = worst.gap.largest < torch.inf
    where = f"   worst in {worst.name}" if len(group) > 1 and known and not worst.same else ""
    return (folding.folded([weight.name for weight in group]), ", ".join(counts),
            number(worst.gap.largest) if known else "–", number(worst.gap.relative) if known else "–", where)


# ---- the command

def random_tokens(vocab: int, batch: int, tokens: int, seed: int) -> Tensor:
    """(batch, tokens) int64, the same for a seed on every machine."""
    return torch.randint(0, vocab, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def need_bounds(context: int | None, batch: int, tokens: int) -> None:
    """Raises InputError for more tokens than the model's context, or more than MOST in all; nothing is in memory then.
    """
    most = context or MOST
    if batch < 1 or not 1 <= tokens <= most:
        raise InputError(f"--batch {batch} --tokens {tokens}: expected at least 1 row of 1 to {most} tokens")
    if batch * tokens > MOST:
        raise InputError(f"--batch {batch} --tokens {tokens}: expected at most {MOST} tokens in all rows together")


def against_transformers(source: Source, args: argparse.Namespace, dtype: torch.dtype, bound: float) -> Report:
    """One folder."""
    need_bounds(places(source.config.positions) or source.config.context, args.batch, args.tokens)
    if source.layout != "hf":
        raise CheckpointError(f"{source.folder}: transformers does not read this layout ({source.layout}): convert it "
                              f"first: python -m checkpoints.convert {shlex.quote(args.source)} FOLDER; or give a "
                              "second folder to compare with")
    tokens = random_tokens(source.config.vocab, args.batch, args.tokens, args.seed)
    theirs, version, notes = transformers_side(source.folder, dtype)
    outline = tracing.outline(source.steps, len(source.config.layers))
    blocks = [part for part in outline if part.ours[0].startswith("layers.")]
    parts = {block.ours[0]: tracing.parts_of(source.steps, block) for block in blocks}
    found = run_both(tracing.side(source.fill(dtype)), theirs, outline, parts, tokens, bound, args.plot)
    head = f"{said(source)} and transformers {version}, {args.batch} × {args.tokens} tokens, {args.dtype}"
    return Report([head, *notes, "", *found.lines], found.same)


def in_our_decoder(a: Source, b: Source, args: argparse.Namespace, dtype: torch.dtype, bound: float) -> Report:
    """Two folders that run. Raises ConfigError if their tokens or their widths are not the same."""
    for field in ("vocab", "dim"):
        one, other = getattr(a.config, field), getattr(b.config, field)
        if one != other:
            raise ConfigError(f"{b.folder}: {field} is {other}, and {one} in {a.folder}: they cannot run side by side")
    for source in (a, b):
        need_bounds(places(source.config.positions) or source.config.context, args.batch, args.tokens)
    tokens = random_tokens(a.config.vocab, args.batch, args.tokens, args.seed)
    outline, parts = between.same_names(a, b)
    one, other = (tracing.side(source.fill(dtype)) for source in (a, b))
    found = run_both(one, other, outline, parts, tokens, bound, args.plot)
    head = f"both in our decoder, {args.batch} × {args.tokens} tokens, {args.dtype}"
    return Report([head, "", *found.lines], found.same)


def said(source: Source) -> str:
    """What is compared, in a line."""
    return f"{source.name} ({source.family.name}, {source.layout})"


def opened(source: str, args: argparse.Namespace) -> Source:
    """The folder, file or name on the hub, with what the command line says of it."""
    path = hub.local_path(source, args.allow_pickle)
    return open_source(path, args.ignore, allow_pickle=args.allow_pickle)


def run() -> None:
    """The command."""
    parser = cli.Parser(prog="python -m checkpoints.compare", description=__doc__,
                        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("source", metavar="FOLDER", help="model folder, owner/name on the hub, or a config.json, params.json or *.gguf")
    add("other", metavar="OTHER", nargs="?", help="another one, to compare with in place of transformers")
    add("--run", action="store_true", help="run of both models, of two folders, beside the comparison of their weights")
    add("--tokens", type=cli.whole(), default=48, metavar="N",
        help="number of random tokens in a row (default 48); to check a window, more than it")
    add("--batch", type=cli.whole(), default=2, metavar="N", help="number of rows (default 2)")
    add("--seed", type=cli.whole(*cli.SEEDS), default=0, metavar="N",
        help="seed that the tokens are drawn from (default 0)")
    add("--dtype", choices=[name for name in DTYPES if name != "auto"], default="float32",
        help="dtype of both models (default float32)")
    add("--bound", type=float, metavar="X", help="largest relative difference that is called equal (default as above)")
    add("--plot", type=Path, metavar="FILE.png", help="picture to draw, of the relative difference by depth")
    add("--ignore", action="append", default=[], metavar="NAME",
        help="config key or tensor, of those that reading complains of, to pass over; may be repeated")
    add("--allow-pickle", action="store_true",
        help="permission to read .bin and .pth files, of two folders; only from people you trust")
    args = parser.parse_args()
    if args.plot and args.other and not args.run:
        raise InputError("--plot draws models that run: add --run")
    dtype, reports = DTYPES[args.dtype], []
    assert dtype is not None, "auto is not among the choices"
    bound = BOUNDS[dtype] if args.bound is None else args.bound
    first, other = opened(args.source, args), opened(args.other, args) if args.other else None
    if other is not None:
        print(f"{said(first)} and {said(other)}")
        reports.append(compare_folders(first, other, BOUNDS[torch.float32] if args.bound is None else args.bound))
        print("", *reports[-1].lines, sep="\n", end="\n\n" if args.run else "\n")
    if other is None:
        reports.append(against_transformers(first, args, dtype, bound))
        print(*reports[-1].lines, sep="\n")
    elif args.run:
        reports.append(in_our_decoder(first, other, args, dtype, bound))
        print(*reports[-1].lines, sep="\n")
    if not all(report.same for report in reports):
        sys.exit(1)


if __name__ == "__main__":
    cli.main(run)
