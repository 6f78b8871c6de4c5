"""How many tokens a second come of 1, 4 and 16 requests at once: the engine, transformers, llama.cpp, in one run.

    python -m benchmarks.serve FILE.gguf             a table and one JSON line
    python -m benchmarks.serve FILE.gguf --write     … and keep the table as benchmarks/serve.md
    python -m benchmarks.serve FILE.gguf --soak 60   16 clients of a server for an hour: does its memory grow?

Prompts of 16 to 112 tokens, another length each, and as many new ones for all; greedy, in bfloat16. A figure is all new
tokens over the seconds from the first prompt to the last token.

    nanollm         the engine (nanollm/inference/engine.py): ragged rows, prompts read together
    compiled        the same, with the programs of compiled.py for one row and for four
    transformers    generate with the prompts as one batch, padded on the left
    llama.cpp       a sequence a request in one context, all of their next tokens in one llama_decode, as its server's
                    slots do; the file as `checkpoints.convert --to gguf` writes it in BF16. With llama-cpp-python

They run in turn, round by round; a ratio is the median of the rounds' ratios, so a drifting machine cancels out.
"""

import argparse
import http.client
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import transformers
from tqdm import tqdm

import checkpoints
from benchmarks.generate import machine
from checkpoints import convert
from checkpoints.source import open_source
from nanollm.inference.compiled import SERVED, compile_decoding
from nanollm.inference.engine import Engine
from nanollm.inference.prepare import prepare
from nanollm.inference.request import Request
from nanollm.inference.sample import Sampling

Run = Callable[[], list[list[int]]]     # all requests → their answers
SIZES, PEERS = (1, 4, 16), ("nanollm", "compiled", "transformers", "llama.cpp")


def ours(model: checkpoints.Decoder, prompts: list[list[int]], new: int, compiled: Sequence[int] = ()) -> Run:
    """The engine."""
    def run() -> list[list[int]]:
        engine = Engine(model, slots=len(prompts), length=max(map(len, prompts)) + new, compiled=compiled)
        tickets = [engine.submit(prompt, new) for prompt in prompts]
        while engine.step():
            pass
        return [ticket.answer.tokens for ticket in tickets]

    return run


def theirs(model: transformers.PreTrainedModel, prompts: list[list[int]], new: int) -> Run:
    """transformers, padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])

    def run() -> list[list[int]]:
        made = model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, eos_token_id=None,
                              pad_token_id=0)
        return made[:, longest:].tolist()

    return run


def llama_cpp(path: Path, prompts: list[list[int]], new: int) -> Run | None:
    """Sequences of one context; None where it is not installed."""
    try:
        import llama_cpp as cpp
    except ImportError:
        return None
    cpp.llama_log_set(silent := cpp.llama_log_callback(lambda *_: None), None)
    rows, total = len(prompts), sum(map(len, prompts))
    model = cpp.llama_model_load_from_file(str(path).encode(), cpp.llama_model_default_params())
    params = cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = rows * (max(map(len, prompts)) + new), total, 512
    params.n_seq_max, params.n_threads, params.n_threads_batch = rows, *[torch.get_num_threads()] * 2
    context = cpp.llama_init_from_model(model, params)
    vocab = cpp.llama_vocab_n_tokens(cpp.llama_model_get_vocab(model))
    batch = cpp.llama_batch_init(total, 0, 1)

    def decode(tokens: list[tuple[int, int, int, bool]]) -> list[int]:
        """Of (token, position, row, whether its logits are wanted): the likeliest next tokens."""
        batch.n_tokens = len(tokens)
        for at, (token, position, row, wanted) in enumerate(tokens):
            batch.token[at], batch.pos[at], batch.n_seq_id[at] = token, position, 1
            batch.seq_id[at][0], batch.logits[at] = row, wanted
        if cpp.llama_decode(context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        wanted_at = [at for at, token in enumerate(tokens) if token[3]]
        logits = (np.ctypeslib.as_array(cpp.llama_get_logits_ith(context, at), (vocab,)) for at in wanted_at)
        return [int(row.argmax()) for row in logits]

    def run() -> list[list[int]]:
        assert silent is not None                           # it must live as long as llama.cpp may call it
        cpp.llama_memory_clear(cpp.llama_get_memory(context), True)
        last = decode([(token, at, row, at == len(prompt) - 1) for row, prompt in enumerate(prompts)
                       for at, token in enumerate(prompt)])
        answers = [[token] for token in last]
        for step in range(new - 1):
            last = decode([(token, len(prompts[row]) + step, row, True) for row, token in enumerate(last)])
            for answer, token in zip(answers, last, strict=True):
                answer.append(token)
        return answers

    return run


def bench(path: Path, new: int, rounds: int) -> list[dict]:
    """A row of the table for each number of requests."""
    draw, rows = np.random.default_rng(0), []
    with tempfile.TemporaryDirectory() as folder:
        model = checkpoints.load(path, dtype=torch.bfloat16)
        checkpoints.save(model, f"{folder}/hf")
        convert.convert(convert.plan(open_source(path), "gguf", torch.bfloat16, None), Path(folder) / "gguf")
        reference = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/hf", dtype=torch.bfloat16).eval()
        prepare(model)
        faster = compile_decoding(checkpoints.load(path, dtype=torch.bfloat16), rows=SERVED)
        for size in SIZES:
            lengths = draw.permutation(np.linspace(16, 112, 16).astype(int))[:size]
            prompts = [draw.integers(0, 40_000, length).tolist() for length in lengths]
            runs = {"nanollm": ours(model, prompts, new), "compiled": ours(faster, prompts, new, SERVED),
                    "transformers": theirs(reference, prompts, new),
                    "llama.cpp": llama_cpp(Path(folder) / "gguf/model.gguf", prompts, new)}
            seconds: dict[str, list[float]] = {name: [] for name, run in runs.items() if run is not None}
            for name in seconds:                            # warm up
                runs[name]()
            for _ in tqdm(range(rounds), desc=f"{size} requests", leave=False):
                for name, found in seconds.items():
                    start = time.perf_counter()
                    assert sum(map(len, runs[name]())) == size * new
                    found.append(time.perf_counter() - start)
            row: dict = {"requests": size}
            for name, found in seconds.items():
                row[name] = size * new / statistics.median(found)
                for one in PEERS[:2]:
                    row[f"{one} to {name}"] = statistics.median(b / a for a, b in zip(seconds[one], found, strict=True))
            rows.append(row)
    return rows


def soak(path: Path, minutes: float) -> list[float]:
    """MiB of the process at 13 moments, the first when the server is warm, while 16 clients ask for chats, streamed
    or whole, with and without log-probabilities; one in five leaves before its answer."""
    import psutil

    from nanollm.inference.server import Running, Server

    tokenizer = checkpoints.tokenizer(path)
    engine = Engine(prepare(checkpoints.load(path, dtype=torch.bfloat16)), tokenizer, slots=8, length=512)
    running = Running(Server(engine, Request(tokenizer, 32, Sampling()), "soak"))
    host, me, sizes = running.address.removeprefix("http://"), psutil.Process(), []
    end = time.monotonic() + 60 * minutes

    def client(number: int) -> None:
        draw = random.Random(number)
        while time.monotonic() < end:
            content = "".join(draw.choices("abcdefgh ?", k=draw.randint(1, 99)))
            body = {"messages": [{"role": "user", "content": content}],
                    "max_tokens": draw.randint(1, 32), "stream": draw.random() < 0.5, "logprobs": draw.random() < 0.5}
            line = http.client.HTTPConnection(host, timeout=600)
            line.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
            if draw.random() < 0.8:
                line.getresponse().read()
            line.close()

    with running, ThreadPoolExecutor(16) as pool:
        clients = [pool.submit(client, number) for number in range(16)]
        for moment in range(12, -1, -1):
            time.sleep(max(0.0, end - 60 * minutes * moment / 13 - time.monotonic()))
            sizes.append(me.memory_info().rss / 2**20)
            print(f"{13 - moment}/13: {sizes[-1]:.1f} MiB, {engine.counts}", flush=True)
        for each in clients:
            each.result()
    return sizes


def table(rows: list[dict]) -> str:
    """Markdown, in tokens a second."""
    lines = ["| requests | nanollm | compiled | transformers | llama.cpp, BF16 | nanollm to transformers | "
             "nanollm to llama.cpp | compiled to llama.cpp |", "|--:|--:|--:|--:|--:|--:|--:|--:|"]
    for row in rows:
        speeds = (f"{row[name]:.1f}" if name in row else "not installed" for name in PEERS)
        pairs = (("nanollm", "transformers"), ("nanollm", "llama.cpp"), ("compiled", "llama.cpp"))
        ratios = (f"**{row[f'{one} to {other}']:.2f}**" if other in row else "" for one, other in pairs)
        lines.append(f"| {row['requests']} | {' | '.join([*speeds, *ratios])} |")
    return "\n".join(lines)


def main() -> None:
    """The command at the head of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="FILE.gguf or a model folder")
    parser.add_argument("--new", type=int, default=32, help="new tokens of each answer (default 32)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds (default 3)")
    parser.add_argument("--write", action="store_true", help="keep the table as benchmarks/serve.md")
    parser.add_argument("--soak", type=float, metavar="MINUTES",
                        help="no table: serve 16 clients for so long and tell the memory of the process")
    args = parser.parse_args()
    if args.soak is not None:
        sizes = soak(args.path, args.soak)
        return print(f"{args.soak:g} minutes: {sizes[0]:.1f} MiB at the first moment, {sizes[-1]:.1f} at the end")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows = bench(args.path, args.new, args.rounds)
    text = (f"{args.path.name}: prompts of 16 to 112 tokens, then {args.new} new ones, bfloat16; new tokens a second "
            f"of all requests together. Medians of {args.rounds} rounds in turn. {machine()}.\n\n{table(rows)}\n")
    print(text)
    if args.write:
        asked = f"--new {args.new} --rounds {args.rounds}"
        head = ("# Many requests at once beside transformers and llama.cpp\n\n"
                f"Written by `python -m benchmarks.serve FILE.gguf {asked} --write`.\n\n")
        Path(__file__).with_suffix(".md").write_text(head + text)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
