"""What a model folder holds, and whether it would load, from headers alone: no weight is read, whatever the size.

    python -m checkpoints.inspect FOLDER                what it is, and its tensors by pattern
    python -m checkpoints.inspect FOLDER --tensors      … one by one
    python -m checkpoints.inspect FOLDER --json         … for machines

    Mixtral-8x7B-v0.1
    layout       hf
    family       mixtral
    files        19, 93.4 GB: model-00001-of-00019.safetensors … model-00019-of-00019.safetensors
    dtypes       93.4 GB of bfloat16
    tensors      995
    parameters   46,702,792,704 (46.70 B)
    loads        yes

    model.embed_tokens.weight                                       bfloat16  32000×4096  1 tensor     262 MB
    model.layers.{0..31}.self_attn.q_proj.weight                    bfloat16  4096×4096   32 tensors   1.07 GB
    model.layers.{0..31}.block_sparse_moe.experts.{0..7}.w1.weight  bfloat16  14336×4096  256 tensors  30.1 GB
    …

The exit code is 0 if the folder would load, and 1 if not; then `loads` has what checkpoints.load() says, and what can
be listed still is. FOLDER is whatever load() takes. Pickles (.bin, .pth) are read with --allow-pickle only. Without it,
each is named, and which functions it calls beside what tensors need; nothing of it is run.

Three things are read beside headers: a head that is stored although tied is compared with the embedding, norms that
every rank's file has with each other, and a tensor that is in two shards with its copy, as load() does to know what the
model is. Where tensors are stored in another dtype than load() gives the model, `notes` has which.
"""

import argparse
import json
import math
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoints import companions, folding, layouts
from checkpoints.layouts import hub, original
from checkpoints.layouts.found import LARGEST_CONFIG
from checkpoints.names import table
from checkpoints.show import amount, billions, stored_type
from checkpoints.source import Source, said_dtype, stored_as, understand
from checkpoints.storage import files, gguf, pickles
from checkpoints.storage.files import Stored
from checkpoints.storage.quantized.parts import Packed
from nanollm import cli
from nanollm.errors import CheckpointError, NanollmError, counted

SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".gguf")
LISTED = 8                                       # files that are listed one by one
SHOWN = 4                                        # patterns of names in a note


@dataclass
class Report:
    """What was found. `stored` is as on disk: with the scales of fp8 weights, and the towers that load() leaves out."""
    folder: Path
    layout: str
    family: str | None
    path: Path                                   # what was given: the folder, or a file in it
    reason: str | None = None                    # why it would not load; None: it would
    parameters: int | None = None                # of the model, if it would load
    notes: list[str] = field(default_factory=list)
    stored: dict[str, Stored] = field(default_factory=dict)
    pickles: dict[str, str | None] = field(default_factory=dict)     # not read → what speaks against it; None: nothing

    @property
    def used(self) -> set[Path]:
        """The files that the tensors are in. A matrix that several ranks share out is in several."""
        return {part.file for one in self.stored.values() for part in getattr(one, "parts", (one,))}

    @property
    def one_file(self) -> bool:
        """Whether a GGUF was given, which is a model by itself: others may lie beside it."""
        return self.path.is_file() and gguf.is_gguf(self.path)

    def sizes(self) -> dict[Path, int]:
        """All files of the folder that could hold weights, and their bytes; of a GGUF its own."""
        if self.one_file:
            return {path: path.stat().st_size for path in sorted(self.used or {self.path})}
        paths = [path for path in sorted(self.folder.iterdir()) if path.suffix in SUFFIXES and path.is_file()]
        return {path: path.stat().st_size for path in paths}


def look(path: Path, ignore: Collection[str] = (), family: str | None = None, allow_pickle: bool = False) -> Report:
    """The report of a folder, or of the model that a file belongs to; what is wrong with it is in there.

    Raises OSError if the folder cannot be listed."""
    folder = path.parent if path.is_file() else path
    report = Report(folder, which_layout(path), family, path)
    try:
        found = layouts.find(path, layouts.Asked(family, allow_pickle, tuple(ignore)))
        report.stored, report.layout, report.family = found.stored, found.layout, found.values.get("model_type")
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            source = understand(found, tuple(ignore))
        report.notes += [str(one.message) for one in told]
        report.family = source.family.name
        report.parameters = sum(parameter.numel() for parameter in source.parameters().values())
        if how := stored_as(found):
            report.notes.append(f"weights quantised by {how.NAME}: {how}; load() " + (
                "keeps whole numbers so" if source.integers else "reads them as what they stand for"))
        report.notes += _casts(source)
        report.notes += _unreadable(source)
        eos = source.values.get("eos_token_id")
        report.notes += [f"eos_token_id is {one}, beyond the {source.config.vocab:,} rows of the embedding: "
                         "it never ends a text" for one in (eos if isinstance(eos, list) else [eos])
                         if type(one) is int and one >= source.config.vocab]
    except NanollmError as error:
        report.reason = str(error)
    if not report.stored:
        _list_anyway(report)
    if report.family == "nanollm":
        report.layout = "nanollm"
    return report


def _unreadable(source: Source) -> list[str]:
    """A tokenizer file or the like, beside the weights, that is no file or is closed to us: load() needs none."""
    try:
        if not source.inside:
            companions.need_readable(source.folder, source.layout)
    except CheckpointError as error:
        return [f"{error}; convert refuses it"]
    return []


def _casts(source: Source) -> Iterator[str]:
    """The dtype that load() gives the model, and each other one that tensors are stored in, with what becomes of it."""
    working, others = source.working_dtype, defaultdict(list)
    for step in source.steps:
        kept = source.dtype(step.ours[0], None)
        for name in step.theirs:
            if isinstance(source.stored[name], Packed):
                continue
            if (found := source.stored[name].dtype) not in (working, kept) or kept != working:
                others[found, kept].append(name)
    by = "config.json says so" if said_dtype(source.values) else "most of the weights are"
    for (found, kept), names in others.items():
        one = len(names) == 1
        becomes = "stay" + "s" * one + " so" if kept == found else (
            f"become{'s' * one} {table.short(kept)} in memory")
        patterns: dict[str, list[str]] = defaultdict(list)
        for name in names:
            patterns[folding.pattern(name)].append(name)
        listed = [folding.folded(each) for each in patterns.values()]
        more = f" and {len(listed) - SHOWN} more patterns" if len(listed) > SHOWN else ""
        yield (f"the model is {table.short(working)}, as {by}; {counted(len(names), 'tensor')} "
               f"{'is' if one else 'are'} stored in {table.short(found)} and {becomes}: "
               f"{', '.join(listed[:SHOWN])}{more}")


def which_layout(path: Path) -> str:
    """By the names of files alone, for folders that nothing else can be said of."""
    names = {path.name} if path.is_file() else {one.name for one in path.iterdir()}
    if "config.json" in names:
        return "hf"
    if "params.json" in names:
        return "mistral" if original.SINGLE in names else "meta"
    return "gguf" if any(name.endswith(".gguf") for name in names) else "unknown"


def _list_anyway(report: Report) -> None:
    """A folder that is no whole model: what each of its files says by itself."""
    try:
        said = files.read_json(report.folder / "config.json", LARGEST_CONFIG).get("model_type")
        report.family = report.family or (said if isinstance(said, str) else None)
    except NanollmError:
        pass                                     # that it is missing, or damaged, is among the reasons already
    for path in report.sizes():
        try:
            if path.suffix == ".safetensors":
                report.stored |= files.read_header(path)
            elif path.match("pytorch_model*.bin") or pickles.RANK.fullmatch(path.name):
                called = pickles.functions(path)
                report.pickles[path.name] = f"it calls {', '.join(called)}" if called else None
        except NanollmError as error:
            if path.suffix != ".safetensors":
                report.pickles[path.name] = str(error)
            elif str(error) != report.reason:
                report.notes.append(str(error))


# ---- what is said

def describe(report: Report, tensors: bool = False) -> str:
    """The report as text; `tensors`: one by one."""
    held: Counter[str] = Counter()
    for one in report.stored.values():
        held[stored_type(one)] += one.size
    numbers = sum(math.prod(one.shape) for one in report.stored.values())
    counted, by_tensors = report.parameters, ""
    if counted is None:
        counted, by_tensors = numbers, ", as many numbers as the tensors hold"
    judged = {name: f"NOT harmless, {against}" if against else "harmless, it calls what tensors need and no more"
              for name, against in report.pickles.items()}
    rows = {
        "layout": [report.layout],
        "family": [report.family or "unknown"],
        "files": list(_files(report)) or ["none that could hold weights"],
        "dtypes": [", ".join(f"{amount(size)}B of {name}" for name, size in held.most_common()) or "unknown"],
        "tensors": [f"{len(report.stored):,}"],
        "parameters": [f"{counted:,} ({billions(counted)}){by_tensors}" if report.stored else "unknown"],
        "pickles": [f"{name}: {judgement}" for name, judgement in judged.items()],
        "notes": report.notes,
        "loads": ["yes"] if report.reason is None else ["no", *report.reason.splitlines()],
    }
    lines = [f"{what if at == 0 else '':13}{line}" for what, said in rows.items() for at, line in enumerate(said)]
    listed = _each(report) if tensors else _groups(report)
    if report.stored:
        lines.append("")
    head = str(report.path if report.one_file else report.folder)
    return "\n".join(map(_printable, [head, *lines, *_aligned([_row(one) for one in listed])]))


def facts(report: Report, tensors: bool = False) -> str:
    """The same for machines, as JSON."""
    used = report.used
    return json.dumps({
        "folder": str(report.folder), "layout": report.layout, "family": report.family,
        "loads": report.reason is None, "reason": report.reason,
        "notes": report.notes, "parameters": report.parameters, "tensors": len(report.stored),
        "files": [{"name": path.name, "bytes": size, "used": path in used} for path, size in report.sizes().items()],
        "pickles": [{"name": name, "harmless": against is None, "against": against}
                    for name, against in report.pickles.items()],
        "stored": list(_each(report) if tensors else _groups(report)),
    }, indent=2, ensure_ascii=False)


def _files(report: Report) -> Iterator[str]:
    """Those that the model is read from, then those that belong to something else."""
    sizes, used = report.sizes(), report.used
    read, others = [path for path in sizes if path in used], [path for path in sizes if path not in used]
    for names, more in ((read, ""), (others, ", not read")):
        if len(names) <= LISTED:
            yield from (f"{path.name}   {amount(sizes[path])}B{more}" for path in names)
        else:
            size = amount(sum(sizes[path] for path in names))
            yield f"{len(names)}, {size}B{more}: {names[0].name} … {names[-1].name}"


def _each(report: Report) -> Iterator[dict[str, Any]]:
    for name, one in report.stored.items():
        parts = [part.file.name for part in getattr(one, "parts", (one,))]
        yield {"name": name, "dtype": stored_type(one), "shape": list(one.shape), "bytes": one.size,
               "file": ", ".join(parts)}


def _groups(report: Report) -> Iterator[dict[str, Any]]:
    """Tensors that differ in numbers of layers and experts only."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, one in report.stored.items():
        groups.setdefault((folding.pattern(name), stored_type(one), one.shape), []).append(name)
    for (_, dtype, shape), names in groups.items():
        yield {"name": folding.folded(names), "dtype": dtype, "shape": list(shape),
               "bytes": sum(report.stored[name].size for name in names), "tensors": len(names)}


def _row(one: Mapping[str, Any]) -> list[str]:
    last = one["file"] if "file" in one else f"{one['tensors']:,} tensor{'s' * (one['tensors'] > 1)}"
    return [one["name"], one["dtype"], "×".join(map(str, one["shape"])) or "scalar", last, f"{amount(one['bytes'])}B"]


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _printable(line: str) -> str:
    """Names come from a file that anyone may have written, and a terminal obeys what is not printable."""
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in line)


def run() -> None:
    """The command."""
    parser = cli.Parser(prog="python -m checkpoints.inspect", description=__doc__,
                        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("source", metavar="FOLDER", help="model folder, owner/name on the hub, or a config.json, params.json or *.gguf")
    add("--tensors", action="store_true", help="one line a tensor, with its file; else one for many of one pattern")
    add("--json", action="store_true", help="the same for machines")
    add("--family", metavar="MODEL_TYPE", help="model_type, for a folder that does not say, or says something else")
    add("--ignore", action="append", default=[], metavar="NAME",
        help="config key or tensor, of those that reading complains of, to pass over; may be repeated")
    add("--allow-pickle", action="store_true", help="permission to read .bin and .pth files, from people you trust")
    args = parser.parse_args()
    path = hub.local_path(args.source, args.allow_pickle)
    report = look(path, args.ignore, args.family, args.allow_pickle)
    print((facts if args.json else describe)(report, args.tensors))
    if report.reason is not None:
        sys.exit(1)


if __name__ == "__main__":
    with files.uncollected():                    # none of DeepSeek-V3's 45,395 tensors is garbage to look for
        cli.main(run)
