"""The options of generate.py, and which of them go together."""

import argparse
from pathlib import Path

import torch

from nanollm.cli import LARGE, SEEDS, Once, Parser
from nanollm.inference.quantize import KINDS
from nanollm.text import templates

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BOUNDS = {"max_new_tokens": (1, LARGE), "context": (2, LARGE), "batch_size": (1, 1 << 16), "temperature": (0, 100),
          "top_k": (1, LARGE), "top_p": (0, 1), "min_p": (0, 1), "seed": (0, SEEDS[1]), "n": (1, 1 << 16),
          "logprobs": (0, 1 << 16), "repetition_penalty": (0.01, 100), "presence_penalty": (-2, 2),
          "frequency_penalty": (-2, 2), "no_repeat_ngram": (0, LARGE), "min_new_tokens": (0, LARGE),
          "port": (0, 65535), "slots": (1, 1024)}
COLDEST = 1e-6          # a temperature below, which divides the logits, would make them infinite
DRAWS = ("top_k", "top_p", "min_p", "seed")             # concern the draw, which there is none of at temperature 0
FIELDS = ("temperature", *DRAWS, "repetition_penalty", "presence_penalty", "frequency_penalty", "no_repeat_ngram",
          "min_new_tokens")                             # of Sampling, by the names of their options


def parse(description: str) -> argparse.Namespace:
    """Ends with an error where an option is wrong. description: what --help begins with."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="MODEL",
                        help="model folder, FILE.gguf, or owner/name on the Hugging Face hub")
    parser.add_argument("--adapter", type=Path, metavar="FOLDER",
                        help="adapter of MODEL in peft's layout; it is merged into the weights, or stands beside them "
                        "where they are quantised")
    ways = parser.add_argument_group("what is asked: one of these").add_mutually_exclusive_group(required=True)
    ways.add_argument("--prompt", action="append", metavar="TEXT",
                      help="text to continue; several times for a batch; - reads standard input")
    ways.add_argument("--ask", action=Once, metavar="TEXT",
                      help="question, asked through the chat template; - reads standard input")
    ways.add_argument("--chat", action="store_true", help="conversation in turns; Ctrl-D ends it")
    ways.add_argument("--prompts", action=Once, type=Path, metavar="FILE.jsonl",
                      help='file with {"prompt": TEXT} or {"messages": […]} in each line, or - for standard input; '
                      "goes with --out")
    ways.add_argument("--serve", action="store_true", help="OpenAI's API for many at once, and a page to chat with")
    parser.add_argument("--out", action=Once, type=Path, metavar="FILE.jsonl",
                        help="file for the same lines with answer and finish_reason; lines that it has are passed over")
    parser.add_argument("--batch-size", type=int, metavar="N",
                        help="lines of --prompts at once, each with all its answers (default 8)")
    parser.add_argument("--n", type=int, default=1, metavar="N",
                        help="answers to each prompt, each drawn for itself (default 1); in JSON an object each, with "
                        "its index; goes with a --temperature, without which they are all alike")
    parser.add_argument("--json", action="store_true", help="one JSON object a result, for --prompt and --ask")
    parser.add_argument("--logprobs", type=int, nargs="?", const=0, metavar="K",
                        help="log-probability of each token, the model's own, before penalties and temperature, and of "
                        "the K likeliest in its place (K omitted: none); goes with --json and --prompts")
    parser.add_argument("--system", action=Once, metavar="TEXT", help="system message, with --ask and --chat")
    parser.add_argument("--template", metavar="NAME_OR_FILE",
                        help="chat template in place of the model's: a file (Jinja), a name of the model's own, or "
                        f"one of {', '.join(templates.TEMPLATES)}; "
                        f"with --suffix: one of {', '.join(templates.INFILL)}")
    parser.add_argument("--suffix", metavar="TEXT",
                        help="text after the middle, to fill in the middle; with one --prompt and --template")
    parser.add_argument("--bos", action=argparse.BooleanOptionalAction,
                        help="beginning-of-sequence token before each --prompt, or none; without the option as the "
                        "tokenizer's files say")
    parser.add_argument("--special", action="store_true",
                        help="read special tokens in a prompt, such as <|im_end|>; without it they are plain text")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="most tokens of an answer (default 256)")
    parser.add_argument("--context", type=int, metavar="N",
                        help="most tokens that a --chat reads, or one conversation of --serve, the answer included "
                        "(default: the model's own context, as far as a cache of 1 GiB holds it, and with --serve all "
                        "of them half of the free memory)")
    choice = parser.add_argument_group("how the next token is chosen; --ask and --chat begin with the values of "
                                       "generation_config.json")
    choice.add_argument("--temperature", type=float, metavar="T",
                        help="divisor of the logits: 0 takes the likeliest token (default); 1 draws as the model says")
    choice.add_argument("--top-k", type=int, metavar="K", help="number of likeliest tokens to draw among")
    choice.add_argument("--top-p", type=float, metavar="P",
                        help="probability that the fewest tokens to draw among must reach together")
    choice.add_argument("--min-p", type=float, metavar="P",
                        help="probability of a token to draw among, at least, as a share of the likeliest one's")
    choice.add_argument("--repetition-penalty", type=float, metavar="X",
                        help="divisor of the logits of all tokens that stand in prompt or answer: 1.1 makes repetition "
                        "less likely, 1 changes nothing")
    choice.add_argument("--presence-penalty", type=float, metavar="X",
                        help="amount off the logits of tokens that stand in the answer, once: 0.5; below 0 encourages")
    choice.add_argument("--frequency-penalty", type=float, metavar="X",
                        help="amount off the logits of tokens that stand in the answer, for each time: 0.5")
    choice.add_argument("--no-repeat-ngram", type=int, metavar="N",
                        help="length of a run of tokens that may not come twice in prompt and answer: 3; 0 is none")
    choice.add_argument("--min-new-tokens", type=int, metavar="N",
                        help="fewest tokens before a stop token may come; a --stop text still ends the answer")
    choice.add_argument("--logit-bias", action="append", default=[], type=bias, metavar="ID=BIAS",
                        help="amount added to the logit of a token, -100 to 100: 13=-100 all but bans token 13; may be "
                        "given several times")
    choice.add_argument("--ban", action="append", default=[], metavar="TEXT",
                        help="text that may not be written, as its tokens right after other text and after a space; "
                        "other tokens may still spell it, so --ban each spelling: Yes, yes; may be given several times")
    choice.add_argument("--seed", type=int, metavar="N", help="seed of the draw, which makes it repeatable")
    choice.add_argument("--stop", action="append", default=[], metavar="TEXT",
                        help="text at which the answer ends; may be given several times")
    forms = parser.add_argument_group("what an answer may be; needs llguidance: pip install -e \".[constrain]\"")
    form = forms.add_mutually_exclusive_group()
    form.add_argument("--json-schema", type=Path, metavar="FILE",
                      help="JSON schema that each answer follows, as far as --max-new-tokens lets it come to its end")
    form.add_argument("--grammar", type=Path, metavar="FILE", help="grammar that each answer follows (Lark)")
    form.add_argument("--regex", metavar="PATTERN", help="regular expression that each whole answer matches")
    server = parser.add_argument_group("with --serve; needs starlette and uvicorn: pip install -e \".[serve]\"")
    server.add_argument("--port", type=int, metavar="N", help="port to listen at (default 8000)")
    server.add_argument("--host", metavar="NAME",
                        help="address to listen at (default 127.0.0.1: this machine alone); 0.0.0.0 is every network")
    server.add_argument("--api-key", metavar="KEY", help="what a client must show: Authorization: Bearer KEY")
    server.add_argument("--slots", type=int, metavar="N", help="answers at once (default 8); others wait")
    ahead = parser.add_argument_group("guesses of the next tokens, of which the model checks several in one pass: the "
                                      "same answer, sooner").add_mutually_exclusive_group()
    ahead.add_argument("--draft", metavar="MODEL",
                       help="small model with the same vocabulary that guesses, with --ask and one --prompt")
    ahead.add_argument("--lookup", action="store_true",
                       help="guess what followed the last tokens where they stood before: for answers that repeat "
                       "their prompt")
    machine = parser.add_argument_group("where it runs")
    machine.add_argument("--dtype", choices=DTYPES, default="auto",
                         help="dtype of the weights; auto: as config.json says")
    machine.add_argument("--quantize", choices=KINDS,
                         help="bits of a weight in the layers' matrices: half or a quarter of the memory, and faster")
    machine.add_argument("--compile", action="store_true",
                         help="compiled decoding on a CPU, twice as fast and more, for one answer at a time, and with "
                         "--serve for up to four (beyond four it is slower); takes a C++ compiler, and a minute or two "
                         "at the first start")
    machine.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                         help="device: cpu, cuda, cuda:1 …")
    machine.add_argument("--ignore", action="append", default=[], metavar="NAME",
                         help="config key or tensor, of those that loading complains of, to pass over; may be repeated")
    args = parser.parse_args()
    check(parser, args)
    args.max_new_tokens = args.max_new_tokens or 256
    return args


def check(parser: Parser, args: argparse.Namespace) -> None:
    """End with an error where a value is out of bounds, or an option goes with another way of asking."""
    for name, (low, high) in BOUNDS.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            parser.error(f"--{name.replace('_', '-')} {value}: expected {low} to {high}")
    if args.temperature is not None and 0 < args.temperature < COLDEST:
        parser.error(f"--temperature {args.temperature}: expected {COLDEST} to 100, or 0, the likeliest token")
    for name in ("stop", "ban"):
        if "" in getattr(args, name):
            parser.error(f"--{name} '': every text has that in it; expected text")
    wrong = {
        "--ask '': expected a question": args.ask is not None and not args.ask.strip(),
        "--prompts FILE.jsonl and --out FILE.jsonl go together": (args.prompts is None) != (args.out is None),
        "--out is the file of --prompts; expected another": args.out is not None and args.out == args.prompts,
        "--prompt - twice: standard input can be read once": (args.prompt or []).count("-") > 1,
        "--system goes with --ask and --chat; a prompt is continued as it stands, a file has its own messages":
            args.system is not None and bool(args.prompt or args.prompts),
        "--json goes with --prompt and --ask; --prompts writes JSON anyway":
            args.json and bool(args.chat or args.prompts or args.serve),
        "--compile is for a CPU; on a GPU kernels run by themselves": args.compile and args.device != "cpu",
        "--compile goes with one answer at a time and --serve, not with batches (--prompts, --n, several --prompt)":
            args.compile and (bool(args.prompts) or args.n > 1 or len(args.prompt or []) > 1),
        "--draft and --lookup go with one answer to --ask or to one --prompt, without --compile":
            (args.draft is not None or args.lookup)
            and (args.compile or bool(args.prompts or args.serve or args.chat) or args.n > 1
                 or len(args.prompt or []) > 1),
        "--port, --host, --api-key and --slots go with --serve":
            not args.serve and any(x is not None for x in (args.port, args.host, args.api_key, args.slots)),
        "--api-key '': expected a key": args.api_key == "",
        "--max-new-tokens, --n and --system do not go with --serve; each request says its own":
            args.serve and (args.max_new_tokens is not None or args.n > 1 or args.system is not None),
        "--json-schema, --grammar and --regex do not go with --serve; a request has its response_format":
            args.serve and any(x is not None for x in (args.json_schema, args.grammar, args.regex)),
        "--n goes with --prompt, --ask and --prompts; in a --chat /retry answers again": args.n > 1 and args.chat,
        "--logprobs goes with --json and --prompts": args.logprobs is not None and not (args.json or args.prompts),
        "--suffix goes with one --prompt, and with a --template that says how to infill":
            args.suffix is not None and (len(args.prompt or []) != 1 or not args.template),
        "--template goes with --ask, --chat, --prompts, --serve or --suffix; a --prompt is continued as it stands":
            args.template is not None and bool(args.prompt) and args.suffix is None,
        "--bos and --no-bos go with --prompt; a template says itself how a text begins":
            args.bos is not None and (not args.prompt or args.suffix is not None),
        "--special goes with --prompt and --prompts; a message of a chat is always plain text":
            args.special and (bool(args.ask is not None or args.chat or args.serve) or args.suffix is not None),
    }
    for message, is_wrong in wrong.items():
        if is_wrong:
            parser.error(message)


def bias(text: str) -> tuple[int, float]:
    """The token and the amount of a --logit-bias."""
    try:
        token, amount = text.split("=")
        found = int(token), float(amount)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: expected ID=BIAS, like 13=-100") from None
    if not -100 <= found[1] <= 100:
        raise argparse.ArgumentTypeError(f"{text}: expected a bias of -100 to 100")
    return found
