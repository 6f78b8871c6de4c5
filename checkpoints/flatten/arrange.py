"""How stored tensors become parameters, for a flattened file: one function for each operation of a table of names.

Each takes the stored tensors of a rule and its parameters, of which the shapes count, and gives the values of these.
Numbers in capitals are those of the layer's config. The operations are in names/ops.py, names/expert_ops.py and the
families that have one of their own; there `pieces` serves both directions, here it is one.

Shapes: E experts, F feed-forward width, D model width, H query heads, K key/value heads, d head width.
"""

import torch
from torch import Tensor

Tensors = list[Tensor]
KV_HEADS = HEADS = HEAD_DIM = KEY_HEADS = KEY_DIM = 1           # stand for constants of the file


def stack(stored: Tensors, ours: Tensors) -> Tensors:
    """A tensor an expert, side by side."""
    return [torch.stack(stored)]


def blocks(stored: Tensors, ours: Tensors) -> Tensors:
    """The rows of several parameters, one block under another."""
    return list(stored[0].split([len(one) for one in ours]))


def groups(stored: Tensors, ours: Tensors) -> Tensors:
    """The rows of q, k and v by key/value head: the queries that read it, its key, its value."""
    parts = stored[0].unflatten(0, (KV_HEADS, -1)).split([len(one) // KV_HEADS for one in ours], 1)
    return [part.flatten(0, 1) for part in parts]


def transposed(stored: Tensors, ours: Tensors) -> Tensors:
    """Matrices stored as (in, out), several side by side."""
    return list((stored[0].T if stored[0].ndim == 2 else stored[0]).split([len(one) for one in ours]))


def interleaving(stored: Tensors, ours: Tensors) -> Tensors:
    """Pairs of rows that turn together; here they are the halves of a head."""
    return [stored[0].unflatten(0, (-1, HEAD_DIM // 2, 2)).transpose(1, 2).flatten(0, 2)]


def halving(stored: Tensors, ours: Tensors) -> Tensors:
    """The halves of a head turn together; here they are pairs of rows."""
    return [stored[0].unflatten(0, (-1, 2, HEAD_DIM // 2)).transpose(1, 2).flatten(0, 2)]


def other_half(stored: Tensors, ours: Tensors) -> Tensors:
    """The second half of each head comes first."""
    return [stored[0].unflatten(0, (-1, 2, HEAD_DIM // 2)).flip(1).flatten(0, 2)]


def gate_up(stored: Tensors, ours: Tensors) -> Tensors:
    """The rows of gate above those of up, in each expert (E, 2F, D)."""
    return list(stored[0].chunk(2, 1))


def interleaved(stored: Tensors, ours: Tensors) -> Tensors:
    """Columns gate up gate up …, (E, D, 2F); of biases the numbers (E, 2F)."""
    parts = stored[0][..., 0::2], stored[0][..., 1::2]
    return [part.mT if part.ndim == 3 else part for part in parts]


def turned_gate_up(stored: Tensors, ours: Tensors) -> Tensors:
    """The columns of gate left of those of up, in each expert (E, D, 2F)."""
    return [part.mT for part in stored[0].chunk(2, -1)]


def turned(stored: Tensors, ours: Tensors) -> Tensors:
    """Each expert's matrix transposed."""
    return [stored[0].mT]


def piled(stored: Tensors, ours: Tensors) -> Tensors:
    """The rows of all experts, one under another (E·F, D)."""
    return [stored[0].view(ours[0].shape)]


def piled_turned(stored: Tensors, ours: Tensors) -> Tensors:
    """The same of each expert's matrix transposed."""
    return [stored[0].view(ours[0].mT.shape).mT]


def leading(stored: Tensors, ours: Tensors) -> Tensors:
    """A vector stored as a matrix of one row."""
    return [stored[0][0]]


def pairs(stored: Tensors, ours: Tensors) -> Tensors:
    """The rows of q and k by turns, a head at a time, over two tensors."""
    both = torch.cat(stored).unflatten(0, (HEADS, 2, -1))
    return [both[:, 0].flatten(0, 1), both[:, 1].flatten(0, 1)]


def quarters(stored: Tensors, ours: Tensors) -> Tensors:
    """Four blocks, each with a quarter of the rows of every parameter."""
    parts = stored[0].unflatten(0, (4, -1)).split([len(one) // 4 for one in ours], 1)
    return [part.flatten(0, 1) for part in parts]


def numbers(stored: Tensors, ours: Tensors) -> Tensors:
    """The numbers of one parameter, a tensor each."""
    return [torch.cat([one.view(1) for one in stored])]


def apart(stored: Tensors, ours: Tensors) -> Tensors:
    """The rows of one parameter, in several tensors."""
    return [torch.cat(stored)]


def by_key_heads(stored: Tensors, ours: Tensors) -> Tensors:
    """The first key head's rows of each parameter, then the second's, …"""
    parts = stored[0].unflatten(0, (KEY_HEADS, -1)).split([len(one) // KEY_HEADS for one in ours], 1)
    return [part.flatten(0, 1) for part in parts]


def by_query_heads(stored: Tensors, ours: Tensors) -> Tensors:
    """The first query head's rows of each parameter, then the second's, …"""
    parts = stored[0].unflatten(0, (HEADS, -1)).split([len(one) // HEADS for one in ours], 1)
    return [part.flatten(0, 1) for part in parts]


def qkvz(stored: Tensors, ours: Tensors) -> Tensors:
    """The first key head's rows of q, k, v and z, then the second's, …; q, k and v are one parameter here."""
    values = len(ours[1]) // KEY_HEADS
    q, k, v, z = stored[0].unflatten(0, (KEY_HEADS, -1)).split([KEY_DIM, KEY_DIM, values, values], 1)
    return [torch.cat([part.flatten(0, 1) for part in (q, k, v)]), z.flatten(0, 1)]


def alternating(stored: Tensors, ours: Tensors) -> Tensors:
    """The rows of a channel and of its gate by turns; here all of the one, then all of the other."""
    return [stored[0].unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1)]


def slices(stored: Tensors, ours: Tensors) -> Tensors:
    """A slice a head (H, I/H, …); here the rows of one parameter (I, …)."""
    return [stored[0].flatten(0, 1)]
