"""Train a decoder on text.

    python train.py                                     a small Llama on the source of Python's standard library, 2 to 3 minutes
    python train.py --preset mixtral                    another family: llama, qwen3, mistral, mixtral, mamba
    python train.py --data notes/ --steps 2000          your text: a file, a .jsonl with a "text" a line, or a folder of them
    python generate.py --model runs/demo --prompt "def "

The run folder ends up as a Hugging Face model folder, which transformers loads too, with log.jsonl and loss.png beside it.
Held-out loss is in nats per token, which depends on the tokenizer, and in bits per byte, which does not.
"""

import argparse
import contextlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

# Both are read when torch comes, and ignored where they mean nothing. A thread that waits sleeps: that costs a quarter of the
# speed on an idle CPU, and saves two thirds of the time on one that others use too. Memory comes in large pages, not 4 KiB.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import checkpoints
from nanollm import data
from nanollm.cli import Parser, main
from nanollm.config import MoE
from nanollm.data import Batch, Corpus
from nanollm.errors import NanollmError
from nanollm.generation import generate
from nanollm.linear import Linear
from nanollm.model import Decoder
from nanollm.moe import load_balance_loss, routing
from nanollm.plot import loss_curve
from nanollm.presets import PRESETS, preset


class TrainError(NanollmError):
    """A run that cannot begin, or cannot go on."""


# ---- options

def whole(text: str) -> int:
    value = int(text.replace("_", ""))
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number above 0")
    return value


def rate(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: expected a finite number, 0 or more")
    return value


def parse(args: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("what is trained").add_argument
    add("--preset", default="llama", metavar="NAME", help=f"shape of the model (default llama, which is llama-toy): {', '.join(PRESETS)}")
    add("--data", type=Path, metavar="FILE_OR_FOLDER", help="text or .jsonl to train on (default: the source of Python's standard library)")
    add("--vocab", type=whole, metavar="N", help="tokens of the BPE that is trained on that text (default: the preset's)")
    add("--out", type=Path, metavar="FOLDER", help="run folder (default runs/demo, with --preset runs/NAME)")
    add("--force", action="store_true", help="replace another run in that folder")
    add = parser.add_argument_group("how").add_argument
    add("--steps", type=whole, default=550, metavar="N", help="optimizer steps (default 550)")
    add("--batch-size", type=whole, default=16, metavar="B", help="rows a step (default 16)")
    add("--context", type=whole, default=128, metavar="T", help="tokens a row (default 128)")
    add("--lr", type=rate, default=0.007, metavar="RATE", help="highest learning rate, after the warm-up and before the way down to 0 (default 0.007)")
    add("--warmup", type=whole, default=20, metavar="N", help="steps in which the rate rises to --lr (default 20)")
    add("--optimizer", choices=("muon", "adamw"), default="muon", help="muon (default): Muon for matrices inside the layers, AdamW for the rest")
    add("--weight-decay", type=rate, default=0.0, metavar="RATE", help="on matrices (default 0)")
    add("--clip", type=rate, default=1.0, metavar="NORM", help="longest gradient, 0 for no limit (default 1.0)")
    add("--balance", type=rate, default=0.01, metavar="WEIGHT", help="weight of the loss that spreads tokens over experts (default 0.01)")
    add("--seed", type=int, default=0, metavar="N", help="of the weights and the order of the text (default 0)")
    add = parser.add_argument_group("where, and what it shows").add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1 …")
    add("--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="of the matrix products; weights stay float32. auto: bfloat16 where the machine is fast at it")
    add("--eval-every", type=whole, default=100, metavar="N", help="steps between looks at the held-out loss (default 100)")
    add("--sample-every", type=whole, default=200, metavar="N", help="steps between samples (default 200)")
    add("--prompt", default=None, metavar="TEXT", help='what samples continue (default "def " on the standard library, else the beginning of a document)')
    options = parser.parse_args(args)
    name = "demo" if options.preset == parser.get_default("preset") else options.preset
    options.out = options.out or Path("runs") / name
    options.prompt = options.prompt if options.prompt is not None else "" if options.data else "def "
    return options


# ---- the parts of a step

def loss_of(model: Decoder, batch: Batch, autocast: contextlib.AbstractContextManager) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats per token, float32, and the load-balance loss of the routers (0 without experts)."""
    with autocast, routing(model) as routed:
        logits = model(batch.tokens, batch.positions)                           # (B, T, V)
    loss = F.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten())
    top_k = next((layer.ffn.top_k for layer in model.config.layers if isinstance(layer.ffn, MoE)), 0)
    return loss, load_balance_loss(routed, top_k) if routed else loss.new_zeros(())


def build_optimizers(model: Decoder, options: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) turns the momentum of a matrix into the nearest orthogonal one, so all its directions
    learn alike. Its step is scaled to the length of AdamW's (Liu et al. 2025, arXiv 2502.16982 §2.2), so one --lr does for
    both; embedding, head, gains and stacked experts take 1.5 times that, which was measured to be better."""
    matrices = [module.weight for module in model.layers.modules() if isinstance(module, Linear)]
    inside = set(matrices)
    rest = [p for p in model.parameters() if p not in inside]
    if options.optimizer == "muon":
        first = torch.optim.Muon(matrices, lr=options.lr, weight_decay=options.weight_decay, adjust_lr_fn="match_rms_adamw")
    else:
        first = torch.optim.AdamW(matrices, lr=options.lr, betas=(0.9, 0.95), weight_decay=options.weight_decay, fused=True)
    return [first, torch.optim.AdamW([{"params": rest, "times": 1.5}], lr=options.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)]


def rate_at(step: int, options: argparse.Namespace) -> float:
    """Up in a line over the warm-up, down in a line to 0 at the last step."""
    return options.lr * min((step + 1) / options.warmup, 1 - step / options.steps)


@torch.no_grad()
def held_out_loss(model: Decoder, corpus: Corpus, options: argparse.Namespace, most: int | None = None) -> float:
    """Nats per token over `most` windows of the held-out text, or over all."""
    total, count, device = 0.0, 0, torch.device(options.device)
    for batch in data.held_out_batches(corpus, 2 * options.batch_size, options.context, most):
        tokens = int((batch.targets >= 0).sum())
        total += loss_of(model, batch.to(device), autocast(options))[0].item() * tokens
        count += tokens
    return total / count


def sample(model: Decoder, corpus: Corpus, prompt: str, seed: int, length: int = 100) -> str:
    """What the model makes of the prompt, at temperature 0.8, on from the beginning of a document."""
    ids = [corpus.end, *corpus.tokenizer.encode(prompt).ids]
    new = [*generate(model, ids, length, temperature=0.8, top_p=0.95, seed=seed, stop_ids=[corpus.end])]
    return corpus.tokenizer.decode(ids[1:] + [token for token in new if token != corpus.end])


# ---- the machine and the folder

def autocast(options: argparse.Namespace) -> contextlib.AbstractContextManager:
    return torch.autocast(torch.device(options.device).type, torch.bfloat16, enabled=options.dtype == "bfloat16")


def check_device(name: str) -> None:
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:         # torch without CUDA asserts
        raise TrainError(f"--device {name}: {str(error).splitlines()[0]}") from None


def fast_dtype(device: str) -> str:
    """bfloat16 is slower than float32 on a CPU without instructions for it."""
    if device.startswith("cuda"):
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    able = torch.cpu.get_capabilities() if device == "cpu" else {}
    return "bfloat16" if able.get("avx512_bf16") or able.get("amx_bf16") else "float32"


def claim(folder: Path, record: dict, force: bool) -> None:
    """Raise TrainError unless the folder is new, empty, or holds a run with the same options, or any run and --force."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    try:
        before = json.loads((folder / "run.json").read_text())
        changed = [f"{name} {before.get(name)} → {value}" for name, value in record.items() if before.get(name) != value]
    except (OSError, ValueError, AttributeError):
        raise TrainError(f"{folder}: not empty, and not made by train.py; name another folder with --out") from None
    if changed and not force:
        raise TrainError(f"{folder}: holds a run with other options ({', '.join(changed)}); --force replaces it, --out names another folder")


def clear(folder: Path) -> None:
    """Away with what an earlier run left, its prepared text excepted: a run that is cut short leaves no model but its own."""
    for pattern in ("config.json", "generation_config.json", "tokenizer*.json", "model*.safetensors*", "log.jsonl", "loss.png"):
        for path in folder.glob(pattern):
            path.unlink()


def save(model: Decoder, corpus: Corpus, folder: Path) -> None:
    """The Hugging Face files, written aside and moved in when they are complete."""
    with tempfile.TemporaryDirectory(dir=folder) as draft:
        checkpoints.save(model, Path(draft) / "model")
        data.save_tokenizer(corpus.tokenizer, Path(draft) / "model")
        for path in (Path(draft) / "model").iterdir():
            os.replace(path, folder / path.name)


# ---- the run

def train(model: Decoder, corpus: Corpus, options: argparse.Namespace, log: Callable[..., None]) -> tuple[list[float], list[tuple[int, float]]]:
    """The loop. Returns the training loss of each step, and (step, held-out loss) where it was looked at, the end included."""
    optimizers, device = build_optimizers(model, options), torch.device(options.device)
    losses, held_out, began = [], [], time.perf_counter()
    bar = tqdm(range(options.steps), desc="training", unit="step", dynamic_ncols=True)
    for step in bar:
        batch = data.training_batch(corpus, step, options.batch_size, options.context, options.seed).to(device)
        loss, balance = loss_of(model, batch, autocast(options))
        (loss + options.balance * balance).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), options.clip or math.inf)
        losses.append(loss.item())
        if not math.isfinite(losses[-1] + norm.item()):
            raise TrainError(f"step {step + 1}: loss {losses[-1]}, gradient norm {norm.item()}; a smaller --lr helps most often")
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate_at(step, options) * group.get("times", 1.0)
            optimizer.step()
            optimizer.zero_grad()

        done, speed = step + 1, (step + 1) * batch.tokens.numel() / (time.perf_counter() - began)
        log(step=done, loss=losses[-1], lr=rate_at(step, options), gradient_norm=norm.item(), balance=balance.item(), tokens_per_second=round(speed))
        bar.set_postfix(loss=f"{losses[-1]:.3f}", held_out=f"{held_out[-1][1]:.3f}" if held_out else "–", tokens_per_s=f"{speed:,.0f}", refresh=False)
        if done % options.eval_every == 0 or done == options.steps:
            held_out.append((done, held_out_loss(model, corpus, options, most=None if done == options.steps else 64)))
            log(step=done, held_out_loss=held_out[-1][1], held_out_bits_per_byte=corpus.bits_per_byte(held_out[-1][1]))
        if done % options.sample_every == 0 or done == options.steps:
            text = sample(model, corpus, options.prompt, seed=options.seed + done)
            log(step=done, sample=text)
            tqdm.write(f"\n── a sample at step {done}\n{text}\n")
    return losses, held_out


def report(corpus: Corpus, train_loss: float, loss: float) -> str:
    """What was reached, beside what knows less."""
    facts = corpus.facts
    rows = [
        ("this model", f"{loss:.3f}", corpus.bits_per_byte(loss)),
        ("gzip -9, on the held-out text by itself", "", facts.gzip_bits_per_byte),
        ("unigram model: how frequent each token is", f"{facts.unigram_loss:.3f}", corpus.bits_per_byte(facts.unigram_loss)),
    ]
    head = f"held out: {facts.held_out_documents} documents, {facts.held_out_bytes / 1e6:.2f} MB"
    lines = [f"{head:<46}{'nats/token':>12}{'bits/byte':>12}"]
    lines += [f"  {name:<44}{nats or '–':>12}{bits:>12.3f}" for name, nats, bits in rows]
    return "\n".join([*lines, f"  {'(training text, last 50 steps)':<44}{train_loss:>12.3f}"])


def run() -> None:
    options, began = parse(), time.perf_counter()
    config, folder = preset(options.preset), options.out
    check_device(options.device)
    options.dtype = fast_dtype(options.device) if options.dtype == "auto" else options.dtype
    record = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items() if name not in ("out", "force")}
    claim(folder, record, options.force)
    documents = data.read(options.data)
    corpus = data.prepare(documents, options.vocab or config.vocab, options.context, folder / "data")
    clear(folder)
    (folder / "run.json").write_text(json.dumps(record, indent=2) + "\n")

    model = Decoder(preset(options.preset, corpus.tokenizer.get_vocab_size(), options.context), options.seed).to(options.device)
    facts, parameters, seen = corpus.facts, sum(p.numel() for p in model.parameters()), options.steps * options.batch_size * options.context
    print(f"{facts.train_documents} documents, {facts.train_bytes / 1e6:.1f} MB, {len(corpus.train) / 1e6:.2f} M tokens; {facts.held_out_documents} more documents held out")
    print(f"{options.preset}: {parameters / 1e6:.2f} M parameters, {seen / 1e6:.2f} M tokens to see, products in {options.dtype} on {options.device}")

    with (folder / "log.jsonl").open("w", buffering=1) as file:
        losses, held_out = train(model, corpus, options, lambda **values: print(json.dumps(values), file=file))
    save(model, corpus, folder)
    gzip_loss = facts.gzip_bits_per_byte / corpus.bits_per_byte(1.0)            # in nats per token, for the picture
    pictured = loss_curve(folder / "loss.png", losses, held_out, {"unigram": facts.unigram_loss, "gzip": gzip_loss}, f"{options.preset} on {options.data or 'the standard library'}")
    print(report(corpus, sum(losses[-50:]) / len(losses[-50:]), held_out[-1][1]))
    print(f"{folder}: model, tokenizer, log.jsonl" + (", loss.png" if pictured else " (loss.png needs: pip install matplotlib)") + f"; {time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main(run)
