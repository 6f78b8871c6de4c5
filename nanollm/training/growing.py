"""Growing a pretrained model before it is tuned: more layers, more tokens, more context.

    --expand N          LLaMA-Pro: N new layers, spread evenly; each is a copy of the layer before it whose output
                        matrices W_o and W_down are 0. It adds 0 to the residual stream:
                            x + W_o attention(x) + W_down(…) = x                 so the logits stay, bit for bit
                        Wu et al. 2024 (arXiv 2401.02415) §3.2. Only new layers are trained (freezing.py).
    --grow-vocab        new rows of embedding and head, for tokens that the tokenizer has and the model lacks
                            mean     e_new = 1/V Σ_v e_v                         Hewitt 2021, see below
                            zero     0
                            normal   N(0, 0.02²), as a new model is drawn (init.py)
                        with --grow-from TEXT the mean is over the tokens of that text
    --rope-scaling      other angles for a longer context, by the factor F (layers/scaling.py)
                            linear   f / F            yarn     slow angles / F, fast ones kept
                            dynamic  θ grows with the length of the sequence

Why the mean (nlp.stanford.edu/~johnhew/vocab-expansion.html): with Z = Σ exp(e_v·h), a new row of 0 has the logit 0,
which is *large* where the others are negative; then it takes most of the probability. By Jensen's inequality the mean
has exp(mean logit) ≤ Z / V: all old tokens keep at least V/(V + 1) of theirs.

Which layers are copied, for L = 6 and N = 2 (new ones are marked):   0 1 2 2' 3 4 5 5'

Shapes: V vocabulary, D model width, L layers before, N new ones.
"""

import argparse
import dataclasses
import warnings
import zlib

import torch
from torch import Tensor, nn

from nanollm.config import (
    DynamicNTK,
    FilteredAttention,
    GatedAttention,
    Layer,
    Linear,
    Mixer,
    ModelConfig,
    NarrowValueAttention,
    NormedValueAttention,
    ParallelMixer,
    Rope,
    Scaling,
    SparseLatentAttention,
    Yarn,
)
from nanollm.errors import InputError, RunError, counted
from nanollm.init import residual
from nanollm.model import Decoder
from nanollm.text import adding, tokenizer

ROWS = ("mean", "zero", "normal")
SCALINGS = ("linear", "dynamic", "yarn")
Values = dict[str, Tensor]                                  # parameters by name


def check(options: argparse.Namespace) -> None:
    """Raise InputError for options of this file that do not go together."""
    given = {"--expand": options.expand, "--grow-vocab": options.grow_vocab, "--add-tokens": options.add_tokens,
             "--rope-scaling": options.rope_scaling}
    for name, value in given.items():
        if value and not options.init:
            raise InputError(f"{name} grows a model that exists: name its folder with --init")
    if options.expand_all and not options.expand:
        raise InputError("--expand-all says what is trained after --expand N, which is not given")
    if options.grow_from is not None and not (options.grow_vocab or options.add_tokens):
        raise InputError("--grow-from says what new rows are the mean of; give --grow-vocab or --add-tokens with it")
    if options.grow_from is not None and options.grow_vocab not in (None, "mean"):
        raise InputError(f"--grow-from asks for a mean, --grow-vocab for {options.grow_vocab}; give one of them")
    if (options.rope_scaling is None) != (options.rope_factor is None):
        raise InputError("--rope-scaling and --rope-factor go together: give both")
    if options.rope_factor is not None and options.rope_factor <= 1:
        raise InputError(f"--rope-factor {options.rope_factor:g}: expected more than 1, the new context over the old")


def grow(model: Decoder, options: argparse.Namespace) -> Decoder:
    """The model as the options want it, which is `model` itself where they ask for nothing. It keeps its origin.

    Raises InputError for what this model cannot be grown by, TokenizerError where its tokenizer cannot be read.
    """
    config, values = model.config, {name: p.detach() for name, p in model.named_parameters()}
    if options.add_tokens:
        adding.with_tokens(options.tokenizer or options.init, options.add_tokens, options.out / adding.FOLDER)
    if options.grow_vocab or options.add_tokens:
        config, values = more_tokens(config, values, options)
    if options.expand:
        config, values = more_layers(model, config, values, options.expand)
    if options.rope_scaling:
        config = stretched(config, options.rope_scaling, options.rope_factor)
    return model if config == model.config else rebuilt(model, config, values)


def planned(config: ModelConfig, options: argparse.Namespace) -> ModelConfig:
    """The config of the grown model, for --plan: without new tokens, which are few. Raises InputError as `grow`."""
    if options.expand:
        config = deeper(config, options.expand)
    return stretched(config, options.rope_scaling, options.rope_factor) if options.rope_scaling else config


def rebuilt(model: Decoder, config: ModelConfig, values: Values) -> Decoder:
    """A decoder of this config with these values, in eval mode, and from where `model` came."""
    with torch.device("meta"):
        grown = Decoder(config)
    for name in dict(grown.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        setattr(grown.get_submodule(owner), leaf, nn.Parameter(values[name], requires_grad=False))
    grown.tie()
    grown.origin = getattr(model, "origin", None)  # type: ignore[assignment]  # nn.Module declares tensors and modules
    return grown.eval()


# ---- more layers

def new_layers(depth: int, count: int) -> list[int]:
    """The numbers of the `count` new layers in a model that has `depth` with them."""
    old = depth - count
    return [(j + 1) * old // count + j for j in range(count)]


def order(old: int, count: int) -> list[int]:
    """Which of the old layers, or a copy of which, stands at each place."""
    new = new_layers(old + count, count)
    return [place - sum(number <= place for number in new) for place in range(old + count)]


def deeper(config: ModelConfig, count: int) -> ModelConfig:
    """The config with `count` new layers. Raises InputError for more than there were."""
    old = len(config.layers)
    if count > old:
        raise InputError(f"--expand {count}: the model has {counted(old, 'layer')}, each of which is copied at most "
                         "once")
    new, places = new_layers(old + count, count), enumerate(order(old, count))
    layers = tuple(copied(config.layers[number]) if place in new else config.layers[number] for place, number in places)
    return dataclasses.replace(config, layers=layers)


def copied(layer: Layer) -> Layer:
    """The layer as its copy is. A copy ranks no keys and keeps none: those would be what later layers read."""
    if isinstance(layer.mixer, SparseLatentAttention):
        return dataclasses.replace(layer, mixer=dataclasses.replace(layer.mixer, indexer=None))
    if isinstance(layer.mixer, NormedValueAttention):
        return dataclasses.replace(layer, mixer=dataclasses.replace(layer.mixer, kept=False))
    return layer


def more_layers(model: Decoder, config: ModelConfig, values: Values, count: int) -> tuple[ModelConfig, Values]:
    """The config and the values with `count` new layers beside those of `model`."""
    wanted = deeper(config, count)
    new = new_layers(len(wanted.layers), count)
    grown = {name: value for name, value in values.items() if not name.startswith("layers.")}
    for place, number in enumerate(order(len(model.layers), count)):
        silent = silenced(model.layers[number]) if place in new else {}
        prefix = f"layers.{number}."
        for name in [name for name in values if name.startswith(prefix)]:
            leaf, value = name.removeprefix(prefix), values[name]
            if place in new:
                value = torch.full_like(value, silent[leaf]) if leaf in silent else value.clone()
            grown[f"layers.{place}.{leaf}"] = value
    places = order(len(model.layers), count)
    for name, dim in (("shared.per_layer.table", 1), ("shared.per_layer.linear.weight", 0)):    # a part for each layer
        if name in grown:
            grown[name] = grown[name].unflatten(dim, (len(model.layers), -1)).index_select(
                dim, torch.tensor(places)).flatten(dim, dim + 1)
    return wanted, grown


def silenced(block: nn.Module) -> dict[str, float]:
    """The parameters of a block that decide what it does to the residual stream, each with the value at which it does
    nothing.

    They are the matrices that init.py calls residual, and their biases. Where a norm stands behind them it is the gain
    of that norm: the norm of 0 would have the gradient 1/√ε.
    """
    found: dict[str, float] = {}
    for part in ("mixer", "ffn"):
        norm = getattr(block, f"post_{part}")
        if norm is not None and norm.gain is not None:
            found[f"post_{part}.gain"] = -norm.config.offset
            found[f"post_{part}.bias"] = 0.0
        elif getattr(block, part) is not None:
            found |= dict.fromkeys(outputs(getattr(block, part), part), 0.0)
    if block.end is not None:
        found["end.scale"] = 1.0                                # what multiplies the stream
        found["end.norm.gain"] = 0.0                            # of what is added before that
    return found


def outputs(part: nn.Module, prefix: str) -> list[str]:
    """The names of the parameters that write to the residual stream: matrices, and the biases beside them."""
    matrices = [f"{owner}.{leaf}" if owner else leaf for owner, module in part.named_modules()
                for leaf, rule in getattr(module, "INIT", {}).items() if rule is residual]
    biases = [name.removesuffix("weight") + "bias" if name.endswith("weight") else f"{name}_bias" for name in matrices]
    return [f"{prefix}.{name}" for name in (*matrices, *biases)]


# ---- more tokens

def more_tokens(config: ModelConfig, values: Values, options: argparse.Namespace) -> tuple[ModelConfig, Values]:
    """Rows for the tokens of the tokenizer that the run reads with. Nothing changes where there are enough: many
    models have more rows than their tokenizer has tokens (padding)."""
    folder = adding.folder_of(options)
    assert folder is not None, "--init is given, see check"
    size = tokenizer.load(folder).vocab_size
    if size <= config.vocab:
        if options.grow_vocab:
            warnings.warn(f"--grow-vocab: nothing grows, as the model's {config.vocab} rows are enough for the "
                          f"tokenizer's {size} tokens", stacklevel=2)
        return config, values
    if "shared.per_layer.table" in values:
        raise InputError(f"the tokenizer has {size} tokens and the model {config.vocab} rows; here none are added to a "
                         "model whose layers have a vector a token each (per-layer embeddings)")
    like = None
    if options.grow_from is not None:
        like = tokenizer.load(options.init).encode(options.grow_from, bos=False)
        if not like or max(like) >= config.vocab:
            raise InputError(f"--grow-from {options.grow_from!r}: its tokens are {like}, expected one or more below "
                             f"{config.vocab}, the rows that the model has")
    how, seed = options.grow_vocab or "mean", options.seed
    grown = {name: torch.cat([values[name], new_rows(values[name], size - config.vocab, how, like, f"{seed} {name}")])
             for name in ("embed.weight", "head.weight", "head.bias") if name in values}
    return dataclasses.replace(config, vocab=size), values | grown


def new_rows(old: Tensor, count: int, how: str, like: list[int] | None = None, seed: str = "") -> Tensor:
    """old (V, D) or (V,) → new rows (count, D) or (count,), as the head of the file says. The mean is taken in float32,
    over all rows or over those that `like` names."""
    if how == "mean":
        mean = (old if like is None else old[like]).mean(0, keepdim=True, dtype=torch.float32)
        return mean.to(old.dtype).expand(count, *old.shape[1:])
    rows = torch.zeros(count, *old.shape[1:])
    if how == "normal" and old.ndim > 1:                    # a bias is 0 in a new model
        rows.normal_(0, 0.02, generator=torch.Generator().manual_seed(zlib.crc32(seed.encode())))
    return rows.to(old.dtype)


# ---- more context

def stretched(config: ModelConfig, kind: str, factor: float) -> ModelConfig:
    """The config whose RoPE is scaled. Raises InputError where there is no RoPE, more than one, or a scaled one.

    The context is `factor` times as long; but with `dynamic` it stays, as config.json has it so: see `reach`.
    """
    ropes = {rope for layer in config.layers if (rope := rope_of(layer.mixer))}
    if len(ropes) != 1:
        found = "no layer has RoPE" if not ropes else f"its layers have {len(ropes)} different RoPEs"
        raise InputError(f"--rope-scaling {kind}: {found}; expected one for all layers")
    rope = ropes.pop()
    if rope.scaling is not None:
        raise InputError(f"--rope-scaling {kind}: its RoPE is scaled already, {rope.scaling}; expected a plain one")
    if config.context is None:
        raise InputError(f"--rope-scaling {kind}: its config.json does not say which context it was trained on")
    original = config.context
    scalings: dict[str, Scaling] = {
        "linear": Linear(factor), "dynamic": DynamicNTK(factor, original), "yarn": Yarn(factor, original)}
    context = original if kind == "dynamic" else round(original * factor)
    rope = dataclasses.replace(rope, scaling=scalings[kind])
    layers = tuple(dataclasses.replace(layer, mixer=with_rope(layer.mixer, rope)) for layer in config.layers)
    return dataclasses.replace(config, layers=layers, context=context)


def rope_of(mixer: Mixer | None) -> Rope | None:
    """The RoPE of a mixer that has one."""
    return getattr(mixer, "rope", None)


def with_rope(mixer: Mixer | None, rope: Rope) -> Mixer | None:
    """The mixer with this RoPE, where it has one."""
    if rope_of(mixer) is None:
        return mixer
    if isinstance(mixer, FilteredAttention | GatedAttention | NarrowValueAttention | ParallelMixer):
        return dataclasses.replace(mixer, attention=dataclasses.replace(mixer.attention, rope=rope))
    return dataclasses.replace(mixer, rope=rope)  # type: ignore[type-var]  # all mixers are dataclasses


def reach(config: ModelConfig) -> int | None:
    """The longest row that a model is made for: its context, times the factor where its RoPE follows the length."""
    scalings = [rope.scaling for layer in config.layers if (rope := rope_of(layer.mixer))]
    grown = [round(s.original * s.factor) for s in scalings if isinstance(s, DynamicNTK)]
    return config.context and max([config.context, *grown])


def need_reach(config: ModelConfig, options: argparse.Namespace) -> None:
    """Raise RunError where rows are longer than the model of --init was made for."""
    if options.init and (most := reach(config)) and options.context > most:
        raise RunError(f"{options.init}: made for {most} tokens, --context is {options.context}; --rope-scaling and "
                       "--rope-factor stretch it")


def need_rows(config: ModelConfig, vocab: int, options: argparse.Namespace) -> None:
    """Raise RunError where the data has tokens that the model of --init has no row for."""
    if options.init and vocab > config.vocab:
        raise RunError(f"{options.init}: has a vocabulary of {config.vocab}, the tokenizer of the data one of "
                       f"{vocab}; --grow-vocab gives it rows for them")
