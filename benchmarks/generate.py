"""How fast a prompt is read and tokens are written, beside transformers, on the same random weights, in one run.

    python benchmarks/generate.py                    both shapes, float32 and bfloat16; a table and one JSON line
    python benchmarks/generate.py --write            … and keep the table as benchmarks/generate.md
    python benchmarks/generate.py --real FILE.gguf   a real model: ours in 16, 8 and 4 bits, transformers, llama.cpp

Decoding one sequence reads every weight once a token, so memory bandwidth is the floor. "of bandwidth" is the bytes of
weights and cached keys and values read a second over what this machine reads from a large array, measured in between.
The two run in turn, round by round; the ratio is the median of the rounds' ratios, so a drifting machine cancels out.

Our model is prepared, as generate.py does it (nanollm/inference/prepare.py), and a second one is compiled, as with
generate.py --compile (nanollm/inference/compiled.py). llama.cpp runs where llama-cpp-python is
installed: the file itself, and what `checkpoints.convert --to gguf` makes of it in BF16 and Q8_0.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

import checkpoints
from checkpoints import convert
from checkpoints.source import open_source
from nanollm.inference.compiled import compile_decoding
from nanollm.inference.generation import Session
from nanollm.inference.prepare import prepare
from nanollm.inference.quantize import quantize

COMMON = dict(rms_norm_eps=1e-5, tie_word_embeddings=True, max_position_embeddings=4096)
SHAPES = {
    "SmolLM-135M": ("llama", dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                                  num_attention_heads=9, num_key_value_heads=3)),
    "Qwen2.5-0.5B": ("qwen2", dict(vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
                                   num_attention_heads=14, num_key_value_heads=2)),
}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class Clock(transformers.StoppingCriteria):
    """transformers calls this once a token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, ids, scores, **kwargs):
        self.times.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool)


def theirs(model, prompt: torch.Tensor, new: int) -> tuple[float, float]:
    """Seconds until the first token, seconds a token after it."""
    clock, start = Clock(), time.perf_counter()
    model.generate(prompt, max_new_tokens=new, do_sample=False, eos_token_id=None, stopping_criteria=[clock])
    return clock.times[0] - start, (clock.times[-1] - clock.times[0]) / (new - 1)


def ours(model, prompt: torch.Tensor, new: int) -> tuple[float, float]:
    """The same for us."""
    start = time.perf_counter()
    times = [time.perf_counter() for _ in Session(model, prompt.shape[1] + new).generate(prompt[0].tolist(), new)]
    return times[0] - start, (times[-1] - times[0]) / (new - 1)


def bandwidth(gigabytes: float = 0.5) -> float:
    """Bytes a second that all threads together read from an array far larger than the caches; the best of five."""
    array = torch.ones(int(gigabytes * 2**30) // 4)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        array.sum()
        seconds.append(time.perf_counter() - start)
    return array.nbytes / min(seconds)


def bench(name: str, dtype: torch.dtype, prompt_tokens: int, new: int, rounds: int) -> dict:
    """One row of the table."""
    kind, keys = SHAPES[name]
    no_ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config = transformers.AutoConfig.for_model(kind, **COMMON, **keys, **no_ids)
    with tempfile.TemporaryDirectory() as folder:
        transformers.set_seed(0)
        reference = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
        reference.save_pretrained(folder)
        reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        model, fast = checkpoints.load(folder), compile_decoding(checkpoints.load(folder))
    held = sum(p.nbytes for p in model.parameters())                                    # tied: one matrix
    prepare(model)
    prompt = torch.randint(0, keys["vocab_size"], (1, prompt_tokens))
    widths = sum(2 * layer.mixer.kv_heads * layer.mixer.head_dim for layer in model.config.layers)
    cached = widths * (prompt_tokens + new / 2)
    read = held + cached * dtype.itemsize
    pairs, bandwidths = [], [bandwidth()]
    ours(model, prompt, 8), ours(fast, prompt, 8), theirs(reference, prompt, 8)         # warm up
    for _ in tqdm(range(rounds), desc=f"{name} {str(dtype)[6:]}", leave=False):
        pairs.append((ours(model, prompt, new), theirs(reference, prompt, new), ours(fast, prompt, new)))
        bandwidths.append(bandwidth())
    median, read_speed = statistics.median, statistics.median(bandwidths)
    prefill, prefill_theirs, prefill_fast = (prompt_tokens / median(pair[who][0] for pair in pairs) for who in range(3))
    step, step_theirs, step_fast = (median(pair[who][1] for pair in pairs) for who in (0, 1, 2))
    return {
        "model": name, "dtype": str(dtype)[6:],
        "prefill": prefill, "prefill transformers": prefill_theirs,
        "prefill compiled": prefill_fast, "prefill ratio": median(b[0] / a[0] for a, b, _ in pairs),
        "prefill compiled ratio": median(b[0] / c[0] for _, b, c in pairs),
        "decode": 1 / step, "decode transformers": 1 / step_theirs,
        "decode ratio": median(b[1] / a[1] for a, b, _ in pairs),
        "compiled": 1 / step_fast, "compiled ratio": median(b[1] / c[1] for _, b, c in pairs),
        "GB/s": read / step_fast / 1e9, "of bandwidth": read / step_fast / read_speed,
        "of bandwidth transformers": read / step_theirs / read_speed, "bandwidth GB/s": read_speed / 1e9,
    }


def table(rows: list[dict]) -> str:
    """Markdown, prefill and decode in tokens a second."""
    lines = ["| model | dtype | prefill | compiled | transformers | ratio | ratio, compiled | decode | compiled "
             "| transformers | ratio | ratio, compiled | GB/s | of bandwidth | transformers |",
             f"|---|---|{'--:|' * 13}"]
    for r in rows:
        lines.append(f"| {r['model']} | {r['dtype']} | {r['prefill']:.0f} | {r['prefill compiled']:.0f} "
                     f"| {r['prefill transformers']:.0f} | **{r['prefill ratio']:.2f}** "
                     f"| **{r['prefill compiled ratio']:.2f}** | {r['decode']:.1f} | {r['compiled']:.1f} "
                     f"| {r['decode transformers']:.1f} | **{r['decode ratio']:.2f}** "
                     f"| **{r['compiled ratio']:.2f}** | {r['GB/s']:.1f} "
                     f"| {r['of bandwidth']:.0%} | {r['of bandwidth transformers']:.0%} |")
    return "\n".join(lines)


# ---- a real model

def llama_cpp(path: Path, prompt: list[int], new: int) -> Callable[[], tuple[float, float]] | None:
    """Seconds until the first token, and a token after it, in llama.cpp; None where it is not installed."""
    try:
        from llama_cpp import Llama
    except ImportError:
        return None
    threads = torch.get_num_threads()
    model = Llama(str(path), n_ctx=len(prompt) + new, n_threads=threads, n_threads_batch=threads, verbose=False)

    def run() -> tuple[float, float]:
        model.reset()
        start = time.perf_counter()
        tokens = model.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0)
        times = [time.perf_counter() for _, _ in zip(range(new), tokens, strict=False)]
        return times[0] - start, (times[-1] - times[0]) / (new - 1)

    return run


def real(path: Path, prompt_tokens: int, new: int, rounds: int) -> str:
    """Ours in 16, 8 and 4 bits, transformers, and llama.cpp's BF16, Q8_0 and the file itself, in turn: a table."""
    ids = torch.randint(0, 40_000, (1, prompt_tokens), generator=torch.Generator().manual_seed(0))
    runs: dict[str, Callable[[], tuple[float, float]] | None] = {}
    for bits in (16, 8, 4):
        for how in ("", ", compiled"):
            model = checkpoints.load(path, dtype=torch.bfloat16)
            if bits < 16:
                quantize(model, bits)
            head_bits = None if bits == 16 else 8
            compile_decoding(model, head_bits) if how else prepare(model, head_bits)
            runs[f"nanollm, {bits} bits{how}"] = lambda model=model: ours(model, ids, new)
    with tempfile.TemporaryDirectory() as folder:
        checkpoints.save(checkpoints.load(path, dtype=torch.bfloat16), f"{folder}/hf")
        reference = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/hf", dtype=torch.bfloat16).eval()
        runs["transformers, bfloat16"] = lambda: theirs(reference, ids, new)
        for name, kind in (("BF16", None), ("Q8_0", "Q8_0")):
            convert.convert(convert.plan(open_source(path), "gguf", torch.bfloat16 if kind is None else None, kind),
                            Path(folder) / name)
            runs[f"llama.cpp, {name}"] = llama_cpp(Path(folder) / name / "model.gguf", ids[0].tolist(), new)
        runs[f"llama.cpp, {path.name}"] = llama_cpp(path, ids[0].tolist(), new)
        there = {name: run for name, run in runs.items() if run is not None}
        for run in there.values():
            run()
        seconds = {name: [] for name in there}
        for _ in tqdm(range(rounds), desc=path.stem, leave=False):
            for name, run in there.items():
                seconds[name].append(run())
    first = seconds["nanollm, 16 bits"]
    lines = ["| | prefill, tokens/s | decode, tokens/s | decode, of ours in 16 bits |", "|---|--:|--:|--:|"]
    for name, found in seconds.items():
        prefill, step = (statistics.median(column) for column in zip(*found, strict=True))
        ratio = statistics.median(a[1] / b[1] for a, b in zip(first, found, strict=True))
        lines.append(f"| {name} | {prompt_tokens / prefill:.0f} | {1 / step:.1f} | {ratio:.2f} |")
    return "\n".join(lines)


def machine() -> str:
    """One line that says where the figures come from."""
    cpuinfo, name = Path("/proc/cpuinfo"), platform.processor()
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return (f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
            f"transformers {transformers.__version__}, {date.today()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--model", choices=SHAPES, action="append", help="default: both")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="default: both")
    parser.add_argument("--real", type=Path, metavar="FILE.gguf", help="measure this model, and nothing else")
    parser.add_argument("--write", action="store_true", help="keep the table as benchmarks/generate.md")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.real:
        table_of_real = real(args.real, args.prompt_tokens, args.new_tokens, args.rounds)
        text = (f"{args.real.name}: prompt of {args.prompt_tokens} tokens, then {args.new_tokens} new ones; medians of "
                f"{args.rounds} rounds in turn. {machine()}.\n\n{table_of_real}\n")
        print(text)
        if args.write:
            asked = f"--prompt-tokens {args.prompt_tokens} --new-tokens {args.new_tokens} --rounds {args.rounds}"
            head = ("# A real model beside transformers and llama.cpp\n\n"
                    f"Written by `python benchmarks/generate.py --real FILE.gguf {asked} --write`.\n\n")
            Path(__file__).with_name("generate_real.md").write_text(head + text)
        return
    rows = [bench(name, DTYPES[dtype], args.prompt_tokens, args.new_tokens, args.rounds)
            for name in args.model or SHAPES for dtype in args.dtype or DTYPES]
    reads = statistics.median(r["bandwidth GB/s"] for r in rows)
    text = (f"Prompt of {args.prompt_tokens} tokens, then {args.new_tokens} new ones, batch 1, random weights; "
            f"tokens per second.\nMedians of {args.rounds} rounds in turn. {machine()}.\n"
            f"Reads of a large array reach {reads:.1f} GB/s.\n\n{table(rows)}\n")
    print(text)
    if args.write:
        head = "# Generation beside transformers\n\nWritten by `python benchmarks/generate.py --write`.\n\n"
        Path(__file__).with_suffix(".md").write_text(head + text)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
