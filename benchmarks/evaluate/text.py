"""Perplexity and bits per byte of a text, beside transformers' and llama.cpp's, and the loss by place in the window.

The equations are in nanollm/inference/perplexity.py. The token before the text is BOS, or else EOS, as with the
harness's rolling requests. `places` shows where a context ends: the same weights, the angles of RoPE as they are, and
stretched by the factor window / context (linear, dynamic NTK, YaRN; layers/scaling.py).
"""

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F
from tqdm import tqdm

from nanollm.errors import InputError
from nanollm.inference.context import own_context, past_context
from nanollm.inference.perplexity import Perplexity, perplexity, windows
from nanollm.inference.scoring import start_id
from nanollm.inference.terminal import note
from nanollm.model import Decoder
from nanollm.text.tokenizer import Tokenizer
from nanollm.training import growing, plot

BOUND = 1e-6            # of perplexities in float32: the relative difference
POINTS = 32             # of a curve


def read(path: Path) -> str:
    """Raises InputError where there is no text to read."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{path}: found bytes that are not UTF-8, expected text") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None


def measured(model: Decoder, tokenizer: Tokenizer, text: str, window: int, stride: int, budget: int | None,
             name: str) -> Perplexity:
    """With a progress bar, called `name`, on a terminal."""
    tokens = [start_id(tokenizer), *tokenizer.encode(text, bos=False)]
    with tqdm(total=len(tokens) - 1, desc=name, unit="token", disable=None, leave=False) as bar:
        return perplexity(model, tokens, window, stride, budget, bar.update)


def report(model: Decoder, tokenizer: Tokenizer, path: Path, window: int | None, stride: int | None,
           budget: int | None) -> tuple[list[int], int, int, Perplexity]:
    """Print the figures of a file. Returns its tokens, window, stride and what was measured."""
    text = read(path)
    window = window or own_context(model.config) or 2048
    stride = stride or window
    found = measured(model, tokenizer, text, window, stride, budget, path.name)
    if told := past_context(model.config, min(window, found.tokens)):
        note(f"[{told}]")
    size = len(text.encode())
    print(f"{path.name}: {size:,} bytes, {found.tokens:,} tokens, window {window:,}, stride {stride:,}",
          f"perplexity      {found.perplexity:.4f}",
          f"loss            {found.loss:.6f} nats per token",
          f"bits per byte   {found.bits_per_byte(size):.4f}", sep="\n")
    return [start_id(tokenizer), *tokenizer.encode(text, bos=False)], window, stride, found


@torch.inference_mode()
def by_transformers(folder: Path, tokens: list[int], window: int, stride: int, device: torch.device) -> float:
    """The same sum from transformers' logits, a window at a time: nats per token."""
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    total = 0.0
    for begin, first, end in windows(len(tokens), window, stride):
        logits = model(torch.tensor([tokens[begin : end - 1]], device=device)).logits[0, first - begin - 1 :]
        targets = torch.tensor(tokens[first:end], device=device)
        total += F.cross_entropy(logits.double(), targets, reduction="sum").item()
    return total / (len(tokens) - 1)


def by_llama_cpp(path: Path, tokens: list[int], window: int, stride: int) -> float | None:
    """The same sum from llama.cpp's logits of a .gguf; None where it is not installed, or the model is a folder."""
    if path.suffix != ".gguf" or not importlib.util.find_spec("llama_cpp"):
        return None
    import llama_cpp
    model, total = llama_cpp.Llama(str(path), n_ctx=window, n_batch=window, logits_all=True, verbose=False), 0.0
    for begin, first, end in windows(len(tokens), window, stride):
        model.reset()
        model.eval(tokens[begin : end - 1])
        logits = torch.from_numpy(model.scores[first - begin - 1 : end - begin - 1]).double()
        total -= logits.log_softmax(1).gather(1, torch.tensor(tokens[first:end])[:, None]).sum().item()
    model.close()
    return total / (len(tokens) - 1)


def beside(name: str, ours: float, theirs: float) -> float:
    """Print another program's perplexity; the relative difference."""
    gap = abs(math.expm1(ours - theirs))
    print(f"{name:15} {math.exp(theirs):.4f}, relative difference {gap:.1e}")
    return gap


def places(load: Callable[[], Decoder], tokenizer: Tokenizer, path: Path, window: int | None, budget: int | None,
           out: Path) -> Path:
    """The picture of the loss by place. Raises InputError where the model's RoPE cannot be stretched so."""
    text, model = read(path), load()
    own = own_context(model.config)
    window = window or own or 2048
    curves = {"as it is": model}
    if own and window > own:
        values = {name: p.detach() for name, p in model.named_parameters()}
        for kind in growing.SCALINGS:
            curves[kind] = growing.rebuilt(model, growing.stretched(model.config, kind, window / own), values)
    found = {}
    for name, each in curves.items():
        found[name] = measured(each, tokenizer, text, window, window, budget, name).by_place(POINTS)
        first, last = found[name][0], found[name][-1]
        print(f"{name:10} loss {first[1]:.4f} up to place {first[0]:,}, {last[1]:.4f} at the end")
    picture = out / "places.png"
    if not plot.loss_by_place(picture, found, own, f"{path.name}, window {window:,}"):
        raise InputError("--places: matplotlib is not installed; pip install -e '.[train]' brings it")
    return picture
