"""LoRA on a model: adapters are put beside its weights, found again, and merged.

    model = lora.add(model, LoRA(rank=8, alpha=16, targets=("q", "v")))      # in place; all else is frozen
    lora.merge(model)                                                        # W + s B A in the place of each

lora_layer.py has the equations and the module, lora_weights.py where A and B begin.
"""


import torch
from torch import nn

from nanollm.errors import InputError
from nanollm.layers.linear import Linear
from nanollm.layers.moe import Experts, SplitExperts, joined, split
from nanollm.model import Decoder
from nanollm.training import lora_weights
from nanollm.training.lora_layer import LoRA, LoRALinear, has


def add(model: Decoder, config: LoRA, seed: int = 0, quantise: lora_weights.Quantise | None = None) -> Decoder:
    """Freeze a model, put adapters beside the weights that config names, in place, and return it.

    On the meta device adapters have no values; lora_weights.begin sets them once W is there. quantise: for "loftq".
    Raises InputError, before anything is changed, for a target that no weight has, or can have such an adapter."""
    names = chosen(model, config)
    lora_weights.check(config, quantise, model.layers.modules())
    model.requires_grad_(False)
    model.lora = config  # type: ignore[assignment]  # for whoever writes it; nn.Module declares tensors and modules
    for name in names:
        owner = name.rpartition(".")[0]
        experts = model.get_submodule(owner)
        if isinstance(experts, Experts):
            model.set_submodule(owner, split(experts))
        base = model.get_submodule(name)
        added = LoRALinear(base, config.rank_of(name), config.scale_of(name), config.dropout, config.dora)
        model.set_submodule(name, added.train(base.training))
    if not model.embed.weight.is_meta:
        lora_weights.begin(loras(model), config.init, seed, quantise)
    return model


def targets(model: Decoder) -> dict[str, bool]:
    """The names of all weights that can have an adapter, layers.0.mixer.q …, and whether it is one of experts."""
    names: dict[str, bool] = {}
    for name, module in model.layers.named_modules(prefix="layers"):
        if isinstance(module, (Experts, SplitExperts)):
            names |= dict.fromkeys((f"{name}.{leaf}" for leaf in module.leaves), True)
        elif type(module) is Linear or hasattr(module, "dense"):
            names.setdefault(name, False)
    return names


def chosen(model: Decoder, config: LoRA) -> list[str]:
    """The weights that config names. Raises InputError for a target that is none, and for what no adapter can do."""
    there = targets(model)
    if adapted := loras(model):
        raise InputError(f"{next(iter(adapted))} has an adapter already; merge it first")
    if (least := min(config.rank, *config.ranks.values(), 1)) < 1:
        raise InputError(f"an adapter of rank {least}; expected 1 or more")
    for part in (*config.targets, *config.ranks, *config.alphas):
        if part != "all" and not any(has(name, (part,)) for name in there):
            known = dict.fromkeys(name.rpartition(".")[2] for name in there)
            meant = part.removesuffix("_proj")              # q_proj, as most folders and peft call q
            hint = f" (did you mean {meant}?)" if meant in known else ", which should have an adapter"
            raise InputError(f"no weight of the layers is called {part}{hint}; there are {', '.join(known)}, "
                             f"by full names {next(iter(there))} …, and all")
    names = [name for name in there if "all" in config.targets or has(name, config.targets)]
    if config.dora and (stacked := [name for name in names if there[name]]):
        raise InputError(f"{stacked[0]}: DoRA is for Linears, and this is a weight of experts; name other targets")
    return names


def loras(model: nn.Module) -> dict[str, LoRALinear]:
    """The modules with an adapter, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of adapters, by name: layers.0.mixer.q.A …"""
    owners = loras(model)
    return {name: p for name, p in model.named_parameters() if name.rpartition(".")[0] in owners}


@torch.no_grad()
def merge(model: Decoder) -> Decoder:
    """Put W + s B A in the place of each adapter, in place, and return the model, which is a plain one again.

    Computed in float32, and rounded to the dtype of W; where W was quantised, to that of the embedding."""
    dtype = model.embed.weight.dtype
    for name, experts in [pair for pair in model.named_modules() if isinstance(pair[1], SplitExperts)]:
        if loras(experts):
            for leaf in experts.leaves:
                setattr(experts, leaf, lora_weights.plain(getattr(experts, leaf), dtype))
            model.set_submodule(name, joined(experts))
    for name, module in loras(model).items():
        model.set_submodule(name, lora_weights.plain(module, dtype))
    return model.requires_grad_(True)
