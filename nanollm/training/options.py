"""The options of train.py: on the command line, in a TOML file, or both.

    python train.py --config run.toml --lr 0.001            what is on the command line wins

    run.toml     preset = "llama"              an option without its dashes, with - or _; true for a switch; a list for several values
                 data = ["web", "books"]
                 batch-size = 64
"""

import argparse
import math
import sys
from pathlib import Path

import torch

from nanollm.cli import Parser
from nanollm.errors import InputError
from nanollm.presets import PRESETS
from nanollm.text.templates import TEMPLATES
from nanollm.training.distributed import DTYPES, RECOMPUTE
from nanollm.training.optim import SCHEDULES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def whole(text: str) -> int:
    value = int(text.replace("_", ""))
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number above 0")
    return value


def whole_or_0(text: str) -> int:
    return 0 if text == "0" else whole(text)


def rate(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: expected a finite number, 0 or more")
    return value


def span(text: str) -> tuple[int, int]:
    a, colon, b = text.partition(":")
    if not colon or not a.isdigit() or not b.isdigit() or int(a) >= int(b):
        raise argparse.ArgumentTypeError(f"{text}: expected a:b with a < b, which passes over the rows of steps a+1 … b")
    return int(a), int(b)


def build_parser(description: str) -> Parser:
    """Every option of train.py, with its default and what it means."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("what is trained").add_argument
    add("--preset", default="llama", metavar="NAME", help=f"shape of the model (default llama, which is llama-toy): {', '.join(PRESETS)}")
    add("--init", type=Path, metavar="FOLDER", help="go on from the weights and the tokenizer of a Hugging Face folder instead")
    add("--data", type=Path, nargs="+", default=[], metavar="PATH", help="text, .jsonl, or folders of them; or shards: folders made by python -m nanollm.data, .bin files "
        "(default: the source of Python's standard library)")
    add("--mix", type=rate, nargs="+", metavar="W", help="how much of each --data, when they are shards (default: all alike, by size)")
    add("--chat", type=Path, metavar="FILE", help="fine-tune on chats instead: .jsonl of messages, alpaca, sharegpt or prompt/completion")
    add("--template", metavar="NAME_OR_FILE", help=f"a chat template, for a model that has none: a file (Jinja), or one of {', '.join(TEMPLATES)}")
    add("--tokenizer", type=Path, metavar="FOLDER", help="a folder with tokenizer files for --data (default: a BPE trained on the text, or that of --init)")
    add("--vocab", type=whole, metavar="N", help="tokens of the BPE that is trained (default: the preset's); for raw .bin files the vocabulary they were made with")
    add = parser.add_argument_group("the run folder").add_argument
    add("--out", type=Path, metavar="FOLDER", help="run folder (default runs/demo, with --preset runs/NAME)")
    add("--resume", action="store_true", help="go on from the newest checkpoint in the run folder; from the start where there is none")
    add("--force", action="store_true", help="replace the run in that folder; with --resume: go on although options differ")
    add("--config", type=Path, metavar="FILE", help="options from a TOML file; those on the command line win")
    add = parser.add_argument_group("how").add_argument
    add("--steps", type=whole, default=550, metavar="N", help="optimizer steps (default 550)")
    add("--batch-size", type=whole, default=16, metavar="B", help="rows a step, over all ranks and micro-batches (default 16)")
    add("--micro-batch", type=whole, metavar="B", help="rows in one forward pass of a rank (default: all its rows)")
    add("--context", type=whole, default=128, metavar="T", help="tokens a row (default 128)")
    add("--lr", type=rate, metavar="RATE", help="highest learning rate (default 0.007, with --init 0.0005)")
    add("--schedule", choices=SCHEDULES, default="linear", help="of the rate after the warm-up (default linear, down to 0 at the last step)")
    add("--warmup", type=whole_or_0, default=20, metavar="N", help="steps in which the rate rises to --lr (default 20)")
    add("--decay", type=rate, default=0.2, metavar="SHARE", help="of the steps in which wsd goes down (default 0.2)")
    add("--optimizer", choices=("muon", "adamw"), default="muon", help="muon (default): Muon for matrices inside the layers, AdamW for the rest")
    add("--weight-decay", type=rate, default=0.0, metavar="RATE", help="on matrices (default 0)")
    add("--clip", type=rate, default=1.0, metavar="NORM", help="longest gradient, 0 for no limit (default 1.0)")
    add("--balance", type=rate, default=0.01, metavar="WEIGHT", help="weight of the loss that spreads tokens over experts (default 0.01)")
    add("--z-loss", type=rate, default=0.0, metavar="WEIGHT", help="weight of the loss that keeps log Z near 0 (default 0; often 0.0001)")
    add("--seed", type=int, default=0, metavar="N", help="of the weights and the order of the rows (default 0)")
    add("--skip-sigma", type=rate, default=0.0, metavar="K", help="skip steps with loss or gradient more than K standard deviations above the last 128 (default 0: never; often 6)")
    add("--skip-steps", type=span, nargs="+", default=[], metavar="A:B", help="pass over the rows of these steps, counted from 0")
    add = parser.add_argument_group("where").add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1 …; with --plan the name of a GPU")
    add("--dtype", choices=("auto", *DTYPES), default="auto", help="of the matrix products; weights and sums stay float32. auto: bfloat16 where the machine is fast at it")
    add("--replicas", type=whole, default=1, metavar="R", help="under torchrun: R groups of ranks, each with a whole model in slices (HSDP; default 1)")
    add("--recompute", choices=RECOMPUTE, default="none", help="activations that are computed again instead of kept: none, all but attention, or all (default none)")
    add("--compile", action="store_true", help="torch.compile each layer")
    add("--offload", action="store_true", help="keep weights and optimizer in the memory of the CPU")
    add = parser.add_argument_group("what it shows and keeps").add_argument
    add("--eval-every", type=whole, default=100, metavar="N", help="steps between looks at the held-out loss (default 100)")
    add("--sample-every", type=whole_or_0, default=200, metavar="N", help="steps between samples, 0 for none (default 200)")
    add("--prompt", metavar="TEXT", help='what samples continue (default "def " on the standard library, else the beginning of a document)')
    add("--save-every", type=whole, default=200, metavar="N", help="steps between checkpoints (default 200)")
    add("--keep", type=whole, default=2, metavar="N", help="checkpoints that stay (default 2)")
    add("--tensorboard", action="store_true", help="curves for TensorBoard too")
    add("--wandb", metavar="PROJECT", help="curves for Weights & Biases too")
    add = parser.add_argument_group("planning").add_argument
    add("--plan", action="store_true", help="print memory, communication and time of such a run, and do not run it")
    add("--world-size", type=whole, default=1, metavar="N", help="with --plan: how many GPUs (default 1)")
    add("--mfu", type=rate, default=0.4, metavar="SHARE", help="with --plan: share of the GPU's peak that is reached (default 0.4)")
    return parser


def parse(description: str, args: list[str] | None = None) -> argparse.Namespace:
    """The options of one run, defaults resolved. Raises InputError for those that do not go together; argparse ends the process for others."""
    args, parser = sys.argv[1:] if args is None else args, build_parser(description)
    early = Parser(add_help=False)
    early.add_argument("--config", type=Path)
    file = early.parse_known_args(args)[0].config
    options = parser.parse_args([*from_toml(file, parser), *args] if file else args)
    if options.chat and not options.init:
        raise InputError("--chat fine-tunes a model that exists: name its folder with --init")
    if options.chat and options.data:
        raise InputError("--chat and --data are two kinds of training; give one of them")
    if options.mix and len(options.mix) != len(options.data):
        raise InputError(f"--mix has {len(options.mix)} weights for {len(options.data)} --data")
    name = options.init.name + "-tuned" if options.init else "demo" if options.preset == parser.get_default("preset") else options.preset
    options.out = options.out or Path("runs") / name
    options.lr = options.lr if options.lr is not None else 0.0005 if options.init else 0.007
    if not options.plan:
        check_device(options.device)
        options.dtype = fast_dtype(options.device) if options.dtype == "auto" else options.dtype
    source = [path.name for path in ([options.chat] if options.chat else options.data)]
    options.title = f"{options.init.name if options.init else options.preset} on {', '.join(source) or 'the standard library'}"
    if options.prompt is None:
        options.prompt = "def " if not (options.data or options.chat) else ""
    return options


def check_device(name: str) -> None:
    """Raise InputError where this machine has no such device."""
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:         # torch without CUDA asserts
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from None


def fast_dtype(device: str) -> str:
    """bfloat16 is slower than float32 on a CPU without instructions for it."""
    if device.startswith("cuda"):
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    able = torch.cpu.get_capabilities() if device == "cpu" else {}
    return "bfloat16" if able.get("avx512_bf16") or able.get("amx_bf16") else "float32"


def rows_at_once(batch: int, micro: int | None, ranks: int) -> int:
    """Rows of one forward pass, all of a rank's where `micro` is not given. Raises InputError where a step's rows do not come out even."""
    micro = micro or batch // ranks or 1
    if batch % (micro * ranks):
        raise InputError(f"--batch-size {batch} is not a multiple of {ranks} rank(s) × --micro-batch {micro}")
    return micro


def from_toml(path: Path, parser: Parser) -> list[str]:
    """A TOML file as the arguments that say the same, so that they are checked alike. Raises InputError, which names the file and the key."""
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
