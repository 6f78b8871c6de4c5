"""Per-layer embeddings: beside the embedding that the stream begins with, a short vector a token for each layer.

    c = norm(W e / √D)              cut into L pieces, each normalised by itself        e: what the first layer reads
    p = (c + √P · E[token]) / √2    (L, P): what layer l has is p_l

A table E of L·P numbers a token costs memory and no products, and need not lie where the products are made: "effective
2B" of Gemma 4 E2B are the weights without it. What a layer does with its vector: layer_end.py. Gemma 3n, 2025; Gemma 4.

Shapes: B batch, T tokens, D model width, V vocabulary, L layers that have such a vector, P its width.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanollm.config import ModelConfig, PerLayerInput
from nanollm.init import normal
from nanollm.layers.linear import Linear
from nanollm.layers.norm import build_norm


class PerLayerInputs(nn.Module):
    """The equations at the head of the file, for all layers at once."""
    INIT = {"table": normal(0.02)}

    def __init__(self, config: PerLayerInput, dim: int, vocab: int, layers: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(vocab, layers * config.width))    # E (V, L·P)
        self.linear = Linear(dim, layers * config.width, bias=False)            # W
        self.norm = build_norm(config.norm, config.width)
        self.width = config.width

    def forward(self, tokens: Tensor, embedded: Tensor) -> Tensor:
        """tokens (B, T), e (B, T, D) → (B, T, L, P)."""
        own = F.embedding(tokens, self.table)
        own = own * own.new_full((), self.width**0.5)                           # rounded, as the embedding's √D is
        made = (self.linear(embedded) * embedded.shape[-1] ** -0.5).unflatten(-1, (-1, self.width))
        return (self.norm(made) + own.view_as(made)) * 2**-0.5


def build_per_layer(config: ModelConfig, blocks: Iterable[nn.Module]) -> PerLayerInputs | None:
    """The module, and in the end of each block that reads it which of the vectors is its own."""
    ends = [block.end for block, layer in zip(blocks, config.layers, strict=True) if layer.end and layer.end.inputs]
    for number, end in enumerate(ends):
        end.number = number  # type: ignore[union-attr, assignment]
    inputs = next((layer.end.inputs for layer in config.layers if layer.end and layer.end.inputs), None)
    return None if inputs is None else PerLayerInputs(inputs, config.dim, config.vocab, len(ends))
