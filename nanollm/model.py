"""The decoder: embed, run the layers, normalise, read the vocabulary off.

    tokens ── embed ── layer 0 ── layer 1 ── … ── norm ── head ── logits

    config = ModelConfig(vocab=32000, dim=512, layers=(Layer(Attention(8, 2, 64, Rope()), MLP(1408)),) * 8)
    logits = Decoder(config)(tokens)

Shapes: B batch, T tokens, D model width, V vocabulary.
"""

import math
import zlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanollm.block import Block
from nanollm.cache import Cache
from nanollm.config import ModelConfig
from nanollm.errors import InputError
from nanollm.frame import Frame
from nanollm.linear import Linear
from nanollm.norm import build_norm


class Embedding(nn.Module):
    """Row v of the table is token v."""

    def __init__(self, vocab: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab, dim))

    def forward(self, tokens: Tensor) -> Tensor:                # (B, T) → (B, T, D)
        return F.embedding(tokens, self.weight)


class Decoder(nn.Module):
    """A stack of blocks. It owns no buffers and no cache: everything but the weights follows from config and inputs."""

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        """The weights are drawn from `seed`, unless the model stands on the meta device to be filled later."""
        super().__init__()
        self.config = config
        self.embed = Embedding(config.vocab, config.dim)
        self.layers = nn.ModuleList(Block(layer, config.dim) for layer in config.layers)
        self.norm = build_norm(config.final_norm, config.dim)
        self.head = Linear(config.dim, config.vocab, bias=False)
        self.tie()
        if not self.embed.weight.is_meta:
            init_weights(self, seed)

    def tie(self) -> None:
        """Make head and embedding one parameter where the config says so; again after the meta device, which parts them."""
        if self.config.tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor, positions: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Logits (B, T, V) for tokens (B, T) int64.

        positions (B, T): the place of each token in its document. A 0 begins a document that sees nothing before it,
        −1 is padding. None: each row goes on where its cache stopped, or is one document. Any split of a sequence into
        calls with a cache gives what the single call gives.
        """
        return self.head(self.hidden(tokens, positions, cache))

    def hidden(self, tokens: Tensor, positions: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """What the head reads, (B, T, D): for callers that need few of the logits, or the head in pieces."""
        if tokens.ndim != 2 or 0 in tokens.shape:
            raise InputError(f"tokens have shape {tuple(tokens.shape)}, expected (batch, tokens) with at least one of each")
        new = tokens.shape[1]
        regular = positions is None and not (cache is not None and cache.ragged)
        if cache is not None:
            tokens, positions = cache.advance(tokens, positions)
        elif positions is None:
            positions = torch.arange(new, device=tokens.device).expand(tokens.shape)
        x = self.embed(tokens)
        frame = Frame(positions, regular, x.dtype, cache)
        if self.config.float32_residual:
            x = x.float()
        for layer, state in zip(self.layers, cache.states if cache is not None else [None] * len(self.layers)):
            x = layer(x, frame, state)
        return self.norm(x[:, -new:]).to(frame.dtype)   # more than new only where a cache had to begin again, see cache.py


@torch.no_grad()
def init_weights(model: nn.Module, seed: int = 0) -> None:
    """Draw every parameter, as `initial_values` says."""
    parameters = dict(model.named_parameters())
    for name, value in initial_values(model, seed):
        parameters[name].copy_(value)


@torch.no_grad()
def initial_values(model: nn.Module, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Each parameter's name and first value. Each has a random stream of its own, (seed, name), so neither the order matters nor how
    many processes share the model.

        embed, head                         N(0, 0.02²)                  Radford et al. 2019
        matrices                            N(0, 1/in)                   the variance of what goes through is kept
        … that write to the residual:       N(0, 1/in / 2L)              o, down, out_proj; L layers: the stream does
                                                                         not grow with depth (GPT-2 §2.3)
        gains                               1, stored less their offset
        biases                              0
        conv1d                              U(−1/√k, 1/√k)
        A_log, D                            log(1 … N), 1                Gu & Dao 2023, §3.6 (S4D-Real)
        dt_proj                             U(−1/√R, 1/√R), its bias such that Δ is log-uniform in [0.001, 0.1]
    """
    branches = 2 * len(model.config.layers)
    for name, p in model.named_parameters():
        stream = torch.Generator(p.device).manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        leaf = ".".join(name.split(".")[-2:])
        owner = model.get_submodule(name.rpartition(".")[0])
        value = torch.empty(p.shape, dtype=p.dtype, device=p.device)
        match leaf.split("."):
            case ["embed" | "head", "weight"]:
                value.normal_(0, 0.02, generator=stream)
            case [_, "gain"]:
                value.fill_(1 - getattr(owner.config, "offset", 0))
            case ["mixer", "A_log"]:
                value.copy_(torch.arange(1, p.shape[1] + 1, device=p.device).log().expand_as(value))
            case ["mixer", "D"]:
                value.fill_(1)
            case ["conv1d", "weight"]:
                value.uniform_(-(p.shape[-1] ** -0.5), p.shape[-1] ** -0.5, generator=stream)
            case ["dt_proj", "weight"]:
                value.uniform_(-(p.shape[1] ** -0.5), p.shape[1] ** -0.5, generator=stream)
            case ["dt_proj", "bias"]:
                delta = value.uniform_(math.log(0.001), math.log(0.1), generator=stream).exp()
                value = delta + torch.log(-torch.expm1(-delta))                 # the inverse of softplus
            case [_, "bias"]:
                value.zero_()
            case [writer, *_] if writer in ("o", "out_proj") or leaf.endswith("down") or writer == "down":
                value.normal_(0, (p.shape[-1] * branches) ** -0.5, generator=stream)
            case _:
                value.normal_(0, p.shape[-1] ** -0.5, generator=stream)
        yield name, value
