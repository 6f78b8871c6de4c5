"""One layer: a mixer and a feed-forward, each adding to the residual stream.

    sequential                                       parallel
    x ─┬─ pre_mixer ─ mixer ─ post_mixer ─ + ─┐      x ─┬─ pre_mixer ─ mixer ─ post_mixer ─┐
       └───────────────────────────────────┘  │        ├─ pre_ffn ── ffn ─── post_ffn ────+─ + ─→
    ┌─────────────────────────────────────────┘        └──────────────────────────────────────┘
    └─┬─ pre_ffn ── ffn ─── post_ffn ──── + ─→
      └───────────────────────────────────┘

    pre only      Llama, Mistral, Qwen, Mamba (no ffn), Nemotron-H (one of both)    Xiong et al. 2020, arXiv 2002.04745
    pre and post  Gemma-2                                    post only   OLMo-2
    parallel      GPT-NeoX with two norms; with one (Phi), pre_ffn is None and the ffn reads what the mixer reads
    scaled        Granite: both branches times residual_scale before they are added
    end           Gemma 4: the stream goes through layers/layer_end.py at last

Shapes: B batch, T tokens, D model width.
"""

from torch import Tensor, nn

from nanollm import config as c
from nanollm.layers import MODULES
from nanollm.layers.forward_context import ForwardContext
from nanollm.layers.layer_end import LayerEnd
from nanollm.layers.norm import build_norm, normed
from nanollm.layers.state import State


class Block(nn.Module):
    """The wiring above; absent parts are None and have no parameters."""

    def __init__(self, config: c.Layer, dim: int) -> None:
        super().__init__()
        self.parallel, self.scale = config.parallel, config.residual_scale
        self.pre_mixer = build_norm(config.pre_mixer, dim)
        self.mixer = None if config.mixer is None else MODULES[type(config.mixer)](config.mixer, dim)
        self.post_mixer = build_norm(config.post_mixer, dim)
        self.pre_ffn = build_norm(config.pre_ffn, dim)
        self.ffn = None if config.ffn is None else MODULES[type(config.ffn)](config.ffn, dim)
        self.post_ffn = build_norm(config.post_ffn, dim)
        self.end = None if config.end is None else LayerEnd(config.end, dim)

    def forward(self, x: Tensor, ctx: ForwardContext, state: State | None = None) -> Tensor:
        """x (B, T, D) → (B, T, D)."""
        # .to(ctx.dtype) does nothing, except where the stream x is kept in float32 and the parts are narrower (Mamba)
        if self.mixer is None:
            assert self.ffn is not None
            return x + self.scaled(normed(self.post_ffn, self.ffn(normed(self.pre_ffn, x).to(ctx.dtype))))
        h = normed(self.pre_mixer, x).to(ctx.dtype)
        mixed = self.scaled(normed(self.post_mixer, self.mixer(h, ctx, state)))
        if self.ffn is None:
            return x + mixed
        if self.parallel:
            h = h if self.pre_ffn is None else self.pre_ffn(x)
        elif self.pre_ffn is None:
            x = h = x + mixed
        else:
            x, h = self.pre_ffn.add(x, mixed)
        out = self.scaled(normed(self.post_ffn, self.ffn(h.to(ctx.dtype))))
        x = x + out if not self.parallel else x + mixed + out
        return x if self.end is None else self.end(x, ctx)

    def scaled(self, branch: Tensor) -> Tensor:
        """What a branch adds to the stream."""
        return branch if self.scale == 1 else branch * self.scale
