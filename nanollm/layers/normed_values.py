"""Attention whose values are normalised as queries and keys are, and may be made of the keys.

    q = rotate(norm(W_q x)),   k = rotate(norm(W_k x)),   v = norm(W_v x)       v's norm has no gain
    v = norm(W_k x)                                                             where the values are the keys

With q and k of one length, scores need no 1/√d: the gains of their norms are the scale (Henry et al. 2020, arXiv
2010.04245). Where W_v is left out, k and v are one product, of which k has a gain and turns with the position, and v
does neither; each is cached by itself. Gemma 4, 2026: the latter in layers without a window.

Shapes: B batch, T tokens, D model width, H query heads, K key/value heads, d head width.
"""

from torch import Tensor

from nanollm.config import NormedValueAttention as NormedValueAttentionConfig
from nanollm.layers.attention import Attention, attend
from nanollm.layers.forward_context import ForwardContext
from nanollm.layers.norm import build_norm, normed
from nanollm.layers.state import KVCache


class NormedValueAttention(Attention):
    """The mixer at the head of the file."""
    WORDS = Attention.WORDS | {
        "value_norm": "of values: {}",
        "values_are_keys": "values are the keys before their norm and rotation",
        "kept": "later layers read its keys and values",
    }

    def __init__(self, config: NormedValueAttentionConfig, dim: int) -> None:
        super().__init__(config, dim)
        self.v_norm = build_norm(config.value_norm, config.head_dim)
        self.kept = self.HANDS_ON = config.kept                 # layers above read what it leaves
        if config.values_are_keys:
            self.v = None  # type: ignore[assignment]

    def mixed(self, q: Tensor, k: Tensor, v: Tensor, ctx: ForwardContext, state: KVCache | None) -> Tensor:
        """As Attention.mixed; where the config says so, keys and values are left for layers above (cross_layer.py)."""
        q, k, v = self.placed(q, k, v, ctx)
        slots = None
        if state is not None:
            slots = ctx.slots(state)
            k, v = state.extend(k, v, slots)
        if self.kept:
            ctx.kept[self.config.window] = k, v, slots
        return attend(q, k, v, self.mask(ctx, slots), self.scale, self.config.softcap).transpose(1, 2).flatten(-2)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, D) → q (B, H, T, d), k and v (B, K, T, d), normalised."""
        d = self.config.head_dim
        q, k = self.q(x).unflatten(-1, (-1, d)), self.k(x).unflatten(-1, (-1, d))       # (B, T, H or K, d)
        v = self.v_norm(k if self.v is None else self.v(x).unflatten(-1, (-1, d)))
        return normed(self.q_norm, q).transpose(1, 2), normed(self.k_norm, k).transpose(1, 2), v.transpose(1, 2)

    @staticmethod
    def multiply_adds(  # type: ignore[override]  # of its own config
        config: NormedValueAttentionConfig, dim: int, context: int
    ) -> int:
        saved = dim * config.kv_heads * config.head_dim if config.values_are_keys else 0
        return Attention.multiply_adds(config, dim, context) - saved
