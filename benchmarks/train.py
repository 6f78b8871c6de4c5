"""How fast the trainer trains, beside a plain loop around transformers' model: the same shape, data, dtype, optimizer.

    python benchmarks/train.py                          the CPU's shapes, float32 and bfloat16: a table, a JSON line
    python benchmarks/train.py --nanogpt CHECKOUT       … and nanoGPT's own model and loop, from a clone of it
    python benchmarks/train.py --device cuda            the 1B shape on a GPU, compiled
    python benchmarks/train.py --write                  … and keep the table as benchmarks/train.md

Ours is `train.take_step`, all of it: sharding over one rank, guards, clipping, AdamW. Theirs is what most people write:
the model's own loss under autocast, clip_grad_norm_, fused AdamW. Each runs in a process of its own, for the sake of
its peak memory; they take turns, round by round, and the ratio is the median of the rounds' ratios, so a drifting
machine cancels out. "of peak" is model FLOPs (flops_per_token) a second over those of a large matrix product in the
same dtype, measured between the rounds (on a GPU: over the vendor's dense peak, which is the MFU that others publish).
"""

import argparse
import contextlib
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from datetime import date
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch

import train  # first: it sets what torch reads when it comes
from nanollm.config import MLP, Attention, Layer, ModelConfig, Norm
from nanollm.data.stream import Batch
from nanollm.init import initial_values
from nanollm.model import Decoder
from nanollm.presets import preset, transformer
from nanollm.training import distributed, optim
from nanollm.training.flops import flops_per_token, peak_flops
from nanollm.training.losses import Balance, next_token
from nanollm.training.method import Method
from nanollm.training.tuning import Source


def gpt(vocab: int, dim: int, layers: int, heads: int) -> ModelConfig:
    """nanoGPT's shape: learned positions, LayerNorm, GELU, a tied head."""
    norm = Norm("layer", bias=False)
    attention = Attention(heads, heads, dim // heads, rope=None)
    layer = Layer(attention, MLP(4 * dim, "gelu", gated=False), pre_mixer=norm, pre_ffn=norm)
    return ModelConfig(vocab, dim, (layer,) * layers, norm, tied=True, context=1024, positions=1024)


SHAPES = {              # name: config, rows, tokens a row, peer
    "llama, 27M": (transformer(8192, 384, 8, 6, 2, 1536, tied=True, context=512), 8, 512, "transformers"),
    "SmolLM-135M": (transformer(49152, 576, 30, 9, 3, 1536, tied=True, context=2048), 2, 512, "transformers"),
    "nanoGPT, 10.7M": (gpt(65, 384, 6, 6), 16, 256, "nanogpt"),
    "nanoGPT, 124M": (gpt(50304, 768, 12, 12), 2, 512, "nanogpt"),
    "llama-1b": (preset("llama-1b"), 4, 4096, "transformers"),
}


# ---- the contenders: each is a function that takes one step and returns the loss

def initialize(model: Decoder) -> None:
    distributed.fill(model, initial_values(model, 0))


def ours(config: ModelConfig, dtype: str, device: str, compile: bool, world: distributed.World, draw=initialize):
    """draw gives a model its first weights."""
    with torch.device("meta"):
        model = Decoder(config)
    distributed.shard(model, world.mesh, distributed.DTYPES[dtype], compile=compile)
    model.to_empty(device=world.device)
    draw(model)
    options = argparse.Namespace(dtype=dtype, lr=1e-4, steps=10**6, warmup=1, schedule="linear", decay=0.2,
                                 skip_steps=[], skip_sigma=0.0, z_loss=0.0, balance=0.0, clip=1.0, min_lr=0.0,
                                 seed=0)
    optimizer = optim.build(model, "adamw", 0.1, distributed.DTYPES[dtype])
    source = Source("", None, model, None, torch.float32)
    run = train.Run(options, world, None, model, source, optimizer, Balance(model), Method(next_token))

    def step(tokens: torch.Tensor) -> float:
        entry, _ = train.take_step(run, [Batch(tokens[:, :-1], tokens[:, 1:], None)], lambda: 0)
        run.step += 1
        return entry["loss"]
    return step


def loop(model: torch.nn.Module, loss_of, dtype: str, device: str):
    """The usual loop."""
    model = model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(tokens: torch.Tensor) -> float:
        tokens = tokens.to(device)
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = loss_of(model, tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()
    return step


def theirs(config: ModelConfig, dtype: str, device: str, compile: bool):
    import transformers

    from checkpoints.families import write_config
    values = {key: value for key, value in write_config(config)[1].items() if value is not None}
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**values))
    if compile:
        model.compile()

    def loss(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        targets = tokens[:, 1:].contiguous()
        return model(tokens[:, :-1], labels=targets, shift_labels=targets, use_cache=False).loss

    return loop(model, loss, dtype, device)


def nanogpt(config: ModelConfig, dtype: str, device: str, compile: bool, checkout: str):
    sys.path.insert(0, checkout)
    from model import GPT, GPTConfig
    attention = config.layers[0].mixer
    model = GPT(GPTConfig(block_size=config.context, vocab_size=config.vocab, n_layer=len(config.layers),
                          n_head=attention.heads, n_embd=config.dim, dropout=0.0, bias=False))
    if compile:
        model.compile()
    return loop(model, lambda model, tokens: model(tokens[:, :-1], tokens[:, 1:].contiguous())[1], dtype, device)


def contender(who: str, name: str, dtype: str, device: str, compile: bool, checkout: str | None) -> None:
    """A process: for each number that comes in, so many steps, and one line with what they took."""
    config, rows, length, _ = SHAPES[name]
    with distributed.world(device) as world:
        with contextlib.redirect_stdout(sys.stderr):            # a line on standard output is an answer to the parent
            make = {"ours": partial(ours, world=world), "transformers": theirs,
                    "nanogpt": partial(nanogpt, checkout=checkout)}[who]
            step = make(config, dtype, device, compile)
        serve(step, rows, length, config.vocab, device)


def serve(step, rows: int, length: int, vocab: int, device: str) -> None:
    tokens = torch.randint(0, vocab, (rows, length + 1), generator=torch.Generator().manual_seed(0))
    for line in sys.stdin:
        start = time.perf_counter()
        losses = [step(tokens) for _ in range(int(line))]
        seconds = (time.perf_counter() - start) / int(line)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if device == "cuda":
            memory = torch.cuda.max_memory_allocated()
        print(json.dumps({"seconds": seconds, "memory": memory, "losses": losses}), flush=True)


# ---- the race

def peak(dtype: str, device: str) -> float:
    """FLOP/s: of a product of two large matrices on a CPU, the best of five; the vendor's figure for a GPU."""
    if device == "cuda":
        return peak_flops(torch.device("cuda"), dtype)
    a, b, seconds = *(torch.randn(4096, 4096, dtype=distributed.DTYPES[dtype]) for _ in range(2)), []
    for _ in range(5):
        start = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - start)
    return 2 * 4096**3 / min(seconds)


def bench(name: str, dtype: str, options: argparse.Namespace) -> dict:
    """One row of the table."""
    config, rows, length, peer = SHAPES[name]
    shared = ["--name", name, "--dtype", dtype, "--device", options.device, *["--compile"] * options.compile]
    shared += ["--nanogpt", options.nanogpt] if options.nanogpt else []
    racers = {who: subprocess.Popen([sys.executable, __file__, "--contender", who, *shared], stdin=subprocess.PIPE,
                                    stdout=subprocess.PIPE, text=True)
              for who in ("ours", peer)}

    def go(who: str, steps: int) -> dict:
        racers[who].stdin.write(f"{steps}\n")
        racers[who].stdin.flush()
        return json.loads(racers[who].stdout.readline())

    first = {who: go(who, 3) for who in racers}                                 # warm, and compiled
    apart = abs(first["ours"]["losses"][0] - first[peer]["losses"][0])
    assert apart < 0.5, first                                                   # two models of this shape begin alike
    peaks, found = [], {who: [] for who in racers}
    for turn in range(options.rounds):
        for who in list(racers)[:: 1 if turn % 2 else -1]:
            found[who].append(go(who, options.steps))
        peaks.append(peak(dtype, options.device))
    for racer in racers.values():
        racer.stdin.close()
        racer.wait()
    speed = {who: rows * length / statistics.median(one["seconds"] for one in found[who]) for who in racers}
    pairs = zip(found["ours"], found[peer], strict=True)
    ratio = statistics.median(b["seconds"] / a["seconds"] for a, b in pairs)
    flops = flops_per_token(config, length) / statistics.median(peaks)
    return {"model": name, "dtype": dtype, "rows": rows, "tokens": length, "tokens_per_second": round(speed["ours"]),
            "peer": peer, "theirs": round(speed[peer]), "ratio": round(ratio, 2),
            "of_peak": round(speed["ours"] * flops, 3), "theirs_of_peak": round(speed[peer] * flops, 3),
            "gb": round(found["ours"][-1]["memory"] / 1e9, 2),
            "theirs_gb": round(found[peer][-1]["memory"] / 1e9, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--nanogpt", metavar="CHECKOUT", help="a clone of nanoGPT, to run beside ours")
    parser.add_argument("--compile", action="store_true", help="both compiled")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="steps a round")
    parser.add_argument("--write", action="store_true", help="keep the table as benchmarks/train.md")
    for hidden in ("--contender", "--name", "--dtype"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        return contender(options.contender, options.name, options.dtype, options.device, options.compile,
                         options.nanogpt)
    names = [name for name, (config, _, _, peer) in SHAPES.items()
             if (config.vocab > 100_000) == (options.device == "cuda") and (peer != "nanogpt" or options.nanogpt)]
    head = ["| model | rows × tokens | dtype | tokens/s | of peak | GB | peer | tokens/s | of peak | GB | ratio |",
            "|---|---|---|--:|--:|--:|---|--:|--:|--:|--:|"]
    print("\n".join(head), flush=True)
    table, lines = [], []
    dtypes = ("bfloat16",) if options.device == "cuda" else ("float32", "bfloat16")
    for name, dtype in ((name, dtype) for name in names for dtype in dtypes):
        table.append(r := bench(name, dtype, options))
        lines.append(f"| {r['model']} | {r['rows']} × {r['tokens']} | {r['dtype']} | {r['tokens_per_second']:,} "
                     f"| {r['of_peak']:.0%} | {r['gb']} | {r['peer']} | {r['theirs']:,} | {r['theirs_of_peak']:.0%} "
                     f"| {r['theirs_gb']} | **{r['ratio']:.2f}** |")
        print(lines[-1], flush=True)
    machine = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    if options.device == "cuda":
        machine = torch.cuda.get_device_name()
    command = f"python benchmarks/train.py{' --compile' * options.compile}"
    text = "\n".join(head + lines) + (
        f"\n\n`{command}`: {machine}, torch {torch.__version__}, {date.today()}, "
        f"median of {options.rounds} rounds of {options.steps} steps each.\n")
    print(json.dumps(table))
    if options.write:
        Path(__file__).with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
