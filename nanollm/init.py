"""The first values of the weights: a rule for each parameter, and one random stream each.

    embed, positions, head              N(0, 0.02²)                  Radford et al. 2019 (GPT-2)
    matrices                            N(0, 1/in)                   the variance of what goes through is kept
    matrices that write to the stream   N(0, 1/in / 2L)              o, down, out_proj; L layers: the residual stream
                                                                     does not grow with depth (GPT-2 §2.3)
    gains                               1, stored less their offset
    biases                              0
    everything else                     beside its module: steps and decays of scans, filters, poles

A module lists its rules in `INIT`, {name of a parameter inside it: rule}; the outermost module that names a parameter
decides. A parameter that no module names is an error. Its values follow from (seed, name) alone, so neither the order
in which they are drawn matters, nor how many processes share the model.
"""

import math
import zlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from nanollm.errors import ConfigError

Draw = Callable[[Tensor, torch.Generator, int], Tensor]  # (empty value, random stream, layers L) → the value, filled


def normal(deviation: float) -> Draw:
    """N(0, deviation²)."""
    return lambda value, stream, depth: value.normal_(0, deviation, generator=stream)


def uniform(bound: float) -> Draw:
    """U(−bound, bound)."""
    return lambda value, stream, depth: value.uniform_(-bound, bound, generator=stream)


def constant(number: float) -> Draw:
    """The same number everywhere."""
    return lambda value, stream, depth: value.fill_(number)


zero, one = constant(0.0), constant(1.0)


def matrix(value: Tensor, stream: torch.Generator, depth: int) -> Tensor:
    """N(0, 1/in) for (…, out, in)."""
    return value.normal_(0, value.shape[-1] ** -0.5, generator=stream)


def residual(value: Tensor, stream: torch.Generator, depth: int) -> Tensor:
    """N(0, 1/in / 2L) for (…, out, in): each of the 2L branches adds its part to the stream."""
    return value.normal_(0, (value.shape[-1] * 2 * depth) ** -0.5, generator=stream)


def inverse_softplus(low: float, high: float) -> Draw:
    """b such that softplus(b) is log-uniform in [low, high]: the first step sizes Δ of a scan (Gu & Dao 2023, §3.6)."""

    def draw(value: Tensor, stream: torch.Generator, depth: int) -> Tensor:
        delta = value.uniform_(math.log(low), math.log(high), generator=stream).exp()
        return delta + torch.log(-torch.expm1(-delta))

    return draw


def stream(name: str, seed: int, device: torch.device) -> torch.Generator:
    """The random stream of the parameter of this name."""
    return torch.Generator(device).manual_seed(zlib.crc32(f"{seed} {name}".encode()))


@torch.no_grad()
def init_weights(model: nn.Module, seed: int = 0) -> None:
    """Draw every parameter, as `initial_values` says."""
    parameters = dict(model.named_parameters())
    for name, value in initial_values(model, seed):
        parameters[name].copy_(value)


@torch.no_grad()
def initial_values(model: nn.Module, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Each parameter's name and first value. Raises ConfigError for one that has no rule."""
    depth = len(model.config.layers)  # type: ignore[arg-type, union-attr]  # a Decoder, which this file cannot import
    rules: dict[str, Draw] = {}
    for owner, module in model.named_modules():  # outer modules before those inside them
        for leaf, rule in getattr(module, "INIT", {}).items():
            rules.setdefault(f"{owner}.{leaf}" if owner else leaf, rule)
    for name, p in model.named_parameters():
        if name not in rules:
            owner, _, leaf = name.rpartition(".")
            kind = type(model.get_submodule(owner)).__name__
            raise ConfigError(f"{name}: no rule for its first values; "
                              f"give {kind} one: INIT = {{{leaf!r}: …}} (nanollm/init.py)")
        value = torch.empty(p.shape, dtype=p.dtype, device=p.device)
        yield name, rules[name](value, stream(name, seed, p.device), depth)
