"""What a model can do, in figures that compare with those of others.

    python -m benchmarks.evaluate --model MODEL --tasks hellaswag,arc_easy,mmlu     tasks of lm-evaluation-harness
    python -m benchmarks.evaluate --model MODEL --tasks gsm8k --apply-chat-template --fewshot 5 --limit 100
    python -m benchmarks.evaluate --model MODEL --tasks hellaswag --data DIR        from files, without a network
    python -m benchmarks.evaluate --model MODEL --tasks hellaswag --against hf      and each answer beside transformers'
    python -m benchmarks.evaluate --model MODEL --perplexity FILE --window 1024 --stride 512
    python -m benchmarks.evaluate --model MODEL --perplexity FILE --window 8192 --places --out FOLDER
    python -m benchmarks.evaluate --model MODEL --needle FILE --lengths 512,1024,2048 --out FOLDER
    python -m benchmarks.evaluate --model MODEL --speed                             tokens/s, first token, memory

MODEL is a Hugging Face folder, a FILE.gguf or owner/name on the hub. Tasks need lm_eval: pip install -e ".[eval]".
What each prints: docs/evaluation.md.
"""

import argparse
import contextlib
import importlib.util
import os
import sys
import tempfile
from pathlib import Path

from nanollm.cli import Once, Parser, main, quiet_ctrl_c, whole

if __name__ == "__main__":
    quiet_ctrl_c()              # before torch
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")      # progress bars, the harness's too, are for a terminal

import torch

import checkpoints
from benchmarks.evaluate import needle, speed, text
from checkpoints.layouts.hub import local_path
from nanollm.errors import InputError
from nanollm.inference.machine import device
from nanollm.inference.prepare import prepare
from nanollm.inference.quantize import KINDS
from nanollm.inference.terminal import note
from nanollm.model import Decoder
from nanollm.text.tokenizer import Tokenizer

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GOES_WITH = {  # option: the ways of asking that read it
    "fewshot": ("tasks",), "limit": ("tasks",), "apply_chat_template": ("tasks", "needle"), "data": ("tasks",),
    "against": ("tasks", "perplexity"), "out": ("tasks", "perplexity", "needle"), "window": ("perplexity",),
    "stride": ("perplexity",), "places": ("perplexity",), "lengths": ("needle",), "depths": ("needle",),
    "batch_tokens": ("tasks", "perplexity"),
}


def names(text: str) -> list[str]:
    """Of a list with commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def sizes(text: str) -> list[int]:
    """The same of whole numbers above 0."""
    return [whole()(name) for name in names(text)]


def parse() -> argparse.Namespace:
    parser = Parser(prog="python -m benchmarks.evaluate", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="MODEL",
                        help="model folder, FILE.gguf, or owner/name on the Hugging Face hub")
    ways = parser.add_argument_group("what is asked: one of these").add_mutually_exclusive_group(required=True)
    ways.add_argument("--tasks", type=names, action=Once, metavar="NAME,NAME", help="tasks, groups or tags of lm_eval")
    ways.add_argument("--perplexity", type=Path, metavar="FILE", help="perplexity and bits per byte of a text")
    ways.add_argument("--needle", type=Path, metavar="FILE",
                      help="finding one sentence in this text, by length and depth")
    ways.add_argument("--speed", action="store_true", help="tokens a second, time to the first one, memory")
    asked = parser.add_argument_group("how it is asked")
    asked.add_argument("--data", type=Path, metavar="DIR", help="files of the tasks, DIR/TASK/SPLIT.jsonl: no network")
    asked.add_argument("--fewshot", type=whole(0), metavar="N", help="examples before each question")
    asked.add_argument("--limit", type=whole(), metavar="N", help="documents of each task (default all)")
    asked.add_argument("--apply-chat-template", action="store_true",
                       help="questions through the model's chat template; examples are turns before them")
    asked.add_argument("--window", type=whole(), metavar="W", help="tokens read at once (default: the model's context)")
    asked.add_argument("--stride", type=whole(), metavar="S",
                       help="tokens that a window goes on by (default W: each is read once)")
    asked.add_argument("--places", action="store_true",
                       help="loss by place in the window, as a picture: with RoPE as it is, and stretched to W")
    asked.add_argument("--lengths", type=sizes, metavar="N,N", help="tokens of haystack (default: to the context)")
    asked.add_argument("--depths", type=whole(2, 100), default=None, metavar="N",
                       help="depths from the beginning to the end (default 5)")
    asked.add_argument("--against", choices=["hf"], help="compare every answer with transformers', in float32")
    asked.add_argument("--out", type=Path, metavar="FOLDER", help="folder for results: lm_eval's JSON, pictures")
    machine = parser.add_argument_group("where it runs")
    machine.add_argument("--batch-tokens", type=whole(), metavar="N",
                         help="tokens in a batch (default: what the memory holds)")
    machine.add_argument("--dtype", choices=DTYPES, default="auto", help="dtype of the weights; auto: as config.json")
    machine.add_argument("--quantize", choices=KINDS, help="bits of a weight in the layers' matrices")
    machine.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1 …")
    args = parser.parse_args()
    check(parser, args)
    return args


def check(parser: Parser, args: argparse.Namespace) -> None:
    """End with an error where options do not go together."""
    way = next(name for name in ("tasks", "perplexity", "needle", "speed") if getattr(args, name))
    for name, ways in GOES_WITH.items():
        if getattr(args, name) not in (None, False) and way not in ways:
            parser.error(f"--{name.replace('_', '-')} goes with --{' and --'.join(ways)}")
    if args.against and (args.dtype not in ("auto", "float32") or args.quantize):
        parser.error("--against hf compares in float32: leave --dtype and --quantize out")
    if args.places and (args.stride or not args.out):
        parser.error("--places goes with --out FOLDER, for its picture, and without --stride: each place is scored "
                     "as often")


def need(package: str, extra: str) -> None:
    """Raise InputError where a package is not installed."""
    if not (sys.modules.get(package) or importlib.util.find_spec(package)):
        raise InputError(f"the package {package} is not installed; pip install -e '.[{extra}]' brings it")


def load(args: argparse.Namespace, path: Path) -> Decoder:
    """The model as it is stored."""
    dtype = torch.float32 if args.against else DTYPES[args.dtype]
    return checkpoints.load(path, dtype=dtype, device=device(args.device), quantize=args.quantize)


def ready(args: argparse.Namespace, path: Path) -> Decoder:
    """The model, prepared to run."""
    return prepare(load(args, path), head_bits=8 if args.quantize else None)


def tasks(args: argparse.Namespace, path: Path, tokenizer: Tokenizer) -> None:
    """--tasks. What is wrong with a name or a file is said before the weights are read."""
    need("lm_eval", "eval")
    from benchmarks.evaluate import run
    from benchmarks.evaluate import tasks as files
    from benchmarks.evaluate.harness import NanoLM
    files.check_names(args.tasks)
    with contextlib.ExitStack() as held:
        folder = args.out / "tasks" if args.out else Path(held.enter_context(tempfile.TemporaryDirectory()))
        manager = files.local_tasks(args.tasks, args.data, args.fewshot, folder) if args.data else files.packaged()
        lm = NanoLM(ready(args, path), tokenizer, str(args.model), args.batch_tokens)
        results = run.evaluate(lm, args.tasks, manager, limit=args.limit, fewshot=args.fewshot,
                               chat=args.apply_chat_template, out=args.out, data=args.data)
    print(run.table(results))
    if args.against:
        from benchmarks.evaluate import against
        report = against.compare(lm, against.reference(path, lm.context, device(args.device)))
        print(*report.lines(), sep="\n")
        if report.different:
            raise InputError("not all answers are those of transformers")


def perplexity(args: argparse.Namespace, path: Path, tokenizer: Tokenizer) -> None:
    """--perplexity."""
    if args.places:
        picture = text.places(lambda: load(args, path), tokenizer, args.perplexity, args.window, args.batch_tokens,
                              args.out)
        return note(f"[{picture}]")
    model = ready(args, path)
    tokens, window, stride, found = text.report(model, tokenizer, args.perplexity, args.window, args.stride,
                                                args.batch_tokens)
    if (theirs := text.by_llama_cpp(path, tokens, window, stride)) is not None:
        text.beside("llama.cpp", found.loss, theirs)
    if args.against:
        need("transformers", "test")
        theirs = text.by_transformers(path, tokens, window, stride, device(args.device))
        if text.beside("transformers", found.loss, theirs) > text.BOUND:
            raise InputError(f"the perplexities differ by more than {text.BOUND:g}")


def run() -> None:
    args = parse()
    path = local_path(args.model)
    tokenizer = checkpoints.tokenizer(path)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    if args.tasks:
        tasks(args, path, tokenizer)
    elif args.perplexity:
        perplexity(args, path, tokenizer)
    elif args.needle:
        needle.report(ready(args, path), tokenizer, args.needle, args.lengths, args.depths, args.apply_chat_template,
                      args.out)
    else:
        speed.report(ready(args, path))


if __name__ == "__main__":
    main(run)
