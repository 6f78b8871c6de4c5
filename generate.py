"""Text out of a model: a prompt that goes on, a question, a conversation, a file of prompts.

    python generate.py --model MODEL --prompt "def fibonacci(n):"          one prompt, continued
    python generate.py --model MODEL --prompt "One" --prompt "Two"         several at once, as one batch
    python generate.py --model MODEL --ask "What is a monad?"              one question: the answer alone
    cat notes.txt | python generate.py --model MODEL --ask -               the same, from standard input
    python generate.py --model MODEL --chat                                a conversation; /help lists its commands
    python generate.py --model MODEL --chat --template vicuna              with a published template
    python generate.py --model MODEL --prompts IN.jsonl --out OUT.jsonl    a file of prompts or chats, in batches
    python generate.py --model MODEL --ask "Who?" --json-schema FILE       an answer in JSON that follows a schema
    python generate.py --model MODEL --ask "What?" --draft SMALL           sooner: a small model guesses, MODEL checks
    python generate.py --model MODEL --prompt "One" --n 4 --temperature 1  several answers, each drawn for itself
    python generate.py --model MODEL --adapter FOLDER --chat               with an adapter (LoRA, as peft writes it)
    python generate.py --model MODEL --serve                               OpenAI's API, and a page to chat with
    torchrun --nproc-per-node 2 generate.py --model MODEL --ask "Who?"     a model divided among two processes or GPUs
    python generate.py --model MODEL --prompt "def f(" --suffix "return x" --template codellama    fill in the middle

MODEL is what Hugging Face calls a model folder: config.json, model.safetensors (or shards with an index) and tokenizer
files. train.py writes one. So is a FILE.gguf, and a name like Qwen/Qwen2.5-0.5B-Instruct, which is downloaded from the
hub. Text goes to standard output, everything else to standard error. What each way prints: docs/generate.md.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import os
import socket
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanollm.cli import main, quiet_ctrl_c

if __name__ == "__main__":
    quiet_ctrl_c()              # before torch

import torch

import checkpoints
from checkpoints import layouts, parts
from checkpoints.layouts.hub import local_path
from checkpoints.source import config_of
from nanollm.config import ModelConfig
from nanollm.errors import InputError, TokenizerError
from nanollm.inference import batches, settings
from nanollm.inference.answer import Answer
from nanollm.inference.chat import Chat
from nanollm.inference.compiled import SERVED, compile_decoding, has_compiler
from nanollm.inference.constrained import Grammar
from nanollm.inference.context import default_context, past_context, session_length
from nanollm.inference.engine import Engine
from nanollm.inference.generation import Session, answer_batch
from nanollm.inference.machine import device, fitted, need_memory
from nanollm.inference.options import DRAWS, DTYPES, FIELDS, parse
from nanollm.inference.prepare import prepare
from nanollm.inference.request import Request
from nanollm.inference.sample import Sampling
from nanollm.inference.speculative import DraftModel, Guess, look_up, speculate
from nanollm.inference.terminal import note, show, silent, standard_input
from nanollm.inference.written import Written, warn
from nanollm.model import Decoder
from nanollm.text import templates
from nanollm.text.chat import Conversation
from nanollm.text.tokenizer import Tokenizer
from nanollm.training import lora, reward

if TYPE_CHECKING:
    from nanollm.training.distributed import World


def sampling(args: argparse.Namespace, path: Path, tokenizer: Tokenizer) -> Sampling:
    """How tokens are drawn: as the options say; else, but for a --prompt, as generation_config.json does."""
    given: dict[str, Any] = {name: value for name in FIELDS if (value := getattr(args, name)) is not None}
    given |= {"logit_bias": dict(args.logit_bias), "banned": []}
    for text in args.ban:
        given["banned"] += settings.spellings(tokenizer, text)
    drawn = Sampling(**settings.choose(given, path if args.chat or args.serve or args.ask is not None else None))
    for token in drawn.tokens():
        try:
            tokenizer.decode([token])
        except TokenizerError as error:
            who = "--logit-bias" if token in given["logit_bias"] else f"a ban of {settings.NAME}"
            raise InputError(f"{who}: {error}") from None
    idle = [f"--{name.replace('_', '-')}" for name in DRAWS if name in given]
    if idle and drawn.temperature == 0 and not args.serve:
        note(f"warning: at temperature 0 {', '.join(idle)} changes nothing; give --temperature, too")
    if args.n > 1 and drawn.temperature == 0:
        note(f"warning: at temperature 0 the {args.n} answers to a prompt are all alike; give --temperature, too")
    if args.context is not None and not (args.chat or args.serve):
        note("warning: --context changes nothing without --chat or --serve; --max-new-tokens bounds an answer")
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


def begun(args: argparse.Namespace, jobs: list[batches.Job], request: Request) -> int:
    """How many of the answers --out has. Raises InputError where the others could not be written there."""
    done = batches.finished(args.out, jobs, request)
    if done < args.n * len(jobs):
        batches.need_place(args.out)
    return done


def draft_path(args: argparse.Namespace, tokenizer: Tokenizer) -> Path | None:
    """Where the model of --draft is. Raises InputError where its tokens are not the model's."""
    if args.draft is None:
        return None
    path = local_path(args.draft)
    its = checkpoints.tokenizer(path)
    if its.vocab_size != tokenizer.vocab_size or any(its.backend.bytes_of(token) != tokenizer.backend.bytes_of(token)
                                                     for token in range(tokenizer.vocab_size)):
        raise InputError(f"--draft {args.draft}: it has other tokens than {args.model}; expected a model of the same "
                         "vocabulary, or --lookup")
    return path


def guesser(args: argparse.Namespace, path: Path | None, length: int) -> Guess | None:
    """What guesses tokens ahead; None: nothing does. path: of --draft. length: tokens of prompt and answer."""
    if path is None:
        return look_up if args.lookup else None
    small = checkpoints.load(path, dtype=DTYPES[args.dtype], device=device(args.device))
    return DraftModel(prepare(small), length)


def one(args: argparse.Namespace, model: Decoder, request: Request, fact: dict[str, Any], ids: list[int],
        draft: Path | None) -> None:
    """One answer, to --ask or to one --prompt: its text streams. What Ctrl-C leaves of it is told, too."""
    if args.prompt and args.prompt[0] != "-" and not args.json:
        show(args.prompt[0])
    continues = args.ask is None
    length = session_length(model.config, len(ids), request.max_new_tokens)
    guess, how = guesser(args, draft, length), request.how(continues)
    if guess is None:
        tokens = Session(model, length).generate(ids, request.max_new_tokens, **how)
    else:
        tokens = speculate(model, ids, request.max_new_tokens, guess, **how)
    written, stopped = Written(), False
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


def served(args: argparse.Namespace, model: Decoder, request: Request, bound: socket.socket) -> None:
    """OpenAI's API, until Ctrl-C."""
    from nanollm.inference.server import Server, serve

    engine = Engine(model, request.tokenizer, args.slots or 8, args.context, compiled=SERVED if args.compile else ())
    name = Path(os.path.abspath(args.model)).name if Path(args.model).exists() else args.model
    serve(Server(engine, request, name, args.api_key), args.host, bound)


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
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    with contextlib.ExitStack() as stack:
        if rank > 0:                            # all ranks say the same; the first says it
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        args = parse(__doc__)
        if ranks == 1:
            return answer(args)
        need_one_process(args, ranks)
        from nanollm.training.distributed import world  # here, for what it imports takes time

        with world(args.device) as group:
            answer(args, group)


def need_one_process(args: argparse.Namespace, ranks: int) -> None:
    """Raise InputError for what several processes do not do, or have no devices for."""
    wrong = {"--chat": args.chat, "--serve": args.serve, "--adapter": args.adapter, "--compile": args.compile,
             "--draft": args.draft, "--lookup": args.lookup}
    if found := [option for option, given in wrong.items() if given]:
        raise InputError(f"{found[0]} runs on one process, and torchrun started {ranks}; --prompt, --ask and --prompts "
                         "run on several")
    if args.device not in ("cpu", "cuda"):
        raise InputError(f"--device {args.device}: torchrun started {ranks} processes; expected cpu, or cuda, where "
                         "each takes a GPU of its own")
    here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    if args.device == "cuda" and here > torch.cuda.device_count():
        raise InputError(f"--device cuda: torchrun started {here} processes on this machine, and torch finds "
                         f"{torch.cuda.device_count()} GPUs; --device cpu runs without")


def heard_by_all(args: argparse.Namespace, world: "World") -> None:
    """Let every rank read the standard input, which is the first one's, if anything is to be read from it."""
    if "-" in (*(args.prompt or ()), args.ask, str(args.prompts)):
        text = world.broadcast(world.on_rank_0(standard_input))
        sys.stdin = io.TextIOWrapper(io.BytesIO(text.encode()))


def fitted_alike(request: Request, model: Decoder, rows: int, longest: int, world: "World | None") -> Request:
    """`fitted`; on several ranks with as many new tokens as there is memory for on each, and with one seed."""
    if world is None:
        return fitted(request, model, rows, longest)
    request = world.on_all_ranks(lambda: fitted(request, model, rows, longest))
    least = min(world.all_gather_objects(request.max_new_tokens))
    seed = request.sampling.seed if request.sampling.seed is not None else world.broadcast(torch.seed() >> 1)
    return replace(request, max_new_tokens=least, sampling=replace(request.sampling, seed=seed))


def answer(args: argparse.Namespace, world: "World | None" = None) -> None:
    """All that was asked, on one process or on each of several."""
    if args.compile and not has_compiler():
        note("warning: --compile: no C++ compiler (apt install g++, or CXX=…); decoding without it")
        args.compile = False
    if world is not None:
        heard_by_all(args, world)
        world.on_rank_0(lambda: local_path(args.model))         # the others find what it has downloaded
    place, path = world.device if world else device(args.device), local_path(args.model)
    tokenizer = checkpoints.tokenizer(path)
    draft = draft_path(args, tokenizer)
    for folder in (path, args.adapter):
        if folder and (folder / reward.FILE).exists():
            note(f"warning: {folder}: has a {reward.FILE}, so it was trained to score answers, not to write them")
    request = Request(tokenizer, args.max_new_tokens, sampling(args, path, tokenizer), args.stop, args.n, args.logprobs)
    if args.template and args.suffix is None:
        templates.choose(tokenizer, args.template)
    jobs, done, conversation, facts, prompts = [], 0, None, [], []             # what is wrong is said before it loads
    if args.prompts:
        jobs = batches.read_jobs(args.prompts, request, args.special)
        if world is None:
            done = begun(args, jobs, request)
        else:
            done = world.broadcast(world.on_rank_0(lambda: begun(args, jobs, request)))
            args.out = args.out if world.rank == 0 else Path(os.devnull)
        if done == args.n * len(jobs):
            return note(f"[{args.out} has all {done} answers]")
    elif args.serve:
        if importlib.util.find_spec("starlette") is None or importlib.util.find_spec("uvicorn") is None:
            raise InputError('--serve needs starlette and uvicorn: pip install -e ".[serve]"')
        from nanollm.inference.listening import bind

        args.host, port = args.host or "127.0.0.1", 8000 if args.port is None else args.port
        bound = bind(args.host, port)                                           # 0: any that is free
    elif args.chat:
        conversation = opened(args, tokenizer)
        if args.context:
            need_memory(config_alone(args, path), args.context, DTYPES[args.dtype] or torch.bfloat16, place)
    else:
        facts, prompts = asked(args, tokenizer)
    request = replace(request, constrain=grammar(args, tokenizer))     # now, for --suffix has added a stop token
    if sys.stderr is not None and sys.stderr.isatty():
        note(f"[loading {args.model}]")
    how: dict[str, Any] = dict(dtype=DTYPES[args.dtype], device=place, ignore=args.ignore, quantize=args.quantize)
    if world is None:
        model = checkpoints.load(path, adapter=args.adapter, **how)
    else:
        model = world.on_all_ranks(lambda: parts.load_part(path, world.rank, world.size, **how))
    if args.adapter and not any(hasattr(module, "dense") for module in model.modules()):
        lora.merge(model)                       # one product in the place of three
    elif args.adapter and args.compile:
        raise InputError(f"{args.adapter}: --compile is for an adapter that is merged, and beside quantised weights it "
                         "is not: python -m checkpoints.convert MODEL OUT --adapter FOLDER --merge")
    head_bits = 8 if args.quantize else None
    if args.compile:
        note("[compiling; the first time on a machine this takes up to a minute]")
        compile_decoding(model, head_bits, SERVED if args.serve else (1,))
    else:
        prepare(model, head_bits)
    if args.prompts:
        size = min(args.batch_size or 8, len(jobs))
        request = fitted_alike(request, model, size * args.n, max(len(job.ids) for job in jobs), world)
        batches.answer_jobs(model, request, jobs, done, args.out, size)
    elif args.serve:
        served(args, model, request, bound)
    elif conversation is not None:
        dtype = model.embed.weight.dtype
        context = args.context or default_context(model.config, dtype)
        need_memory(model.config, context, dtype, place)
        Chat(model, conversation, request, context=context).run()
    else:
        warn(tokenizer, prompts[0], args.bos)
        request = fitted_alike(request, model, len(prompts) * args.n, max(map(len, prompts)), world)
        if len(prompts) * args.n == 1:
            one(args, model, request, facts[0], prompts[0], draft)
        else:
            several(args, model, request, facts, prompts)


if __name__ == "__main__":
    main(run)
