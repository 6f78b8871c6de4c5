"""The options of train.py: on the command line, in a TOML file, or both.

    python train.py --config run.toml --lr 0.001            what is on the command line wins

    run.toml     preset = "llama"              an option without its dashes, with - or _; true for a switch
                 data = ["web", "books"]       a list for several values
                 batch-size = 64

Where an option is given in neither, DEFAULTS has its value: by the kind of run, as a toy and a model of 8 billion
parameters have little in common.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch

from nanollm import cli
from nanollm.cli import Parser
from nanollm.config import ModelConfig
from nanollm.errors import InputError
from nanollm.presets import PRESETS, preset
from nanollm.text.templates import TEMPLATES
from nanollm.training.distributed import DTYPES, RECOMPUTE
from nanollm.training.optim import SCHEDULES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


whole, whole_or_0 = cli.whole(), cli.whole(0)


def rate(text: str) -> float:
    """A number from 0 on, for an option."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: expected a finite number, 0 or more")
    return value


def span(text: str) -> tuple[int, int]:
    """Two steps a:b with a < b, for an option."""
    a, colon, b = text.partition(":")
    if not colon or not a.isdigit() or not b.isdigit() or int(a) >= int(b):
        raise argparse.ArgumentTypeError(f"{text}: expected a:b with a < b, which skips steps a+1 … b")
    return int(a), int(b)


# What an option is where it is not given. A run that is resumed keeps what it had.
#                     a toy   a published preset   --init
DEFAULTS: dict[str, tuple] = {
    "optimizer":    ("muon",  "adamw",             "adamw"),
    "lr":           (0.012,   0.0003,              0.00002),
    "weight_decay": (0.0,     0.1,                 0.0),
    "context":      (128,     4096,                2048),       # at most the model's own
    "batch_size":   (16,      256,                 16),
    "micro_batch":  (None,    1,                   1),          # None: all rows of a rank
    "steps":        (350,     None,                None),       # None: one epoch of the data; of --chat three
    "warmup":       (20,      None,                None),       # None: 3 % of the steps
}


def kind(options: argparse.Namespace) -> int:
    """The column of DEFAULTS that a run takes."""
    return 2 if options.init else 0 if options.preset.endswith("-toy") or f"{options.preset}-toy" in PRESETS else 1


def default(name: str, none: str = "") -> str:
    """How --help states a row of DEFAULTS, with `none` for a value that is None."""
    values = [none if value is None else f"{value:g}" if isinstance(value, float) else str(value)
              for value in DEFAULTS[name]]
    if values[1] == values[2]:
        return f"default {values[0]}; published presets and --init: {values[1]}"
    return f"default {values[0]}; published presets: {values[1]}; --init: {values[2]}"


def build_parser(description: str) -> Parser:
    """Every option of train.py, with its default and what it means."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("the model and its data").add_argument
    add("--preset", default="llama", metavar="NAME",
        help=f"shape of a new model, toy or published (default llama, which is llama-toy): {', '.join(PRESETS)}")
    add("--init", type=Path, metavar="FOLDER",
        help="pretrained model to start from, for fine-tuning: config, weights and tokenizer of a folder")
    add("--data", type=Path, nargs="+", default=[], metavar="PATH",
        help="training text: a file, a .jsonl, or a folder of them; or tokenized shards: folders made by "
             "python -m nanollm.data, .bin files (default: the source of Python's standard library)")
    add("--mix", type=rate, nargs="+", metavar="W",
        help="mixture weights, one for each --data of shards (default: in proportion to their size)")
    add("--chat", type=Path, metavar="FILE",
        help="chats for supervised fine-tuning (SFT), loss on the answers only: .jsonl of messages, alpaca, sharegpt "
             "or prompt/completion")
    add("--template", metavar="NAME_OR_FILE",
        help=f"chat template for a model that has none: a file (Jinja), a name of its own, "
             f"or one of {', '.join(TEMPLATES)}")
    add("--tokenizer", type=Path, metavar="FOLDER",
        help="tokenizer for --data: a folder with its files (default: a BPE trained on the text, or that of --init)")
    add("--vocab", type=whole, metavar="N",
        help="vocabulary size of the BPE that is trained (default: the preset's); of raw .bin files, the size they "
             "were made with")
    add = parser.add_argument_group("the run folder").add_argument
    add("--out", type=Path, metavar="FOLDER",
        help="run folder: checkpoints, log, model (default runs/demo; with --preset runs/NAME, with --init "
             "runs/FOLDER-tuned)")
    add("--resume", action="store_true",
        help="continuation of the run in the run folder, from its newest checkpoint, or from step 0 where there is "
             "none. Repeat the run's command with it; optimizer, learning rate, weight decay, context, batch size, "
             "steps, warm-up and dtype may be left out")
    add("--force", action="store_true",
        help="overwriting of the run in that folder; with --resume: continuation although options differ")
    add("--config", type=Path, metavar="FILE", help="options as a TOML file; those on the command line win")
    add = parser.add_argument_group("optimization").add_argument
    add("--steps", type=whole, metavar="N",
        help=f"optimizer steps ({default('steps', none='one epoch, once through the data; with --chat three epochs')})")
    add("--batch-size", type=whole, metavar="B",
        help=f"rows (sequences) a step, over all ranks and micro-batches ({default('batch_size')})")
    add("--micro-batch", type=whole, metavar="B",
        help="rows in one forward and backward pass of a rank; where a rank has more, it takes several passes a step "
             f"and sums their gradients (gradient accumulation; {default('micro_batch', none='all rows of the rank')})")
    add("--context", type=whole, metavar="T",
        help=f"context length, tokens a row, at most what the model was made for ({default('context')})")
    add("--lr", type=rate, metavar="RATE", help=f"peak learning rate ({default('lr')})")
    add("--schedule", choices=SCHEDULES, default="linear",
        help="learning-rate schedule after the warm-up: down to 0 in a line or half a cosine, or warmup-stable-decay "
             "(default linear)")
    add("--warmup", type=whole_or_0, metavar="N",
        help=f"warm-up steps, in which the learning rate rises to --lr ({default('warmup', none='3 %% of the steps')})")
    add("--decay", type=rate, default=0.2, metavar="SHARE",
        help="decay phase of --schedule wsd, as a share of the steps (default 0.2)")
    add("--optimizer", choices=("muon", "adamw"),
        help="optimizer: AdamW for all parameters; or Muon for the matrices inside the layers and AdamW for the rest "
             f"({default('optimizer')})")
    add("--weight-decay", type=rate, metavar="RATE", help=f"weight decay, on matrices only ({default('weight_decay')})")
    add("--clip", type=rate, default=1.0, metavar="NORM",
        help="gradient clipping: the largest norm a gradient may have, 0 for any (default 1.0)")
    add("--balance", type=rate, default=0.01, metavar="WEIGHT",
        help="load-balance loss: its weight, where the model has experts (default 0.01)")
    add("--z-loss", type=rate, default=0.0, metavar="WEIGHT",
        help="z-loss: the weight of (log Z)², which keeps logits from drifting (default 0; often 0.0001)")
    add("--seed", type=cli.whole(*cli.SEEDS), default=0, metavar="N",
        help="random seed of weights and of the order of rows (default 0)")
    add("--skip-sigma", type=rate, default=0.0, metavar="K",
        help="threshold of loss spikes: steps whose loss or gradient norm is more than K standard deviations above "
             "the last 128 are skipped (default 0: none; often 6)")
    add("--skip-steps", type=span, nargs="+", default=[], metavar="A:B",
        help="steps to pass over, counted from 0: their rows are read and not learnt from")
    add = parser.add_argument_group("hardware").add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="device: cpu, cuda, cuda:1 …; with --plan the name of a GPU (default: cuda where there is one)")
    add("--dtype", choices=("auto", *DTYPES), default="auto",
        help="dtype of matrix products (mixed precision); weights, gradients and optimizer stay float32 (default auto: "
             "bfloat16 where the device is faster at it)")
    add("--replicas", type=whole, default=1, metavar="R",
        help="replicas of the sharded model (HSDP): R groups of ranks, each with a whole model in shards (default 1)")
    add("--recompute", choices=RECOMPUTE, default="none",
        help="activation checkpointing: activations that the backward pass computes again instead of keeping: none, "
             "all but attention, or all (default none)")
    add("--compile", action="store_true", help="torch.compile for each layer")
    add("--offload", action="store_true",
        help="CPU offload: weights, gradients and optimizer state live in the memory of the CPU")
    add = parser.add_argument_group("evaluation, samples, checkpoints").add_argument
    add("--eval-every", type=whole, default=100, metavar="N",
        help="steps between evaluations of the held-out (validation) loss (default 100)")
    add("--sample-every", type=whole_or_0, default=200, metavar="N",
        help="steps between samples of text, 0 for none (default 200)")
    add("--prompt", metavar="TEXT",
        help='prompt that samples continue (default "def " on the standard library, else the beginning of a document)')
    add("--save-every", type=whole, default=200, metavar="N", help="steps between checkpoints (default 200)")
    add("--keep", type=whole, default=2, metavar="N", help="checkpoints that are kept, the newest (default 2)")
    add("--tensorboard", action="store_true", help="TensorBoard event files in the run folder, beside log.jsonl")
    add("--wandb", metavar="PROJECT", help="Weights & Biases project that gets the curves, beside log.jsonl")
    add = parser.add_argument_group("planning").add_argument
    add("--plan", action="store_true", help="estimate of memory, communication and time of the run, instead of the run")
    add("--world-size", type=whole, default=1, metavar="N", help="number of GPUs (ranks) to plan for (default 1)")
    add("--mfu", type=rate, default=0.4, metavar="SHARE",
        help="model FLOPs utilisation to plan with: the share of the GPU's peak that is reached (default 0.4)")
    return parser


def parse(description: str, args: list[str] | None = None) -> argparse.Namespace:
    """The options of one run, with defaults, as far as they depend on no file. Raises InputError for those that do not
    go together; argparse ends the process for others."""
    args, parser = sys.argv[1:] if args is None else args, build_parser(description)
    early = Parser(add_help=False)
    early.add_argument("--config", type=Path)
    file = early.parse_known_args(args)[0].config
    options = parser.parse_args([*from_toml(file, parser), *args] if file else args)
    if options.chat and not options.init:
        raise InputError("--chat fine-tunes a model that exists: name its folder with --init")
    if options.init and options.init.is_file() and not options.plan:
        raise InputError(f"--init {options.init}: a file; fine-tuning starts from a folder: "
                         f"python -m checkpoints.convert {options.init} FOLDER")
    if options.chat and options.data:
        raise InputError("--chat and --data are two kinds of training; give one of them")
    if options.mix and len(options.mix) != len(options.data):
        raise InputError(f"--mix has {len(options.mix)} weights for {len(options.data)} --data")
    name = "demo" if options.preset == parser.get_default("preset") else options.preset
    options.out = options.out or Path("runs") / (f"{options.init.name}-tuned" if options.init else name)
    settle(options)
    if not options.plan:
        check_device(options.device)
        options.dtype = fast_dtype(options.device) if options.dtype == "auto" else options.dtype
    source = [path.name for path in ([options.chat] if options.chat else options.data)]
    model = options.init.name if options.init else options.preset
    options.title = f"{model} on {', '.join(source) or 'the standard library'}"
    if options.prompt is None:
        options.prompt = "def " if not (options.data or options.chat) else ""
    return options


def settle(options: argparse.Namespace) -> None:
    """Set the options of DEFAULTS that were not given: to a resumed run's own, or to the table's. What depends on a
    model or on data that is not read yet stays None: see `fit_context` and `fit_steps`."""
    own = recorded(options.out) if options.resume and not options.plan else {}
    own.pop("micro_batch", None)                            # was resolved for the ranks that there were
    for name, values in DEFAULTS.items():
        if getattr(options, name) is None:
            setattr(options, name, own.get(name, None if name == "context" else values[kind(options)]))
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
    epochs = 3 if options.chat else 1
    options.steps = options.steps or math.ceil(epochs * rows / options.batch_size)
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


def rows_at_once(batch: int, micro: int | None, ranks: int) -> int:
    """Rows of one forward pass, all of a rank's where `micro` is not given. Raises InputError where a step's rows do
    not come out even."""
    micro = micro or batch // ranks or 1
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
    args = []
    for key, value in values.items():
        option = "--" + key.replace("_", "-")
        if option not in parser._option_string_actions:
            raise InputError(f"{path}: unknown option {key}{parser.nearest(option)}")
        if isinstance(value, dict):
            raise InputError(f"{path}: {key} is a table; options are not grouped")
        if value is not False:
            args += [option] if value is True else [option, *map(str, value if isinstance(value, list) else [value])]
    return args
