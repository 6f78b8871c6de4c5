"""Mixture-of-Depths: in every other layer a router picks k of the T tokens; the rest pass by on the residual stream.

    python examples/mixture_of_depths.py TEXT.txt --steps 500

    r_i = w · x_i                        the router's score of token i
    x_i ← x_i + r_i f(X̃)_i               for the k tokens with the largest scores in the row; X̃ has these alone
    x_i ← x_i                            for the others          Raposo et al. 2024 (arXiv 2404.02258) eq. 1

f is what a layer of Decoder adds to the stream. With k = T/8 the layer costs about an eighth, and the shapes are fixed.

Whether token i is among the k depends on the scores of tokens after i, so this routing sees the future: it cannot
generate, and its validation loss flatters. The paper has two ways out (§3.5). A second loss, here: binary
cross-entropy pulls r above 0 for the chosen and below 0 for the others, and in eval mode r_i > 0 decides, which is
causal. Or a small predictor of the choice, trained apart from the stream. Both losses are printed; no cache is kept.

Shapes: B batch, T tokens, k chosen tokens, D model width.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanollm import Decoder, ModelConfig
from nanollm.config import MLP, Attention, Layer, Rope
from nanollm.layers.forward_context import ForwardContext

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("text", type=Path, help="a text file")
parser.add_argument("--steps", type=int, default=500)
args = parser.parse_args()
T, CAPACITY = 128, 1 / 8                                                        # k = T/8, the paper's best


class Routed(nn.Module):
    """A layer that only some tokens go through: top k in training mode, those with r > 0 in eval mode."""

    def __init__(self, layer: nn.Module, dim: int) -> None:
        super().__init__()
        self.layer, self.router = layer, nn.Linear(dim, 1, bias=False)
        self.loss, self.share = torch.zeros(()), 0.0                            # of the last call

    def forward(self, x: Tensor, ctx: ForwardContext, state: None = None) -> Tensor:        # (B, T, D) → (B, T, D)
        assert state is None, "no cache"
        scores = self.router(x)[..., 0]                                         # (B, T)
        if self.training:
            places = scores.topk(max(1, int(CAPACITY * x.shape[1])), dim=1).indices.sort().values       # (B, k)
            chosen = torch.zeros_like(scores).scatter(1, places, 1.0)
            self.loss = F.binary_cross_entropy_with_logits(scores, chosen)
            return self.through(x, scores, ctx.positions, places)
        self.share = (scores > 0).float().mean().item()
        rows = [row.nonzero()[None, :, 0] for row in scores > 0]                # a row has as many as it has
        return torch.cat([self.through(x[b : b + 1], scores[b : b + 1], ctx.positions[b : b + 1], places)
                          for b, places in enumerate(rows)])

    def through(self, x: Tensor, scores: Tensor, positions: Tensor, places: Tensor) -> Tensor:
        """Equation 1. The chosen tokens keep their positions, and see those before them that are chosen too."""
        if places.numel() == 0:
            return x
        at = places[..., None].expand(-1, -1, x.shape[-1])
        some = x.gather(1, at)                                                  # (B, k, D)
        f = self.layer(some, ForwardContext(positions.gather(1, places), False, x.dtype)) - some
        return x.scatter_add(1, at, scores.gather(1, places)[..., None] * f)


torch.manual_seed(0)
data = torch.frombuffer(bytearray(args.text.read_bytes()), dtype=torch.uint8).long()
training, validation = data[: -len(data) // 10], data[-len(data) // 10 :]
layer = Layer(Attention(heads=4, kv_heads=2, head_dim=32, rope=Rope()), MLP(hidden=352))
model = Decoder(ModelConfig(vocab=256, dim=128, layers=(layer,) * 4, tied=True, context=T))
for i in range(1, len(model.layers), 2):
    model.layers[i] = Routed(model.layers[i], 128)
routed = [layer for layer in model.layers if isinstance(layer, Routed)]
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)


def loss_on(source: Tensor) -> Tensor:
    """Mean cross-entropy of 8 windows of the source, in nats per byte."""
    windows = source[torch.randint(len(source) - T, (8, 1)) + torch.arange(T + 1)]
    return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


for step in range(args.steps):
    loss = loss_on(training)
    (loss + sum(layer.loss for layer in routed)).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if step % 100 == 0 or step == args.steps - 1:
        with torch.no_grad():
            top = sum(loss_on(validation).item() for _ in range(4)) / 4
            model.eval()
            causal = sum(loss_on(validation).item() for _ in range(4)) / 4
            model.train()
        print(f"step {step + 1}: training loss {loss:.3f}, validation loss {top:.3f} by top-k, {causal:.3f} by "
              f"threshold, through which {100 * routed[0].share:.0f} % of the tokens went")
