"""Prompt in, text out, streamed.

    python generate.py --model FOLDER --prompt "def fibonacci(n):"          one prompt
    python generate.py --model FOLDER --prompt "One" --prompt "Two"         several at once, as one batch
    python generate.py --model FOLDER --chat                                a conversation, with the model's own template
    python generate.py --model FOLDER --chat --template vicuna              … with a published one, where the folder has none
    python generate.py --model FOLDER --prompt "def f(" --suffix "return x" --template codellama      what stands between

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
from checkpoints.layouts.hub import local_folder, local_path
from nanollm.cli import Parser, main
from nanollm.inference.generation import Session, generate_batch, stream_text
from nanollm.inference.quantize import quantize
from nanollm.model import Decoder
from nanollm.text import templates
from nanollm.text import tokenizer as tokenizers
from nanollm.text.chat import Conversation
from nanollm.text.tokenizer import Tokenizer

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUANTIZE = {"int8": 8, "int4": 4}


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="FOLDER_OR_HUB_ID", help="a model folder, or owner/name on the Hugging Face hub")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="text to continue; give it several times for a batch; - reads standard input")
    parser.add_argument("--chat", action="store_true", help="talk in turns; an empty line or Ctrl-D ends")
    parser.add_argument("--template", metavar="NAME_OR_FILE", help="with --chat: a chat template in place of the folder's, a file (Jinja) or one of "
                        f"{', '.join(templates.TEMPLATES)}; with --suffix: one of {', '.join(templates.INFILL)}")
    parser.add_argument("--suffix", metavar="TEXT", help="with one --prompt and --template: fill in what stands between the two texts")
    parser.add_argument("--system", metavar="TEXT", help="with --chat: the system message")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="at most this many a prompt or turn (default 256)")
    parser.add_argument("--context", type=int, default=4096, metavar="N", help="with --chat: the most tokens of a whole conversation (default 4096)")
    choice = parser.add_argument_group("how the next token is chosen")
    choice.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest (default); 1 draws as the model says, below 1 is tamer")
    choice.add_argument("--top-k", type=int, metavar="K", help="draw among the K likeliest")
    choice.add_argument("--top-p", type=float, metavar="P", help="draw among the fewest that reach probability P")
    choice.add_argument("--min-p", type=float, metavar="P", help="draw among those at least P times as likely as the likeliest")
    choice.add_argument("--seed", type=int, metavar="N", help="makes a draw repeatable")
    choice.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end where this text appears; may be given several times")
    machine = parser.add_argument_group("where it runs")
    machine.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights; auto keeps what is stored")
    machine.add_argument("--quantize", choices=QUANTIZE, help="keep the layers' matrices in 8 or 4 bits a weight: half or a quarter of the memory, and faster on a GPU (slower on a CPU)")
    machine.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1 …")
    machine.add_argument("--ignore", action="append", default=[], metavar="NAME", help="pass over this one config key or tensor that loading complains of")
    args = parser.parse_args()
    for name, low, high in (("max_new_tokens", 1, 1 << 31), ("context", 2, 1 << 31), ("temperature", 0, 100), ("top_k", 1, 1 << 31), ("top_p", 0, 1), ("min_p", 0, 1)):
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            parser.error(f"--{name.replace('_', '-')} {value}: expected {low} to {high}")
    if args.chat == bool(args.prompt):
        parser.error("give either --prompt TEXT or --chat")
    if args.suffix is not None and (args.chat or len(args.prompt) > 1 or not args.template):
        parser.error("--suffix goes with one --prompt, and with a --template that says how to infill")
    if args.template and not args.chat and args.suffix is None:
        parser.error("--template goes with --chat or --suffix; a --prompt is continued as it stands")
    return args


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def warn(tokenizer: Tokenizer, ids: list[int]) -> None:
    """What looks wrong about BOS and the stop tokens."""
    for warning in [*tokenizer.doctor(), *tokenizer.warnings(ids)]:
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
        note(f"[{len(new)} tokens; the first after {times[1] - times[0]:.2f} s, then {(len(new) - 1) / (times[-1] - times[1]):.1f} tokens/s]")
    return new


def sampling(args: argparse.Namespace) -> dict:
    return dict(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, min_p=args.min_p, seed=args.seed)


def complete(args: argparse.Namespace, model: Decoder, tokenizer: Tokenizer) -> None:
    texts = [sys.stdin.read() if prompt == "-" else prompt for prompt in args.prompt]
    prompts = [tokenizer.encode(text) for text in texts] if args.suffix is None else [templates.infill(tokenizer, args.template, texts[0], args.suffix)]
    warn(tokenizer, prompts[0])
    if len(prompts) == 1:
        print(args.prompt[0] if args.prompt[0] != "-" else "", end="")
        session = Session(model, len(prompts[0]) + args.max_new_tokens)
        stop = [*args.stop, *tokenizer.stop_texts]
        say(tokenizer, session.generate(prompts[0], args.max_new_tokens, stop_ids=tokenizer.stop_ids, **sampling(args)), stop, continues=True)
        return
    start = time.perf_counter()
    answers = generate_batch(model, prompts, args.max_new_tokens, stop_ids=tokenizer.stop_ids, **sampling(args))
    seconds = time.perf_counter() - start
    for prompt, answer in zip(args.prompt, answers):
        print(f"--- {prompt}\n{''.join(stream_text([tokenizer.decode(answer)], args.stop))}")
    note(f"[{sum(map(len, answers))} tokens for {len(prompts)} prompts, {sum(map(len, answers)) / seconds:.1f} tokens/s in all]")


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
        answer = say(tokenizer, session.generate(ids, args.max_new_tokens, stop_ids=tokenizer.stop_ids, **sampling(args)), stop, continues=False)
        conversation.add("assistant", "".join(stream_text([tokenizer.decode(answer)], stop)).strip())


def read_line() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def run() -> None:
    args = parse()
    path = local_path(args.model)
    tokenizer = tokenizers.load(local_folder(path))
    model = checkpoints.load(path, dtype=DTYPES[args.dtype], device=args.device, ignore=args.ignore)
    if args.quantize:
        quantize(model, QUANTIZE[args.quantize])
    (chat if args.chat else complete)(args, model, tokenizer)


if __name__ == "__main__":
    main(run)
