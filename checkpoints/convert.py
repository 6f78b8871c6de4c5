"""Convert weights from any layout to another, in the memory of one tensor.

    python -m checkpoints.convert SRC DST                              to a Hugging Face folder
    python -m checkpoints.convert SRC DST --to meta                    … to params.json and consolidated.00.pth (Llama)
    python -m checkpoints.convert SRC DST --to gguf --dtype q8_0       … to model.gguf, which llama.cpp runs
    python -m checkpoints.convert SRC DST --dtype bfloat16 --verify    cast, and compare what was written with SRC
    python -m checkpoints.convert SRC DST --quantize int4 --group 64   weights in 4 bits, as compressed-tensors has them
    python -m checkpoints.convert SRC DST --adapter FOLDER --merge     SRC with peft's adapter in its weights
    python -m checkpoints.convert SRC DST --dry-run                    what would become what; nothing is written
    python -m checkpoints.convert SRC DST --allow-pickle               SRC has pickles (.bin, .pth), and you trust it

SRC is a model folder, a name on the Hugging Face hub, or a file that describes a model: a config.json, a params.json,
a *.gguf. DST appears whole, with the tokenizer files of SRC, or not at all. Every value is checked on its way: a NaN or
an infinity ends it. Without --dtype each tensor keeps the dtype that it has in SRC, and config.json says which one the
model is computed in, as in SRC (source.py). An adapter is merged in float32, and the sum is cast.
"""

import argparse
import contextlib
import dataclasses
import math
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from checkpoints import compressing, export
from checkpoints.adapters import reading
from checkpoints.adapters.reading import Adapter
from checkpoints.layouts import hub
from checkpoints.names import table
from checkpoints.names.table import Step
from checkpoints.source import Source, open_source
from checkpoints.storage import stream, writing
from checkpoints.storage.files import Stored
from nanollm import cli
from nanollm.errors import CheckpointError, InputError, counted
from nanollm.inference.quantize import BITS, GROUPS

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Q8_0 = "q8_0"
ONE_FILE = ("meta", "mistral", "gguf")          # layouts that are written without shards
PREFIXES = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


@dataclass(frozen=True)
class Move:
    """Parameters that are stored together in SRC or in DST, and so are moved together."""
    reads: list[Step]                            # the steps that read them
    writes: list[Step]                           # and those that write them

    @property
    def straight(self) -> bool:
        """Whether both sides hold them in one arrangement, so that no more than names differ."""
        read = self.reads[0]
        return len(self.reads) == 1 and all(write.op is read.op and write.ours == read.ours for write in self.writes)

    def pairs(self) -> Iterator[tuple[str, str]]:
        """(name in SRC, name in DST) of a straight move."""
        for write in self.writes:
            yield from zip(self.reads[0].theirs, write.theirs, strict=True)

    def size(self, places: Mapping[str, Stored], written: export.Export) -> int:
        """Bytes in DST."""
        names = [name for write in self.writes for name in write.theirs]
        return sum(places[part].size for name in names for part in written.parts_of(name))


@dataclass(frozen=True)
class Conversion:
    """What becomes what."""
    source: Source
    origin: export.Origin
    written: export.Export
    dtypes: Mapping[str, torch.dtype]            # of our parameters, as they are written
    moves: list[Move]
    adapter: Adapter | None = None               # which is merged on the way

    def straight(self, move: Move) -> bool:
        """Whether what is written is what is stored, and at most cast."""
        parts = self.adapter.parts if self.adapter else {}
        merged = any(name in parts for step in move.reads for name in step.ours)
        return move.straight and not merged and not any(map(self.written.changes, move.writes))


def plan(source: Source, to: str = "hf", dtype: torch.dtype | None = None, quantized: str | None = None,
         fewer: str | None = None, group: int | None = None, adapter: Adapter | None = None) -> Conversion:
    """What becomes what; dtype None: each tensor keeps its own. `quantized` is the type of a GGUF's matrices, `fewer`
    "int8" or "int4" for a Hugging Face folder's. Raises ConfigError if the layout cannot express the model,
    CheckpointError if a file that goes with it cannot be read, InputError for what cannot be quantised."""
    parameters = source.parameters()
    dtypes = {name: source.dtype(name, dtype) for name in parameters} if dtype else source.stored_dtypes
    if adapter and not dtype:                    # its own tensors may be float32; they become what the model is in
        dtypes = dtypes | {name: source.dtype(name, source.working_dtype) for name in adapter.whole}
    origin = export.origin_of(source)
    export.need_companions(origin)
    working = dtype or source.working_dtype
    written = export.plan_export(source.config, parameters, dtypes, origin, to, working, quantized)
    moved = list(moves(source.steps, written.steps))
    if dtype is None and to != "gguf":           # also where tensors of several dtypes are one parameter: experts
        alike = {there: (source.stored[here].dtype, written.tensors[there][1])
                 for move in moved if move.straight for here, there in move.pairs()
                 if adapter is None or not adapter.replaces(source.stored[here])}
        written = dataclasses.replace(written, tensors=written.tensors | alike)
    if fewer:
        written = compressing.compress(written, source, fewer, group)
        # what is quantised are the values that load() has
        dtypes = {name: source.dtype(name, dtype) if name in written.weights else dtypes[name] for name in dtypes}
    return Conversion(source, origin, written, dtypes, moved, adapter)


def moves(reads: list[Step], writes: list[Step]) -> Iterator[Move]:
    """The steps of both sides, sorted into groups that share no parameter."""
    group: dict[str, str] = {}                   # parameter → the first one of its group

    def root(name: str) -> str:
        while group.setdefault(name, name) != name:
            name = group[name]
        return name

    for step in (*reads, *writes):
        for name in step.ours[1:]:
            group[root(name)] = root(step.ours[0])
    found: dict[str, Move] = {}
    for step in reads:
        found.setdefault(root(step.ours[0]), Move([], [])).reads.append(step)
    for step in writes:
        found[root(step.ours[0])].writes.append(step)
    yield from found.values()


def convert(conversion: Conversion, folder: Path, shard_bytes: int = 5_000_000_000, verify: bool = False,
            done: Callable[[int], None] = lambda count: None) -> None:
    """Write the folder. `done` is called with the bytes of each part when it is written, and again when it is compared.

    Raises CheckpointError on a damaged source, a full disk, or a comparison that fails; `folder` is not there then."""
    written = conversion.written
    need_room(folder, written.nbytes)
    with writing.new_folder(folder) as draft, one_thread():
        places, ring = written.lay_out(draft, shard_bytes), stream.Ring()
        sizes = [move.size(places, written) for move in conversion.moves]
        with stream.Writer() as out:
            for move, size in zip(conversion.moves, sizes, strict=True):
                _move(move, conversion, places, ring, out)
                done(size)
        if verify:                               # the folder as anyone would find it
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what there was to say of it was said of the source
                # a GGUF of Mistral's with a window is a Llama's unless it is told
                family = conversion.origin.family.name if written.to == "gguf" else None
                again = open_source(draft, conversion.origin.ignore, family, written.to == "meta").stored
            if written.to != "gguf":             # whose places know how their numbers were packed
                places = again
            for move, size in zip(conversion.moves, sizes, strict=True):
                _compare(move, conversion, places, ring)
                done(size)
        if written.to != "gguf":                 # which has its tokenizer inside
            export.copy_companions(conversion.origin, draft, folder, written)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """The disk sets the pace. Threads of torch that wait for the next small check spin, on the core that writes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def need_room(folder: Path, size: int) -> None:
    """Raises CheckpointError if the disk that the folder is on, or will be on, has less room than this."""
    folder = folder.absolute()
    free = shutil.disk_usage(next(one for one in (folder, *folder.parents) if one.exists())).free
    if free < size:
        raise CheckpointError(f"{folder}: {size:,} bytes to write, and {free:,} free on that disk; nothing was written")


def _move(move: Move, conversion: Conversion, places: Mapping[str, Stored], ring: stream.Ring,
          out: stream.Writer) -> None:
    stored, written = conversion.source.stored, conversion.written
    if conversion.straight(move):
        for here, there in move.pairs():
            stream.copy(stored[here], places[there], here, ring, out)
        return
    parameters = _with_adapter(move, conversion)
    for step in move.writes:
        written.save_step(step, parameters, places, out)
    out.drain()                                  # before there is memory for the next


def _compare(move: Move, conversion: Conversion, places: Mapping[str, Stored], ring: stream.Ring) -> None:
    """The source through its table against the file through its own: what was written is what would be loaded."""
    stored, written = conversion.source.stored, conversion.written
    if conversion.straight(move):
        equal = [(there, stream.same(stored[here], places[there], ring)) for here, there in move.pairs()]
    else:
        parameters = _with_adapter(move, conversion)
        equal = [found for step in move.writes for found in written.same_step(step, parameters, places)]
    for name, same in equal:
        if not same:
            raise CheckpointError(f"{name}: what was written is not what {conversion.source.folder} has; "
                                  "the disk or the memory is not to be trusted")


def in_memory(reads: list[Step], source: Source, dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """The parameters that these steps read, in these dtypes."""
    shapes = source.parameters()
    parameters = {name: torch.empty(shapes[name].shape, dtype=dtypes[name]) for step in reads for name in step.ours}
    for step in reads:
        stream.load_step(step, source.stored, parameters)
    return parameters


def _with_adapter(move: Move, conversion: Conversion) -> dict[str, Tensor]:
    """The same of one move, an adapter merged in float32 where there is one."""
    merged = conversion.adapter.parts if conversion.adapter else {}
    dtypes = {name: torch.float32 if name in merged else conversion.dtypes[name]
              for step in move.reads for name in step.ours}
    parameters = in_memory(move.reads, conversion.source, dtypes)
    for name in merged.keys() & parameters.keys():
        parameters[name] = merged[name].merged(parameters[name]).to(conversion.dtypes[name])
        stream.need_finite(name, parameters[name], f"{conversion.source.folder} with its adapter: ")
    return parameters


def describe(conversion: Conversion) -> Iterator[str]:
    """The conversion in lines: every tensor of DST, its dtype and shape, and what it is made of."""
    written = conversion.written
    made_of = {part: (move, step, name) for move in conversion.moves for step in move.writes for name in step.theirs
               for part in written.parts_of(name)}
    width = max(map(len, written.tensors))
    for name, (dtype, shape) in written.tensors.items():
        move, step, whole = made_of[name]
        if move.straight:
            from_, how = [move.reads[0].theirs[step.theirs.index(whole)]], ""
        else:
            from_ = [one for read in move.reads for one in read.theirs]
            how = f"   as {' + '.join(_name(read.op) for read in move.reads)} → {_name(step.op)}"
        first = conversion.source.stored[from_[0]]
        cast = "" if first.dtype == dtype else f" {table.short(first.dtype)}"
        more = f" … {from_[-1]} ({len(from_)} tensors)" if len(from_) > 3 else ", ".join(["", *from_[1:]])
        sizes = "×".join(map(str, shape)) or "scalar"
        yield (f"{name:{width}}  {table.short(dtype):8}  {sizes:>14}  ←{cast} {from_[0]}{more}  "
               f"{first.file.name}{how}")


def _name(op: object) -> str:
    return getattr(op, "__name__", type(op).__name__)


def size(text: str) -> int:
    """Bytes from a text such as 5GB, 5G, 500MB, 1TB or 1GiB. Raises InputError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE | re.ASCII)
    count = float(found[1]) * (1024 if found[3] else 1000) ** PREFIXES[found[2].upper()] if found else 0
    if count < 1 or math.isinf(count):
        raise InputError(f"--shard-size {text}: expected a size, such as 5GB, 500M, 2GiB or a number of bytes")
    return int(count)


def run() -> None:
    """The command."""
    parser = cli.Parser(prog="python -m checkpoints.convert", description=__doc__,
                        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("source", metavar="SRC",
        help="model folder, owner/name or owner/name/FILE.gguf on the hub, or a config.json, params.json or *.gguf")
    add("destination", metavar="DST", help="folder to write, which does not exist yet, or is empty")
    add("--to", choices=export.FORMATS, default="hf",
        help="layout to write: hf (default), nanollm (our own names), meta (Llama), mistral (Mistral, Mixtral), gguf "
        "(llama.cpp)")
    add("--dtype", choices=(*DTYPES, Q8_0), default="auto",
        help="dtype of the weights; auto keeps what is stored, tensor by tensor, and makes bfloat16 of 8 and 4 bits; "
        "q8_0, 8 bits in blocks of 32, is GGUF's")
    add("--quantize", choices=BITS,
        help="weights of the layers' matrices in 8 or 4 bits, in compressed-tensors' layout; with --to hf")
    add("--group", type=int, choices=GROUPS,
        help="inputs that share a scale in 4 bits; without it the largest that divides them all")
    add("--adapter", type=Path, metavar="FOLDER", help="peft's adapter of SRC, to be merged; goes with --merge")
    add("--merge", action="store_true", help="W + s B A, in float32, in the place of each weight that has an adapter")
    add("--shard-size", metavar="SIZE",
        help="size of a file, at most, where the layout knows shards (default 5GB)")
    add("--family", metavar="MODEL_TYPE", help="model_type, for a folder that does not say, or says something else")
    add("--ignore", action="append", default=[], metavar="NAME",
        help="config key or tensor, of those that reading complains of, to pass over; may be repeated")
    add("--dry-run", action="store_true", help="list what would be written, tensor by tensor, and write nothing")
    add("--verify", action="store_true", help="comparison of every value in DST with SRC, before DST takes its name")
    add("--allow-pickle", action="store_true",
        help="permission to read .bin and .pth files, from people you trust, though none of what they name is run")
    args = parser.parse_args()
    shard_bytes = size("5GB" if args.shard_size is None else args.shard_size)
    if args.shard_size is not None and args.to in ONE_FILE:
        warnings.warn(f"--shard-size does nothing with --to {args.to}, which is one file", stacklevel=2)
    if args.dtype == Q8_0 and args.to != "gguf":
        parser.error("--dtype q8_0 goes with --to gguf")
    if args.quantize and args.to != "hf":
        parser.error("--quantize goes with --to hf")
    if args.group is not None and args.quantize != "int4":
        parser.error("--group goes with --quantize int4")
    if args.merge != (args.adapter is not None):
        parser.error("--adapter FOLDER and --merge go together")
    for name, given in (("SRC", args.source), ("DST", args.destination)):
        if not given.strip():
            raise InputError(f"{name} is empty")
    target = Path(args.destination)
    if target.suffix == ".gguf":
        parser.error(f"DST {target}: expected a folder, in which model.gguf is written")
    if not args.dry_run:
        writing.need_place(target)               # before SRC is fetched from the hub
    path = hub.local_path(args.source, args.allow_pickle)
    if path.is_dir() and Path(os.path.realpath(path)) in Path(os.path.realpath(target)).parents:
        raise InputError(f"DST {target} is inside SRC {path}; expected a folder outside it")
    found = reading.read(args.adapter, args.allow_pickle) if args.adapter else None
    source = open_source(path, args.ignore, args.family, args.allow_pickle, found.whole if found else None)
    adapter = reading.fit(found, source) if found else None
    if adapter and source.integers:
        warnings.warn(f"{source.folder}: its weights have {source.integers}; the adapter is merged into what they "
                      "stand for, and written in 16 bits", stacklevel=2)
    quantized = "Q8_0" if args.dtype == Q8_0 else None
    conversion = plan(source, args.to, DTYPES.get(args.dtype), quantized, args.quantize, args.group, adapter)
    total = conversion.written.nbytes
    print(f"{source.name} ({source.family.name}, {source.layout}) → {target} ({args.to}): "
          f"{counted(len(conversion.written.tensors), 'tensor')}, {total:,} bytes")
    if args.dry_run:
        print("\n".join(describe(conversion)))
        return
    start = time.perf_counter()
    with tqdm(total=total * (1 + args.verify), unit="B", unit_scale=True, disable=None) as bar:
        convert(conversion, target, shard_bytes, args.verify, bar.update)
    seconds = time.perf_counter() - start
    checked = "; every value is finite" + (", and read back equal" if args.verify else "")
    print(f"{target}: written in {seconds:.1f} s, {total / seconds / 1e6:,.0f} MB/s{checked}")


if __name__ == "__main__":
    cli.main(run)
