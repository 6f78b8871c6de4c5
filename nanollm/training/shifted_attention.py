"""LongLoRA's S²-attention: attention inside groups while a model is tuned on long rows, and full attention afterwards.

    first half of the heads      groups of G tokens            │ 0 1 2 3 │ 4 5 6 7 │ 8 9 10 11 │            G = 4
    second half                  the same, shifted by G/2      │ 0 1 │ 2 3 4 5 │ 6 7 8 9 │ 10 11 │

    token i sees token j ≤ i   iff   ⌊(i + s)/G⌋ = ⌊(j + s)/G⌋,     s = 0, or G/2 in the second half

                                             Chen et al. 2023 (arXiv 2309.12307) §3.2, Figure 3, Algorithm 1

A group hands on what it knows through the shifted heads of the next layer. The cost is T·G in place of T². A shift by
roll brings the last G/2 tokens and the first G/2 into one group; the first would see the future. The paper leaves that
to the mask ("information leakage … easy to prevent via a small modification on the attention mask"); here it is
prevented, so a row begins and ends with half a group. A row of at most G tokens is one group, and gets plain attention.

Each group is a row of its own to mask.py: positions and documents count as they do in the whole row.

Shapes: B batch, T tokens, H query heads, K key/value heads, G tokens of a group, d head width.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from nanollm.errors import InputError
from nanollm.layers.attention import Attention, attend, attend_plainly
from nanollm.layers.forward_context import ForwardContext
from nanollm.layers.mask import AttentionMask
from nanollm.layers.state import KVCache
from nanollm.model import Decoder


def shift_attention(model: Decoder, group: int, context: int) -> None:
    """Replace the forward pass of every attention, in train mode, by that inside groups of `group` tokens.

    Raises InputError for a mixer that is no plain attention, and for groups that do not divide the context.
    """
    if group % 2 or context % group:
        raise InputError(f"--shift-attention {group}: expected an even number that divides --context {context}")
    for number, layer in enumerate(model.layers):
        mixer = layer.mixer
        where = f"--shift-attention: layers.{number}.mixer is"
        if type(mixer) is not Attention:
            raise InputError(f"{where} {type(mixer).__name__}; only plain attention can be cut into groups")
        if mixer.config.heads % 2:
            raise InputError(f"{where} attention with {mixer.config.heads} heads; half of an even number is shifted")
        if mixer.config.alibi is not None:
            raise InputError(f"{where} attention with ALiBi, whose penalties belong to all heads together")
        mixer.forward = partial(grouped_forward, mixer, mixer.forward, group)  # type: ignore[method-assign]


def grouped_forward(mixer: Attention, plain: Any, group: int, x: Tensor, ctx: ForwardContext,
                    state: KVCache | None = None) -> Tensor:
    """x (B, T, D) → (B, T, D): in groups while the mixer is in train mode, else `plain`, its own forward pass."""
    if not mixer.training or state is not None or x.shape[1] <= group:
        return plain(x, ctx, state)
    q, k, v = mixer.placed(*mixer.project(x), ctx)
    if k.shape[1] % 2:                                      # key/value heads that both halves would share
        k, v = (z.repeat_interleave(q.shape[1] // z.shape[1], 1) for z in (k, v))
    halves = zip(q.chunk(2, 1), k.chunk(2, 1), v.chunk(2, 1), (0, group // 2), halves_of(mixer.sinks), strict=True)
    mixed = [in_groups(mixer, ctx, group, *half) for half in halves]
    return mixer.o(torch.cat(mixed, 1).transpose(1, 2).flatten(-2))


def halves_of(sinks: Tensor | None) -> tuple[Tensor | None, ...]:
    """The sinks of either half of the heads."""
    return (None, None) if sinks is None else sinks.chunk(2)


def in_groups(mixer: Attention, ctx: ForwardContext, group: int, q: Tensor, k: Tensor, v: Tensor, by: int,
              sinks: Tensor | None) -> Tensor:
    """Attention of some heads inside groups that begin `by` tokens later: q (B, h, T, d) → (B, h, T, d)."""
    def cut(z: Tensor) -> Tensor:                           # (B, h, T, d) → (B·T/G, h, G, d)
        return z.roll(-by, 2).unflatten(2, (-1, group)).transpose(1, 2).flatten(0, 1)

    config = mixer.config
    own = ctx.once(("groups", group, by), lambda: groups_of(ctx, group, by))
    mask = AttentionMask(own, None, config.window)
    if sinks is None:
        mixed = attend(cut(q), cut(k), cut(v), mask, mixer.scale, config.softcap)
    else:
        mixed = attend_plainly(cut(q), cut(k), cut(v), mask.dense, mixer.scale, sinks=sinks)
    return mixed.unflatten(0, (len(q), -1)).transpose(1, 2).flatten(2, 3).roll(by, 2)


def groups_of(ctx: ForwardContext, group: int, by: int) -> ForwardContext:
    """The groups as rows. In the last shifted one the first tokens of the row stand behind the last: their positions
    begin at 0 again, so to the mask they are another document."""
    if ctx.regular and not by:                              # in every group the same, causal mask
        positions = torch.arange(group, device=ctx.positions.device)
        return ForwardContext(positions.expand(ctx.positions.numel() // group, group), True, ctx.dtype)
    return ForwardContext(ctx.positions.roll(-by, 1).unflatten(1, (-1, group)).flatten(0, 1), False, ctx.dtype)
