"""Text out of a model: a prompt that goes on, a question, a conversation, a file of prompts.

    python generate.py --model MODEL --prompt "def fibonacci(n):"          one prompt, continued
    python generate.py --model MODEL --prompt "One" --prompt "Two"         several at once, as one batch
    python generate.py --model MODEL --ask "What is a monad?"              one question: the answer alone
    cat notes.txt | python generate.py --model MODEL --ask -               the same, from standard input
    python generate.py --model MODEL --chat                                a conversation; /help lists its commands
    python generate.py --model MODEL --chat --template vicuna              with a published template
    python generate.py --model MODEL --prompts IN.jsonl --out OUT.jsonl    a file of prompts or chats, in batches
    python generate.py --model MODEL --ask "Who?" --json-schema FILE       an answer in JSON that follows a schema
    python generate.py --model MODEL --prompt "One" --n 4 --temperature 1  several answers, each drawn for itself
    python generate.py --model MODEL --adapter FOLDER --chat               with an adapter (LoRA, as peft writes it)
    python generate.py --model MODEL --prompt "def f(" --suffix "return x" --template codellama    fill in the middle

MODEL is what Hugging Face calls a model folder: config.json, model.safetensors (or shards with an index) and tokenizer
files. train.py writes one. So is a FILE.gguf, and a name like Qwen/Qwen2.5-0.5B-Instruct, which is downloaded from the
hub. Text goes to standard output, everything else to standard error. What each way prints: docs/generate.md.
"""

import argparse
import json
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from nanollm.cli import LARGE, SEEDS, Once, Parser, main, quiet_ctrl_c

if __name__ == "__main__":
    quiet_ctrl_c()              # before torch

import torch

import checkpoints
from checkpoints import layouts
from checkpoints.layouts.hub import local_path
from checkpoints.source import config_of
from nanollm.config import ModelConfig
from nanollm.errors import InputError, TokenizerError
from nanollm.inference import batches, settings
from nanollm.inference.answer import Answer
from nanollm.inference.chat import Chat
from nanollm.inference.compiled import compile_decoding, has_compiler
from nanollm.inference.constrained import Grammar
from nanollm.inference.context import default_context, past_context, session_length
from nanollm.inference.generation import Session, answer_batch
from nanollm.inference.machine import device, fitted, need_memory
from nanollm.inference.prepare import prepare
from nanollm.inference.quantize import KINDS
from nanollm.inference.request import Request
from nanollm.inference.sample import Sampling
from nanollm.inference.terminal import note, show, silent, standard_input
from nanollm.inference.written import Written, warn
from nanollm.model import Decoder
from nanollm.text import templates
from nanollm.text.chat import Conversation
from nanollm.text.tokenizer import Tokenizer
from nanollm.training import lora

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BOUNDS = {"max_new_tokens": (1, LARGE), "context": (2, LARGE), "batch_size": (1, 1 << 16), "temperature": (0, 100),
          "top_k": (1, LARGE), "top_p": (0, 1), "min_p": (0, 1), "seed": (0, SEEDS[1]), "n": (1, 1 << 16),
          "logprobs": (0, 1 << 16), "repetition_penalty": (0.01, 100), "presence_penalty": (-2, 2),
          "frequency_penalty": (-2, 2), "no_repeat_ngram": (0, LARGE), "min_new_tokens": (0, LARGE)}
COLDEST = 1e-6          # a temperature below, which divides the logits, would make them infinite
DRAWS = ("top_k", "top_p", "min_p", "seed")             # concern the draw, which there is none of at temperature 0
FIELDS = ("temperature", *DRAWS, "repetition_penalty", "presence_penalty", "frequency_penalty", "no_repeat_ngram",
          "min_new_tokens")                             # of Sampling, by the names of their options


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N",
                        help="most tokens of an answer (default 256)")
    parser.add_argument("--context", type=int, metavar="N",
                        help="most tokens that a --chat reads, the answer included (default: the model's own context, "
                        "as far as a cache of 1 GiB holds it)")
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
    machine = parser.add_argument_group("where it runs")
    machine.add_argument("--dtype", choices=DTYPES, default="auto",
                         help="dtype of the weights; auto: as config.json says")
    machine.add_argument("--quantize", choices=KINDS,
                         help="bits of a weight in the layers' matrices: half or a quarter of the memory, and faster")
    machine.add_argument("--compile", action="store_true",
                         help="compiled decoding on a CPU, twice as fast and more, for one answer at a time; takes a "
                         "C++ compiler, and up to a minute at the first start")
    machine.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                         help="device: cpu, cuda, cuda:1 …")
    machine.add_argument("--ignore", action="append", default=[], metavar="NAME",
                         help="config key or tensor, of those that loading complains of, to pass over; may be repeated")
    args = parser.parse_args()
    check(parser, args)
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
            args.json and bool(args.chat or args.prompts),
        "--compile is for a CPU; on a GPU kernels run by themselves": args.compile and args.device != "cpu",
        "--compile goes with one answer at a time, not with batches (--prompts, --n, more than one --prompt)":
            args.compile and (bool(args.prompts) or args.n > 1 or len(args.prompt or []) > 1),
        "--n goes with --prompt, --ask and --prompts; in a --chat /retry answers again": args.n > 1 and args.chat,
        "--logprobs goes with --json and --prompts": args.logprobs is not None and not (args.json or args.prompts),
        "--suffix goes with one --prompt, and with a --template that says how to infill":
            args.suffix is not None and (len(args.prompt or []) != 1 or not args.template),
        "--template goes with --ask, --chat, --prompts or --suffix; a --prompt is continued as it stands":
            args.template is not None and bool(args.prompt) and args.suffix is None,
        "--bos and --no-bos go with --prompt; a template says itself how a text begins":
            args.bos is not None and (not args.prompt or args.suffix is not None),
        "--special goes with --prompt and --prompts; a message of a chat is always plain text":
            args.special and (bool(args.ask is not None or args.chat) or args.suffix is not None),
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


def sampling(args: argparse.Namespace, path: Path, tokenizer: Tokenizer) -> Sampling:
    """How tokens are drawn: as the options say; where they do not, --ask and --chat as generation_config.json does."""
    given: dict[str, Any] = {name: value for name in FIELDS if (value := getattr(args, name)) is not None}
    given |= {"logit_bias": dict(args.logit_bias), "banned": []}
    for text in args.ban:
        given["banned"] += settings.spellings(tokenizer, text)
    drawn = Sampling(**settings.choose(given, path if args.chat or args.ask is not None else None))
    for token in drawn.tokens():
        try:
            tokenizer.decode([token])
        except TokenizerError as error:
            who = "--logit-bias" if token in given["logit_bias"] else f"a ban of {settings.NAME}"
            raise InputError(f"{who}: {error}") from None
    idle = [f"--{name.replace('_', '-')}" for name in DRAWS if name in given]
    if idle and drawn.temperature == 0:
        note(f"warning: at temperature 0 {', '.join(idle)} changes nothing; give --temperature, too")
    if args.n > 1 and drawn.temperature == 0:
        note(f"warning: at temperature 0 the {args.n} answers to a prompt are all alike; give --temperature, too")
    if args.context is not None and not args.chat:
        note("warning: --context changes nothing without --chat; --max-new-tokens bounds an answer")
    if args.batch_size is not None and not args.prompts:
        note("warning: --batch-size changes nothing without --prompts; several --prompt are one batch")
    return drawn


def asked(args: argparse.Namespace, tokenizer: Tokenizer) -> tuple[list[dict[str, Any]], list[list[int]]]:
    """What was asked, as --json repeats it, and the ids that the model reads, of each --prompt or of --ask."""
    texts = [standard_input() if text == "-" else text for text in args.prompt or [args.ask]]
    if args.ask is not None:
        if not texts[0].strip():
            raise InputError("--ask -: standard input is empty, expected a question")
        conversation = opened(args, tokenizer)
        conversation.add("user", texts[0].strip())
        return [{"messages": conversation.messages}], [conversation.prompt_ids()]
    facts: list[dict[str, Any]] = [{"prompt": text} for text in texts]
    if args.suffix is not None:
        return [facts[0] | {"suffix": args.suffix}], [templates.infill(tokenizer, args.template, texts[0], args.suffix)]
    return facts, [tokenizer.encode(text, bos=args.bos, special=args.special) for text in texts]


def grammar(args: argparse.Namespace, tokenizer: Tokenizer) -> Grammar | None:
    """What --json-schema, --grammar or --regex holds the answers to."""
    if args.regex is not None:
        return Grammar(tokenizer, "regex", args.regex, f"--regex {args.regex}")
    if args.json_schema:
        return Grammar.read(tokenizer, "json_schema", args.json_schema)
    return Grammar.read(tokenizer, "lark", args.grammar) if args.grammar else None


def one(args: argparse.Namespace, model: Decoder, request: Request, fact: dict[str, Any], ids: list[int]) -> None:
    """One answer, to --ask or to one --prompt: its text streams. What Ctrl-C leaves of it is told, too."""
    if args.prompt and args.prompt[0] != "-" and not args.json:
        show(args.prompt[0])
    continues = args.ask is None
    session = Session(model, session_length(model.config, len(ids), request.max_new_tokens))
    tokens, written, stopped = session.generate(ids, request.max_new_tokens, **request.how(continues)), Written(), False
    try:
        written.write(tokens, request.tokenizer, request.stop_texts, continues=request.keeps_space(continues),
                      show=silent if args.json else show)
    except KeyboardInterrupt:
        stopped = True
    show(as_json(fact, ids, written.answer, request.told(written.answer, written.text, 0)) if args.json else "\n")
    expected = continues and written.answer.ended == "length"       # a continuation ends there
    if stopped:
        note(f"[stopped; {written.speed}]")
        raise KeyboardInterrupt
    note(f"[{written.speed}{'' if expected else written.cut(request.max_new_tokens)}]")
    note_past(model, len(ids) + len(written.answer.tokens))


def several(args: argparse.Namespace, model: Decoder, request: Request, facts: list[dict[str, Any]],
            prompts: list[list[int]]) -> None:
    """More than one --prompt, or more than one answer to each, or to --ask: as one batch."""
    continues, n = args.ask is None, request.n
    start = time.perf_counter()
    try:
        answers = answer_batch(model, prompts, request.max_new_tokens, samples=n, **request.how(continues))
    except KeyboardInterrupt:
        note("\n[stopped; a batch is printed when all of it is done]")
        raise
    seconds, count = time.perf_counter() - start, sum(len(answer.tokens) for answer in answers)
    for at, answer in enumerate(answers):
        text, (prompt, index) = request.text(answer, continues), divmod(at, n)
        if args.json:
            show(as_json(facts[prompt], prompts[prompt], answer, request.told(answer, text, index)))
        else:
            number = f" ({index + 1} of {n})" if n > 1 else ""
            show(f"--- {args.prompt[prompt] if continues else 'answer'}{number}\n{text}\n")
    cut = sum(answer.ended == "length" for answer in answers) if args.ask is not None else 0
    what = f"{len(answers)} answers" if n > 1 else f"{len(prompts)} prompts"
    note(f"[{count} tokens for {what}, {count / seconds:.1f} tokens/s in all"
         f"{f'; {cut} cut at --max-new-tokens {request.max_new_tokens}' if cut else ''}]")
    note_past(model, max(len(prompts[at // n]) + len(answer.tokens) for at, answer in enumerate(answers)))


def as_json(fact: dict[str, Any], ids: list[int], answer: Answer, told: dict[str, Any]) -> str:
    """A line for --json, in ASCII, which every terminal and every program reads."""
    return json.dumps(fact | told | {"prompt_tokens": len(ids), "tokens": len(answer.tokens)}) + "\n"


def note_past(model: Decoder, tokens: int) -> None:
    if told := past_context(model.config, tokens):
        note(f"[{told}]")


def opened(args: argparse.Namespace, tokenizer: Tokenizer) -> Conversation:
    """A conversation with no question yet. Raises TokenizerError where its template is broken."""
    conversation = Conversation(tokenizer)
    conversation.set_system(args.system or "")
    conversation.try_out()
    return conversation


def config_alone(args: argparse.Namespace, path: Path) -> ModelConfig:
    """The model's config, without a warning: all of them come when the model is loaded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return config_of(layouts.describe(path), tuple(args.ignore))[1]


def run() -> None:
    args = parse()
    if args.compile and not has_compiler():
        note("warning: --compile: no C++ compiler (apt install g++, or CXX=…); decoding without it")
        args.compile = False
    place, path = device(args.device), local_path(args.model)
    tokenizer = checkpoints.tokenizer(path)
    request = Request(tokenizer, args.max_new_tokens, sampling(args, path, tokenizer), args.stop, args.n, args.logprobs)
    if args.template and args.suffix is None:
        templates.choose(tokenizer, args.template)
    jobs, done, conversation, facts, prompts = [], 0, None, [], []             # what is wrong is said before it loads
    if args.prompts:
        jobs = batches.read_jobs(args.prompts, request, args.special)
        done = batches.finished(args.out, jobs, request)
        if done == args.n * len(jobs):
            return note(f"[{args.out} has all {done} answers]")
        batches.need_place(args.out)
    elif args.chat:
        conversation = opened(args, tokenizer)
        if args.context:
            need_memory(config_alone(args, path), args.context, DTYPES[args.dtype] or torch.bfloat16, place)
    else:
        facts, prompts = asked(args, tokenizer)
    request = replace(request, constrain=grammar(args, tokenizer))     # now, for --suffix has added a stop token
    if sys.stderr is not None and sys.stderr.isatty():
        note(f"[loading {args.model}]")
    model = checkpoints.load(path, dtype=DTYPES[args.dtype], device=place, ignore=args.ignore, quantize=args.quantize,
                             adapter=args.adapter)
    if args.adapter and not any(hasattr(module, "dense") for module in model.modules()):
        lora.merge(model)                       # one product in the place of three
    elif args.adapter and args.compile:
        raise InputError(f"{args.adapter}: --compile is for an adapter that is merged, and beside quantised weights it "
                         "is not: python -m checkpoints.convert MODEL OUT --adapter FOLDER --merge")
    head_bits = 8 if args.quantize else None
    if args.compile:
        note("[compiling; the first time on a machine this takes up to a minute]")
        compile_decoding(model, head_bits)
    else:
        prepare(model, head_bits)
    if args.prompts:
        size = min(args.batch_size or 8, len(jobs))
        request = fitted(request, model, size * args.n, max(len(job.ids) for job in jobs))
        batches.answer_jobs(model, request, jobs, done, args.out, size)
    elif conversation is not None:
        dtype = model.embed.weight.dtype
        context = args.context or default_context(model.config, dtype)
        need_memory(model.config, context, dtype, place)
        Chat(model, conversation, request, context=context).run()
    else:
        warn(tokenizer, prompts[0], args.bos)
        request = fitted(request, model, len(prompts) * args.n, max(map(len, prompts)))
        if len(prompts) * args.n == 1:
            one(args, model, request, facts[0], prompts[0])
        else:
            several(args, model, request, facts, prompts)


if __name__ == "__main__":
    main(run)
