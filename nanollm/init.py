"""The first values of the weights: one table, one random stream a parameter.

A parameter's values follow from (seed, name) alone, so neither the order matters in which they are drawn, nor how many processes
share the model.
"""

import math
import zlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


@torch.no_grad()
def init_weights(model: nn.Module, seed: int = 0) -> None:
    """Draw every parameter, as `initial_values` says."""
    parameters = dict(model.named_parameters())
    for name, value in initial_values(model, seed):
        parameters[name].copy_(value)


@torch.no_grad()
def initial_values(model: nn.Module, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Each parameter's name and first value.

        embed, positions, head              N(0, 0.02²)                  Radford et al. 2019
        matrices                            N(0, 1/in)                   the variance of what goes through is kept
        … that write to the residual:       N(0, 1/in / 2L)              o, down, out_proj; L layers: the stream does
                                                                         not grow with depth (GPT-2 §2.3)
        gains                               1, stored less their offset
        biases, sinks, correction           0
        conv1d                              U(−1/√k, 1/√k)
        A_log, D                            log(1 … N), 1                Gu & Dao 2023, §3.6 (S4D-Real)
        A_log of a head                     log U(1, 16)                 Mamba-2, as published
        Lambda                              a⁸ ~ U(0.9, 0.999)           De et al. 2024, §2.4; a = exp(−softplus(Λ))
        first, second (two taps)            N(0, 1/2in)
        poles, residues                     uniform in the disc |p| < 0.95: none explodes, some remember;  N(0, 1/N)
        decay, first, mix_…                 −5 … 3, log 0.3, 0 … 1 over the channels     RWKV-4 as published, less its changes with depth
        dt_proj                             U(−1/√R, 1/√R), its bias, or dt_bias, such that Δ is log-uniform in [0.001, 0.1]
    """
    branches = 2 * len(model.config.layers)
    for name, p in model.named_parameters():
        stream = torch.Generator(p.device).manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        leaf = ".".join(name.split(".")[-2:])
        owner = model.get_submodule(name.rpartition(".")[0])
        value = torch.empty(p.shape, dtype=p.dtype, device=p.device)
        match leaf.split("."):
            case ["embed" | "positions" | "head", "weight"]:
                value.normal_(0, 0.02, generator=stream)
            case [_, "gain"]:
                value.fill_(1 - getattr(owner.config, "offset", 0))
            case ["mixer", "A_log"] if p.ndim == 2:
                value.copy_(torch.arange(1, p.shape[1] + 1, device=p.device).log().expand_as(value))
            case ["mixer", "A_log"]:
                value.uniform_(1, 16, generator=stream).log_()
            case ["mixer", "Lambda"]:
                value = torch.log(torch.expm1(-value.uniform_(0.9, 0.999, generator=stream).log() / 8))      # the inverse of softplus
            case ["time", "decay"]:
                value.copy_(torch.linspace(-5, 3, len(p), device=p.device))
            case ["time", "first"]:
                value.fill_(math.log(0.3))
            case [_, "mix_r" | "mix_k" | "mix_v"]:
                value.copy_(torch.linspace(0, 1, p.shape[-1], device=p.device))
            case ["first" | "second", "weight"]:
                value.normal_(0, p[0].numel() ** -0.5, generator=stream)
            case ["mixer", "poles"]:
                angle, area = value.uniform_(generator=stream).movedim(-1, 0)
                value = torch.polar(0.95 * area.float().sqrt(), 2 * math.pi * angle.float())
                value = torch.view_as_real(value).to(p.dtype)
            case ["mixer", "residues"]:
                value.normal_(0, p.shape[1] ** -0.5, generator=stream)
            case ["mixer", "D"]:
                value.fill_(1)
            case ["conv1d", "weight"]:
                value.uniform_(-(p.shape[-1] ** -0.5), p.shape[-1] ** -0.5, generator=stream)
            case ["dt_proj", "weight"]:
                value.uniform_(-(p.shape[1] ** -0.5), p.shape[1] ** -0.5, generator=stream)
            case ["dt_proj", "bias"] | ["mixer", "dt_bias"]:
                delta = value.uniform_(math.log(0.001), math.log(0.1), generator=stream).exp()
                value = delta + torch.log(-torch.expm1(-delta))                 # the inverse of softplus
            case [_, "bias" | "sinks" | "correction" | "gate_bias" | "up_bias" | "down_bias"]:
                value.zero_()
            case [writer, *_] if writer in ("o", "out_proj") or leaf.endswith("down") or writer == "down":
                value.normal_(0, (p.shape[-1] * branches) ** -0.5, generator=stream)
            case _:
                value.normal_(0, p.shape[-1] ** -0.5, generator=stream)
        yield name, value
