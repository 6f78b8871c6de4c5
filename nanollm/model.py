"""The decoder: embed, run the layers, normalise, read the vocabulary off.

    tokens ── embed ── layer 0 ── layer 1 ── … ── norm ── head ── logits

    embed     e = s·E[token] + P[position], then a norm      where the config has s, P, the norm (Gemma; GPT-2; BLOOM)
    head      logits = c·tanh(s (W x + b) / c)               where it has s, b, c (Command-R; Phi; Gemma-2)

    config = ModelConfig(vocab=32000, dim=512, layers=(Layer(Attention(8, 2, 64, Rope()), MLP(1408)),) * 8)
    logits = Decoder(config)(tokens)

Shapes: B batch, T tokens, D model width, V vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanollm.block import Block
from nanollm.cache import Cache
from nanollm.config import ModelConfig
from nanollm.errors import InputError
from nanollm.init import init_weights, normal, zero
from nanollm.layers.forward_context import ForwardContext
from nanollm.layers.linear import Linear
from nanollm.layers.norm import build_norm, normed
from nanollm.layers.positions import build_positions, check_positions
from nanollm.layers.shared_block import build_shared


class Embedding(nn.Module):
    """Row v of the table is token v."""
    INIT = {"weight": normal(0.02)}

    def __init__(self, vocab: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab, dim))

    def forward(self, tokens: Tensor) -> Tensor:                # (B, T) → (B, T, D)
        return F.embedding(tokens, self.weight)


class Head(Linear):
    """Reads the vocabulary off: the equation at the head of the file. With `unit_head` each row of W has length 1."""
    INIT = {"weight": normal(0.02), "bias": zero}

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.dim, config.vocab, config.head_bias)
        self.scale, self.softcap, self.unit = config.head_scale, config.head_softcap, config.unit_head
        self.packed: nn.Module | None = None                    # W x + b, where inference has packed W

    def forward(self, x: Tensor) -> Tensor:                     # (…, D) → (…, V)
        logits = F.linear(x, self.rows(), self.bias) if self.packed is None else self.packed(x)
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def rows(self) -> Tensor:
        """W (V, D)."""
        return F.normalize(self.weight) if self.unit else self.weight

    def product(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (n, D) → x' (n, D'), W' (V, D'), whose product x' W'ᵀ is what the soft cap is applied to.

        For a loss that never holds all logits. The bias becomes the weight of a constant, the scale a factor of x.
        """
        weight = self.rows()
        x = x if self.scale == 1 else x * self.scale
        if self.bias is None:
            return x, weight
        return F.pad(x, (0, 1), value=self.scale), torch.cat([weight, self.bias[:, None]], 1)


class Decoder(nn.Module):
    """A stack of blocks. It owns no buffers and no cache: everything but the weights follows from config and inputs."""
    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        """The weights are drawn from `seed`, unless the model stands on the meta device to be filled later."""
        super().__init__()
        self.config = config
        self.embed = Embedding(config.vocab, config.dim)
        self.positions = build_positions(config.positions, config.dim)
        self.embed_norm = build_norm(config.embed_norm, config.dim)
        self.layers = nn.ModuleList(Block(layer, config.dim) for layer in config.layers)
        self.shared = build_shared(config, self.layers)         # what stands once and is used by many layers
        self.norm = build_norm(config.final_norm, config.dim)
        self.head = Head(config)
        self.tie()
        if not self.embed.weight.is_meta:
            init_weights(self, seed)

    def tie(self) -> None:
        """Make head and embedding one parameter where the config says so. To call again after the meta device."""
        if self.config.tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor, positions: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Logits (B, T, V) for tokens (B, T) int64.

        positions (B, T): the place of each token in its document, which rises by one. A 0 begins a document, which sees
        nothing before it; −1 is padding, before, between or behind documents, not inside one. None: each row goes on
        where its cache stopped, or is one document. Any split of a sequence into calls with a cache gives what the
        single call gives.
        """
        return self.head(self.hidden(tokens, positions, cache))

    def hidden(self, tokens: Tensor, positions: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """What the head reads, (B, T, D): for callers that need few of the logits, or the head in pieces."""
        if tokens.ndim != 2 or 0 in tokens.shape:
            raise InputError(f"tokens have shape {tuple(tokens.shape)}, expected (batch, tokens), at least one of each")
        new = tokens.shape[1]
        regular = positions is None and not (cache is not None and cache.ragged)
        if cache is not None:
            tokens, positions = cache.advance(tokens, positions)
        elif positions is None:
            positions = torch.arange(new, device=tokens.device).expand(tokens.shape)
        else:
            check_positions(positions)
        x = self.embedded(tokens, positions)
        ctx = ForwardContext(positions, regular, x.dtype, cache, self.shared, x, tokens)
        if self.config.float32_residual:
            x = x.float()
        states = cache.states if cache is not None else [None] * len(self.layers)
        for layer, state in zip(self.layers, states, strict=True):
            x = layer(x, ctx, state)
        # more than the new tokens were fed only where the cache began again, see Cache.advance
        return self.norm(x[:, -new:]).to(ctx.dtype)

    def embedded(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """What the first layer reads: (B, T) and (B, T) → (B, T, D)."""
        x = self.embed(tokens)
        if self.config.embed_scale != 1:
            x = x * x.new_full((), self.config.embed_scale)     # itself rounded to the working dtype: 55.5, not 55.4256
        if self.positions is not None:
            x = x + self.positions(positions).to(x.dtype)
        return normed(self.embed_norm, x)
