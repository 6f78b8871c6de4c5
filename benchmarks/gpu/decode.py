"""Decoding one sequence, end to end: tokens a second, and how much of the memory's bandwidth that is.

    eager       feed, token by token: Python launches every kernel
    graph       the static step captured as a CUDA graph (nanollm/inference/graphed.py)
    compiled    the static step through torch.compile(mode="reduce-overhead")
    … without kernels   the same with NANOLLM_KERNELS=torch

A new token reads every weight once (of an embedding that is no head only a row), and the keys and values so far:

    of bandwidth = (bytes of weights + bytes of keys and values) · tokens a second / measured bytes a second of a copy

Tokens a second are those of generate.py's loop: a greedy choice, and the CPU knows each token before the next step
begins. "Step alone" is without the choice and without waiting. Weights are random.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.facts import ceilings, installed
from benchmarks.gpu.items import Item, Row, Setting, Tell
from nanollm import ops
from nanollm.cache import Cache
from nanollm.config import Attention, ModelConfig
from nanollm.inference.generation import feed, new_cache
from nanollm.inference.graphed import GraphedDecoder
from nanollm.inference.quantize import quantize
from nanollm.inference.sample import Sampling, next_tokens
from nanollm.inference.static import StaticStep
from nanollm.model import Decoder
from nanollm.presets import preset, transformer

GOALS = {16: "85 %", 8: "70 %", 4: "70 %"}
HOW = ("eager", "graph", "compiled")


def qwen() -> ModelConfig:
    """The shape of Qwen2.5-0.5B: Llama's, with biases on q, k and v."""
    config = transformer(151936, 896, 24, 14, 2, 4864, theta=1e6, eps=1e-6, tied=True, context=32768)
    layer = config.layers[0]
    assert isinstance(layer.mixer, Attention), "a transformer"
    return replace(config, layers=(replace(layer, mixer=replace(layer.mixer, qkv_bias=True)),) * len(config.layers))


SHAPES = {"Llama-3.2-1B": partial(preset, "llama-1b"), "Qwen2.5-0.5B": qwen, "Llama-3-8B": partial(preset, "llama-8b")}
DRY = {"toy": partial(transformer, 512, 128, 2, 4, 2, 256, tied=True)}


@dataclass
class Bench:
    """One model at a time: the next one takes its place."""
    setting: Setting
    name: tuple[str, int] = ("", 0)                             # shape and bits
    model: Decoder | None = None
    # logits of the first step, as eager gives them, of each model that there was
    expected: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    @property
    def sizes(self) -> tuple[int, int]:
        """Tokens of the prompt, and new ones."""
        return (8, 4) if self.setting.dry else (512, 64)

    def get(self, shape: str, bits: int) -> Decoder:
        """The model, built where it is not the one at hand."""
        if self.name != (shape, bits) or self.model is None:
            self.model = None
            if self.setting.device.type == "cuda":
                torch.cuda.empty_cache()
            self.model = random_model((DRY | SHAPES)[shape](), self.setting.device)
            if bits < 16:
                quantize(self.model, bits)
            self.name = shape, bits
        return self.model


def random_model(config: ModelConfig, device: torch.device) -> Decoder:
    """In bfloat16, ready to run."""
    with torch.device("meta"):
        model = Decoder(config)
    model = model.to(torch.bfloat16).to_empty(device=device).eval().requires_grad_(False)
    draw(model)
    return model


@torch.no_grad()
def draw(model: Decoder) -> None:
    """N(0, 0.02), gains and biases of 1, the same each time. On the device: a CPU needs half a minute for a billion."""
    torch.manual_seed(0)
    model.tie()
    for weight in model.parameters():
        weight.fill_(1) if weight.ndim == 1 else weight.normal_(0, 0.02)


def bytes_a_token(model: Decoder, context: float) -> float:
    """Weights and biases, but an embedding that is not the head; and keys and values of `context` tokens."""
    held = sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
    embedding = 0 if model.config.tied else model.embed.weight.nbytes
    widths = sum(2 * layer.mixer.kv_heads * layer.mixer.head_dim for layer in model.config.layers)
    return held - embedding + context * widths * model.embed.weight.itemsize


class Compiled(StaticStep):
    """The static step through torch.compile."""

    def __init__(self, model: Decoder, cache: Cache) -> None:
        import torch._dynamo  # it takes seconds, and only this needs it

        super().__init__(model, cache)
        states = (x for state in cache.states for x in vars(state).values() if isinstance(x, Tensor))
        for x in (self.tokens, self.positions, self.lengths, *cache.held.values(), *states):
            torch._dynamo.mark_static_address(x)                # or what is written in place would be in no CUDA graph
        self.compiled = torch.compile(self.body, mode="reduce-overhead", dynamic=False)

    def run(self, ragged: bool) -> Tensor:
        return self.compiled(ragged)


def items(setting: Setting) -> Iterator[Item]:
    bench = Bench(setting)
    shapes = DRY if setting.dry else SHAPES

    def item(shape: str, bits: int, how: str, kernels: str = "auto", seconds: float = 45) -> Item:
        words = f"{shape}, {bits} bits, {how}{'' if kernels == 'auto' else ' without kernels'}"
        return Item(words, lambda tell: decoded(bench, shape, bits, how, kernels, tell), seconds)

    for shape in shapes:
        for bits in GOALS:
            yield item(shape, bits, "eager")
            yield item(shape, bits, "graph")
            if bits == 16:
                yield item(shape, bits, "graph", "torch")
    if installed("transformers"):
        for shape in shapes:
            yield Item(f"{shape}, 16 bits, transformers", lambda tell, shape=shape: theirs(bench, shape), 45)
    for bits in GOALS:
        for shape in shapes:
            yield item(shape, bits, "compiled", seconds=120)
    for shape in shapes:
        yield item(shape, 16, "compiled", "torch", seconds=120)


def decoded(bench: Bench, shape: str, bits: int, how: str, kernels: str, tell: Tell) -> Row:
    """A row, told in two parts: the loop, then the step alone."""
    model, (prompt_tokens, new) = bench.get(shape, bits), bench.sizes
    device = bench.setting.device
    drawn = torch.Generator().manual_seed(0)                    # the same for all ways, whose logits are compared
    prompt = torch.randint(0, model.config.vocab, (1, prompt_tokens), generator=drawn).to(device)
    with ops.using(kernels):
        cache = new_cache(model, 1, prompt_tokens + 2 * new + 8)
        feed(model, prompt, None, cache)                                    # kernels are compiled
        cache = new_cache(model, 1, prompt_tokens + 2 * new + 8)
        start = now(device)
        feed(model, prompt, None, cache)
        prefill = prompt_tokens / (now(device) - start)
        step = stepping(how, model, cache, device)
        token, start = prompt[:, -1:], now(device)
        logits = step(token).clone()                            # the next step may overwrite them
        first = now(device) - start
        if how == "eager" and kernels == "auto":
            bench.expected[shape, bits] = logits
        wrong = distance(logits, bench.expected[shape, bits]) if (shape, bits) in bench.expected else None
        for _ in range(3):
            step(token)
        seconds = loop(step, logits, new, device)
        read = bytes_a_token(model, cache.longest - new / 2)
        peak = ceilings(bench.setting).bytes
        row: Row = {"model": shape, "bits": bits, "how": how, "kernels": kernels, "tokens/s": 1 / seconds,
                    "of bandwidth": read / seconds / peak, "goal": GOALS[bits], "GB a token": read / 1e9,
                    "prefill tokens/s": prefill, "first step s": first, "differs from eager": wrong}
        tell(row)
        alone = back_to_back(step, token, new, device)
        read = bytes_a_token(model, cache.longest - new / 2)
    return row | {"step alone ms": alone * 1e3, "step alone, of bandwidth": read / alone / peak}


def stepping(how: str, model: Decoder, cache: Cache, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Tokens (1, 1) → logits (1, V). In a dry run the static step itself stands for its graph."""
    if how == "eager":
        return lambda token: feed(model, token, None, cache)
    if how == "compiled":
        return Compiled(model, cache)
    return (GraphedDecoder if device.type == "cuda" else StaticStep)(model, cache)


def now(device: torch.device) -> float:
    """When the device has done all that it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def distance(mine: Tensor, theirs: Tensor) -> float:
    """Relative."""
    return float((mine.float() - theirs.float()).norm() / theirs.float().norm())


def loop(step: Callable[[Tensor], Tensor], logits: Tensor, new: int, device: torch.device) -> float:
    """Seconds a token, each chosen as generate.py does and known to the CPU."""
    greedy, said = Sampling(), [[0]]
    start = now(device)
    for _ in range(new):
        tokens, _ = next_tokens(logits, greedy, [[0]], said)
        said[0] += tokens.tolist()
        logits = step(torch.tensor([said[0][-1:]], device=device))
    return (now(device) - start) / new


def back_to_back(step: Callable[[Tensor], Tensor], token: Tensor, new: int, device: torch.device) -> float:
    """Seconds a step, without waiting in between."""
    start = now(device)
    for _ in range(new):
        step(token)
    return (now(device) - start) / new


def theirs(bench: Bench, shape: str) -> Row:
    """transformers on a model of the same shape, in eager PyTorch with its growing cache, as generate() does it."""
    import transformers

    from checkpoints.families import write_config
    prompt_tokens, new = bench.sizes
    config: ModelConfig = (DRY | SHAPES)[shape]()
    keys: dict[str, Any] = {key: value for key, value in write_config(config)[1].items() if value is not None}
    bench.model, bench.name = None, ("", 0)
    with bench.setting.device:
        settings = transformers.AutoConfig.for_model(**keys)
        model = transformers.AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16).eval()
        prompt = torch.randint(0, config.vocab, (1, prompt_tokens))
    ask = dict(do_sample=False, eos_token_id=None, pad_token_id=0, attention_mask=torch.ones_like(prompt))
    model.generate(prompt, max_new_tokens=4, **ask)
    taken = []
    for count in (2, 2 + new):
        start = now(bench.setting.device)
        model.generate(prompt, max_new_tokens=count, **ask)
        taken.append(now(bench.setting.device) - start)
    seconds = (taken[1] - taken[0]) / new
    held = sum(x.nbytes for x in model.parameters())
    embedding = 0 if config.tied else model.get_input_embeddings().weight.nbytes
    widths = sum(2 * layer.mixer.kv_heads * layer.mixer.head_dim for layer in config.layers)
    read = held - embedding + (prompt_tokens + new / 2) * widths * 2
    return {"model": shape, "bits": 16, "how": "transformers", "tokens/s": 1 / seconds,
            "of bandwidth": read / seconds / ceilings(bench.setting).bytes, "GB a token": read / 1e9}
