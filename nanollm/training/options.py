"""The options of train.py: on the command line, in a TOML file, or both.

    python train.py --config run.toml --lr 0.001            what is on the command line wins

    run.toml     preset = "llama"              an option without its dashes, with - or _; true for a switch
                 data = ["web", "books"]       a list for several values
                 batch-size = 64

Where an option is given in neither, DEFAULTS of arguments.py has its value: by the kind of run, as a toy and a model of
8 billion parameters have little in common.
"""

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path

import torch

from nanollm.cli import Parser
from nanollm.config import ModelConfig
from nanollm.errors import InputError, RunError
from nanollm.presets import preset
from nanollm.training import growing, low_memory, methods, monitors, tuning
from nanollm.training.arguments import DEFAULTS, LORA_DEFAULTS, PREFERENCE_LR, build_parser, kind
from nanollm.training.distributed import DTYPES
from nanollm.training.runs import FREE

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def parse(description: str, args: list[str] | None = None) -> argparse.Namespace:
    """The options of one run, with defaults, as far as they depend on no file. Raises InputError for those that do not
    go together; argparse ends the process for others."""
    args, parser = sys.argv[1:] if args is None else args, build_parser(description)
    early = Parser(add_help=False)
    early.add_argument("--config", type=Path)
    file = early.parse_known_args(args)[0].config
    args = [*from_toml(file, parser), *args] if file else args
    options = parser.parse_args(args)
    of_a_run = options.export or options.eval_only and (options.out or not options.init)    # else --eval-only of --init
    options.out = options.out or default_out(options, parser)
    if of_a_run:
        options = parser.parse_args([*of_record(options.out, parser), *args, "--resume", "--out", str(options.out)])
    if options.chat and not options.init:
        raise InputError("--chat fine-tunes a model that exists: name its folder with --init")
    check_chats(options)
    methods.check(options)
    growing.check(options)
    tuning.check(options)
    if options.steps and options.epochs:
        raise InputError("--steps and --epochs both say how long the run is; give one of them")
    for name in ("init", "tokenizer"):
        folder = getattr(options, name)
        if folder and folder.is_dir() and options.out.exists() and folder.samefile(options.out):
            raise InputError(f"--{name} and --out are both {folder}: a run would replace what it starts from; "
                             "name another folder with --out")
    settle(options)
    low_memory.check(options, tuning.tunes(options))
    if options.min_lr > options.lr:
        raise InputError(f"--min-lr {options.min_lr:g} is above --lr {options.lr:g}; it is the rate at the end, not a "
                         "share")
    if not options.plan:
        monitors.require(options)
        check_device(options.device)
        options.dtype = fast_dtype(options.device) if options.dtype == "auto" else options.dtype
    files = options.chat or methods.files(options)
    source = [path.name for path in (*files, *options.data)]
    model = options.init.name if options.init else options.preset
    options.title = f"{model} on {', '.join(source) or 'the standard library'}"
    if options.prompt is None:
        options.prompt = "" if source else "def "
    return options


def default_out(options: argparse.Namespace, parser: Parser) -> Path:
    """The run folder where --out is not given."""
    name = "demo" if options.preset == parser.get_default("preset") else options.preset
    return Path("runs") / (f"{options.init.name}-tuned" if options.init else name)


def of_record(folder: Path, parser: Parser) -> list[str]:
    """The options of the run in a folder, as arguments: all that decide what it computes. Raises RunError."""
    own = recorded(folder)
    if not own:
        raise RunError(f"{folder}: holds no run of train.py; name its folder with --out")
    deciding = {action.dest for action in parser._actions} - FREE | {"data"}        # data may lie elsewhere by now
    said = {name: value for name, value in own.items() if value or value not in (None, parser.get_default(name))}
    return as_arguments({name: value for name, value in said.items() if name in deciding}, parser, "")


def check_chats(options: argparse.Namespace) -> None:
    """Raise InputError where options of chats and mixtures do not go together."""
    if not options.chat and not methods.files(options):
        for name in ("dataset_dir", "columns", "long"):
            if getattr(options, name):
                raise InputError(f"--{name.replace('_', '-')} goes with --chat")
    sources = len(options.chat or methods.files(options)) + len(options.data)
    if options.mix and len(options.mix) != sources:
        what = f"{len(options.chat)} --chat and {len(options.data)} --data" if options.chat else f"{sources} --data"
        raise InputError(f"--mix has {len(options.mix)} weights for {what}")


def settle(options: argparse.Namespace) -> None:
    """Set the options of DEFAULTS that were not given: to a resumed run's own, or to the table's. What depends on a
    model or on data that is not read yet stays None: see `fit_context` and `fit_steps`."""
    own = recorded(options.out) if options.resume and not options.plan else {}
    own.pop("micro_batch", None)                            # was resolved for the ranks that there were
    later = set()                                           # what others of the options say
    if options.epochs:
        later.add("steps")
    if options.gradient_accumulation:
        later.add("micro_batch")
        if options.micro_batch and options.batch_size is None:
            ranks = options.world_size if options.plan else int(os.environ.get("WORLD_SIZE", 1))
            options.batch_size = ranks * options.micro_batch * options.gradient_accumulation
    for name, values in DEFAULTS.items():
        if getattr(options, name) is None and name not in later:
            usual = LORA_DEFAULTS.get(name) if tuning.tunes(options) else None
            if name == "lr" and (options.preference or options.grpo or options.ppo):
                usual = PREFERENCE_LR["adapters" if tuning.tunes(options) else "full"]
            setattr(options, name, own.get(name, None if name == "context" else usual or values[kind(options)]))
    if options.dtype == "auto" and own.get("dtype") in DTYPES:
        options.dtype = own["dtype"]
    if not options.init:
        fit_context(options, preset(options.preset))


def recorded(folder: Path) -> dict:
    """The options in run.json of a run folder; none where there is no such record, which runs.check reports."""
    try:
        return dict(json.loads((folder / "run.json").read_text())["options"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def fit_context(options: argparse.Namespace, config: ModelConfig) -> None:
    """Settle --context where it was not given: that of DEFAULTS, or the model's own where that is shorter."""
    most = DEFAULTS["context"][kind(options)]
    options.context = options.context or min(most, config.context or most)


def fit_steps(options: argparse.Namespace, rows: int) -> None:
    """Settle --steps and --warmup where they were not given, for data of so many rows."""
    epochs = options.epochs or (3 if options.chat else 1)
    options.steps = options.steps or math.ceil(epochs * rows / options.batch_size) * options.updates
    if options.warmup is None:
        options.warmup = math.ceil(0.03 * options.steps)


def check_device(name: str) -> None:
    """Raise InputError where this machine has no such device."""
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:         # torch without CUDA asserts
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from None


def fast_dtype(device: str) -> str:
    """The dtype in which matrix products are fastest. A CPU with instructions for bfloat16 may still be slower in it
    (Intel's without AMX are, by half; AMD's are twice as fast), so there one product is timed in each."""
    if device.startswith("cuda"):
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    able = torch.cpu.get_capabilities() if device == "cpu" else {}
    if not able.get("avx512_bf16") and not able.get("amx_bf16"):
        return "float32"
    return "bfloat16" if product_seconds(torch.bfloat16) < 0.75 * product_seconds(torch.float32) else "float32"


def product_seconds(dtype: torch.dtype) -> float:
    """CPU time of one matrix product in one thread, the least of five: what other processes do hardly changes it."""
    x, w, seconds = torch.randn(2048, 256).to(dtype), torch.randn(512, 256).to(dtype), []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(5):
            began = time.thread_time()
            torch.nn.functional.linear(x, w)
            seconds.append(time.thread_time() - began)
    finally:
        torch.set_num_threads(threads)
    return min(seconds)


def rows_at_once(batch: int, micro: int | None, ranks: int, passes: int | None = None) -> int:
    """Rows of one forward pass: batch = ranks × rows × passes. Without `passes` (gradient accumulation) they are
    `micro`, or all of a rank's where that is not given either. Raises InputError where a step's rows do not come out
    even."""
    if passes and batch % (ranks * passes):
        raise InputError(f"--batch-size {batch} is not a multiple of {ranks} rank(s) × --gradient-accumulation "
                         f"{passes}")
    if passes and micro not in (None, batch // (ranks * passes)):
        raise InputError(f"--batch-size {batch} is not {ranks} rank(s) × --micro-batch {micro} × "
                         f"--gradient-accumulation {passes} = {ranks * micro * passes}; leave one of the three out")
    micro = micro or batch // (ranks * (passes or 1)) or 1
    if batch % (micro * ranks):
        raise InputError(f"--batch-size {batch} is not a multiple of {ranks} rank(s) × --micro-batch {micro}")
    return micro


def from_toml(path: Path, parser: Parser) -> list[str]:
    """A TOML file as the arguments that mean the same, so that they are checked alike. Raises InputError, which names
    the file and the key."""
    try:
        values = tomllib.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:                                                 # not TOML, or not UTF-8
        raise InputError(f"{path}: not TOML: {error}") from None
    return as_arguments(values, parser, f"{path}: ")


def as_arguments(values: dict, parser: Parser, where: str) -> list[str]:
    """Values by the names of their options, as arguments. Raises InputError for an option that does not exist."""
    args = []
    for key, value in values.items():
        option = "--" + key.replace("_", "-")
        if option not in parser._option_string_actions:
            raise InputError(f"{where}unknown option {key}{parser.nearest(option)}")
        if isinstance(value, dict):
            raise InputError(f"{where}{key} is a table; options are not grouped")
        if value is not False:
            args += [option] if value is True else [option, *map(str, value if isinstance(value, list) else [value])]
    return args
