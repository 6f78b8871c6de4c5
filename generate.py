"""Prompt in, text out, streamed.

    python generate.py --model FOLDER --prompt "def fibonacci(n):"          one prompt
    python generate.py --model FOLDER --prompt "One" --prompt "Two"         several at once, as one batch
    python generate.py --model FOLDER --chat                                a conversation, with the model's template
    python generate.py --model FOLDER --chat --template vicuna              with a published one, if the folder has none
    python generate.py --model FOLDER --prompt "def f(" --suffix "return x" --template codellama    fill in the middle

FOLDER is what Hugging Face calls a model folder: config.json, model.safetensors (or shards with an index) and tokenizer
files. train.py writes one. A name like Qwen/Qwen2.5-0.5B-Instruct, which is no folder here, is downloaded from the hub.
Text goes to standard output, everything else to standard error.
"""

import argparse
import sys
import time
from collections.abc import Iterator

import torch

import checkpoints
from checkpoints.layouts.hub import local_path
from nanollm.cli import Parser, main
from nanollm.inference.generation import Session, generate_batch, stream_text
from nanollm.inference.quantize import quantize
from nanollm.model import Decoder
from nanollm.text import templates
from nanollm.text.chat import Conversation
from nanollm.text.tokenizer import Tokenizer

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUANTIZE = {"int8": 8, "int4": 4}


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="FOLDER_OR_HUB_ID",
                        help="model folder, or owner/name on the Hugging Face hub")
    parser.add_argument("--prompt", action="append", metavar="TEXT",
                        help="text to continue; several times for a batch; - reads standard input")
    parser.add_argument("--chat", action="store_true", help="conversation in turns; an empty line or Ctrl-D ends it")
    parser.add_argument("--template", metavar="NAME_OR_FILE",
                        help="chat template in place of the folder's, with --chat: a file (Jinja) or one of "
                        f"{', '.join(templates.TEMPLATES)}; with --suffix: one of {', '.join(templates.INFILL)}")
    parser.add_argument("--suffix", metavar="TEXT",
                        help="text after the middle, to fill in the middle; with one --prompt and --template")
    parser.add_argument("--system", metavar="TEXT", help="system message, with --chat")
    parser.add_argument("--bos", action=argparse.BooleanOptionalAction,
                        help="beginning-of-sequence token before each --prompt, or none; without the option as the "
                        "tokenizer's files say")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N",
                        help="most tokens of an answer, a prompt or turn (default 256)")
    parser.add_argument("--context", type=int, default=4096, metavar="N",
                        help="most tokens of a whole conversation, with --chat (default 4096)")
    choice = parser.add_argument_group("how the next token is chosen")
    choice.add_argument("--temperature", type=float, default=0.0, metavar="T",
                        help="divisor of the logits: 0 takes the likeliest token (default); 1 draws as the model says")
    choice.add_argument("--top-k", type=int, metavar="K", help="number of likeliest tokens to draw among")
    choice.add_argument("--top-p", type=float, metavar="P",
                        help="probability that the fewest tokens to draw among must reach together")
    choice.add_argument("--min-p", type=float, metavar="P",
                        help="probability of a token to draw among, at least, as a share of the likeliest one's")
    choice.add_argument("--seed", type=int, metavar="N", help="seed of the draw, which makes it repeatable")
    choice.add_argument("--stop", action="append", default=[], metavar="TEXT",
                        help="text at which the answer ends; may be given several times")
    machine = parser.add_argument_group("where it runs")
    machine.add_argument("--dtype", choices=DTYPES, default="auto",
                         help="dtype of the weights; auto: as config.json says")
    machine.add_argument("--quantize", choices=QUANTIZE,
                         help="bits of a weight in the layers' matrices: half or a quarter of the memory, faster on a "
                         "GPU, slower on a CPU")
    machine.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                         help="device: cpu, cuda, cuda:1 …")
    machine.add_argument("--ignore", action="append", default=[], metavar="NAME",
                         help="config key or tensor, of those that loading complains of, to pass over; may be repeated")
    args = parser.parse_args()
    large = 1 << 31
    bounds = {"max_new_tokens": (1, large), "context": (2, large), "temperature": (0, 100), "top_k": (1, large),
              "top_p": (0, 1), "min_p": (0, 1)}
    for name, (low, high) in bounds.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            parser.error(f"--{name.replace('_', '-')} {value}: expected {low} to {high}")
    if args.chat == bool(args.prompt):
        parser.error("give either --prompt TEXT or --chat")
    if args.suffix is not None and (args.chat or len(args.prompt) > 1 or not args.template):
        parser.error("--suffix goes with one --prompt, and with a --template that says how to infill")
    if args.template and not args.chat and args.suffix is None:
        parser.error("--template goes with --chat or --suffix; a --prompt is continued as it stands")
    if args.bos is not None and (args.chat or args.suffix is not None):
        parser.error("--bos and --no-bos go with --prompt; a template says itself how a text begins")
    return args


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def warn(tokenizer: Tokenizer, ids: list[int], bos: bool | None = None) -> None:
    """What looks wrong about BOS and the stop tokens. bos: what --bos or --no-bos decided, if one was given."""
    for warning in [*tokenizer.doctor(), *tokenizer.warnings(ids)]:
        if bos is None or "--bos" not in warning:       # the advice was heard
            note(f"warning: {warning}")


def say(tokenizer: Tokenizer, tokens: Iterator[int], stop: list[str], continues: bool) -> list[int]:
    """Print the tokens' text as it comes, and the speed; return the tokens. continues: they go on from printed text."""
    new: list[int] = []
    times = [time.perf_counter()]

    def pieces() -> Iterator[str]:
        stream = tokenizer.stream(continues=continues)
        for token in tokens:
            times.append(time.perf_counter())
            new.append(token)
            yield stream.push(token)
        yield stream.finish()

    for text in stream_text(pieces(), stop):
        print(text, end="", flush=True)
    print(flush=True)
    if len(new) > 1:                                    # the first token pays for the prompt
        rate = (len(new) - 1) / (times[-1] - times[1])
        note(f"[{len(new)} tokens; the first after {times[1] - times[0]:.2f} s, then {rate:.1f} tokens/s]")
    return new


def sampling(args: argparse.Namespace) -> dict:
    return dict(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, min_p=args.min_p, seed=args.seed)


def complete(args: argparse.Namespace, model: Decoder, tokenizer: Tokenizer) -> None:
    texts = [sys.stdin.read() if prompt == "-" else prompt for prompt in args.prompt]
    if args.suffix is None:
        prompts = [tokenizer.encode(text, bos=args.bos) for text in texts]
    else:
        prompts = [templates.infill(tokenizer, args.template, texts[0], args.suffix)]
    warn(tokenizer, prompts[0], args.bos)
    if len(prompts) == 1:
        print(args.prompt[0] if args.prompt[0] != "-" else "", end="")
        session = Session(model, len(prompts[0]) + args.max_new_tokens)
        stop = [*args.stop, *tokenizer.stop_texts]
        tokens = session.generate(prompts[0], args.max_new_tokens, stop_ids=tokenizer.stop_ids, **sampling(args))
        say(tokenizer, tokens, stop, continues=True)
        return
    start = time.perf_counter()
    answers = generate_batch(model, prompts, args.max_new_tokens, stop_ids=tokenizer.stop_ids, **sampling(args))
    seconds = time.perf_counter() - start
    for prompt, answer in zip(args.prompt, answers, strict=True):
        print(f"--- {prompt}\n{''.join(stream_text([tokenizer.decode(answer, continues=True)], args.stop))}")
    total = sum(map(len, answers))
    note(f"[{total} tokens for {len(prompts)} prompts, {total / seconds:.1f} tokens/s in all]")


def chat(args: argparse.Namespace, model: Decoder, tokenizer: Tokenizer) -> None:
    if args.template:
        templates.choose(tokenizer, args.template)
    conversation, session = Conversation(tokenizer), Session(model, args.context)
    stop = [*args.stop, *tokenizer.stop_texts]
    if args.system:
        conversation.add("system", args.system)
    note("An empty line ends the conversation.")
    while text := read_line():
        conversation.add("user", text)
        ids = conversation.prompt_ids()
        if len(conversation.messages) <= 2:
            warn(tokenizer, ids)
        tokens = session.generate(ids, args.max_new_tokens, stop_ids=tokenizer.stop_ids, **sampling(args))
        answer = say(tokenizer, tokens, stop, continues=False)
        conversation.add("assistant", "".join(stream_text([tokenizer.decode(answer)], stop)).strip())


def read_line() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def run() -> None:
    args = parse()
    path = local_path(args.model)
    tokenizer = checkpoints.tokenizer(path)
    model = checkpoints.load(path, dtype=DTYPES[args.dtype], device=args.device, ignore=args.ignore)
    if args.quantize:
        quantize(model, QUANTIZE[args.quantize])
    (chat if args.chat else complete)(args, model, tokenizer)


if __name__ == "__main__":
    main(run)
