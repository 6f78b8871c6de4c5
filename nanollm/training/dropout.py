"""Dropout: while a model is trained, each number of the residual stream's inputs is 0 with probability p.

    drop(x) = m · x / (1 − p)        m = 0 with probability p, else 1          Srivastava et al. 2014

    x = drop(embedding)              what the first layer reads
    x + drop(mixer(…)),  x + drop(ffn(…))      what every layer adds

    drop(softmax(scale · Q Kᵀ + mask)) V       with --attention-dropout, of plain attention

These are the places of embd_pdrop and resid_pdrop of GPT-2 (Vaswani et al. 2017, §5.4), and of its attn_pdrop, which
Llama and others call attention_dropout. Wrapped around a model from outside, so the decoder knows nothing of it; in
eval mode nothing is dropped. Attention with dropout is PyTorch's fused operation, and no kernel of ours.

The masks of a micro-batch follow from its place in the run (phase.py), so a checkpoint keeps nothing of them. Another
number of ranks or another micro-batch draws other masks.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from nanollm.block import Block
from nanollm.errors import InputError
from nanollm.layers.attention import Attention
from nanollm.layers.forward_context import ForwardContext
from nanollm.layers.mask import CAUSAL
from nanollm.layers.state import KVCache
from nanollm.model import Decoder


def add_dropout(model: Decoder, p: float) -> None:
    """Wrap the model, in place, before anything else wraps its layers."""
    def dropped(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward_and_drop(*args: Any, **named: Any) -> Tensor:
            return F.dropout(forward(*args, **named), p, model.training)
        return forward_and_drop

    model.embedded = dropped(model.embedded)                        # type: ignore[method-assign]
    for layer in model.layers:
        assert isinstance(layer, Block)
        for part in (layer.post_mixer or layer.mixer, layer.post_ffn or layer.ffn):
            if part is not None:
                part.forward = dropped(part.forward)                # type: ignore[method-assign]


def add_attention_dropout(model: Decoder, p: float) -> None:
    """Replace what every attention reads, in train mode, by that through probabilities of which some are 0, in place.

    Raises InputError for a mixer that is no plain attention, and for what the fused operation does not have."""
    for number, layer in enumerate(model.layers):
        mixer = layer.mixer
        where = f"--attention-dropout: layers.{number}.mixer is"
        if type(mixer) is not Attention:
            raise InputError(f"{where} {type(mixer).__name__}; only plain attention has probabilities to drop")
        if mixer.sinks is not None or mixer.config.softcap is not None:
            raise InputError(f"{where} attention with sinks or a soft cap, which PyTorch's fused one does not have")
        mixer.mixed = partial(attend_and_drop, mixer, mixer.mixed, p)           # type: ignore[method-assign]


def attend_and_drop(mixer: Attention, plain: Callable[..., Tensor], p: float, q: Tensor, k: Tensor, v: Tensor,
                    ctx: ForwardContext, state: KVCache | None = None) -> Tensor:
    """q (B, H, T, d), k and v (B, K, T, d) → what the heads have read (B, T, H·d)."""
    if not mixer.training or state is not None:
        return plain(q, k, v, ctx, state)
    q, k, v = mixer.placed(q, k, v, ctx)
    mask = mixer.mask(ctx, None).dense
    given = mask if isinstance(mask, Tensor) else None
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=given, dropout_p=p, is_causal=mask is CAUSAL,
                                           scale=mixer.scale, enable_gqa=q.shape[1] != k.shape[1])
    return mixed.transpose(1, 2).flatten(-2)
