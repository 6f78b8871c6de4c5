"""What a decoder remembers between calls: keys and values for attention, a conv window and a state for a scan.

A cache is passed in and never owned by the model:   cache = Cache(config, batch=2, length=512)
                                                     logits = model(prompt, cache=cache);  model(next_token, cache=cache)

Attention with a window W needs no more than the last W keys, so its cache is a ring of W slots; without one it has
`length` slots. Either way position p of a row lives in slot p mod S. A ring of S = 4 fed positions 0 … 5:

    slot        0  1  2  3
    position    4  5  2  3        what the mask reads: order does not matter, the stored positions do

Rows may have different lengths: padding (position −1) is written to one more slot, a bin that nothing reads, so a
batch of ragged prompts needs no padding token, no left padding, and no second mechanism.

What each mixer needs is said in one place, `new_state`.

Shapes: B batch, K key/value heads, S slots, T new tokens, d head width, I scan channels, N state, k conv width.
"""

from typing import Any

import torch
from torch import Tensor

from nanollm.config import RGLRU, RWKV, Attention, FilteredAttention, Hyena, LatentAttention, Mamba, Mamba2, ModelConfig
from nanollm.errors import InputError
from nanollm.scaling import regime


class KV:
    """Keys and values of one attention layer: (B, K, S + 1, width of each); the last slot is the bin."""

    def __init__(self, batch: int, heads: int, size: int, widths: tuple[int, int], dtype: torch.dtype, device: torch.device, ring: bool = False) -> None:
        self.size, self.ring = size, ring
        self.k, self.v = (torch.zeros(batch, heads, size + 1, width, dtype=dtype, device=device) for width in widths)

    def extend(self, k: Tensor, v: Tensor, plan: "Plan") -> tuple[Tensor, Tensor]:
        """Store k, v (B, K, T, d); return all keys and values that the new queries may need (B, K, S', d)."""
        old = self.k[:, :, : plan.old], self.v[:, :, : plan.old]
        if plan.join:                                   # a chunk would overwrite keys that its own first queries need
            old = torch.cat([old[0], k], 2), torch.cat([old[1], v], 2)
        for mine, new in ((self.k, k), (self.v, v)):
            if plan.alike:                              # one index for all rows: a plain copy, several times as fast
                mine.index_copy_(2, plan.index[0], new)
            else:
                mine.scatter_(2, plan.index[:, None, :, None].expand(new.shape), new)
        if plan.join:
            return old
        return (k, v) if plan.fresh else (self.k[:, :, : plan.used], self.v[:, :, : plan.used])


class FilteredKV(KV):
    """The same, and the last token that each of two filters read, [(B, 1, channels), …]; None at the beginning."""

    tokens: list[Tensor] | None = None


class Scan:
    """What a recurrence carries on: the inputs that its convolution still needs, (B, channels, k − 1), and its state, (B, …),
    which is float32 whatever the weights are."""

    def __init__(self, batch: int, channels: int, width: int, state: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.conv = torch.zeros(batch, channels, width - 1, dtype=dtype, device=device)
        self.state = torch.zeros(batch, *state, dtype=torch.float32, device=device)


def new_state(mixer: Any, batch: int, length: int, dtype: torch.dtype, device: torch.device) -> "KV | Scan":
    """An empty state for a mixer, of sequences up to `length` tokens."""
    match mixer:
        case Attention():
            ring = mixer.window is not None and mixer.window < length
            return KV(batch, mixer.kv_heads, mixer.window if ring else length, (mixer.head_dim, mixer.head_dim), dtype, device, ring)
        case Mamba():
            return Scan(batch, mixer.inner, mixer.conv, (mixer.inner, mixer.state), dtype, device)
        case Mamba2(heads=H, head_dim=P, state=N):
            return Scan(batch, H * P + 2 * mixer.groups * N, mixer.conv, (H, P, N), dtype, device)
        case RGLRU():
            return Scan(batch, mixer.width, mixer.conv, (mixer.width,), dtype, device)
        case RWKV(width=D):
            return Scan(batch, 2 * D, 2, (3, D), dtype, device)       # the last input of two token shifts
        case LatentAttention():                         # one head: the latent and the rotated key, side by side as one key
            return KV(batch, 1, length, (mixer.kv_rank + mixer.rope_dim, 0), dtype, device)
        case FilteredAttention(attention=inner):
            return FilteredKV(batch, inner.kv_heads, length, (inner.head_dim, inner.head_dim), dtype, device)
        case Hyena(inner=I):                            # complex numbers as pairs
            return Scan(batch, 3 * I, mixer.conv, (I, mixer.state, 2), dtype, device)
    raise AssertionError(f"new_state does not know what {type(mixer).__name__} remembers")


class Plan:
    """Where one call writes in a cache of S slots and what it reads, worked out once for all layers of that size."""

    def __init__(self, held: Tensor, positions: Tensor, ring: bool, alike: bool, filled: int, longest: int) -> None:
        """held (B, S + 1): position in each slot before the call, −1 if none. alike: all rows have the same positions.
        filled, longest: tokens of the longest row before and after the call."""
        self.size = size = held.shape[1] - 1
        self.ring, chunk = ring, positions.shape[1]
        self.alike = alike
        self.fresh = filled == 0
        self.join = ring and chunk > 1 and not self.fresh
        self.old, self.used = min(filled, size), min(longest, size)
        last = positions.amax(1, keepdim=True)
        self.index = torch.where((positions >= 0) & (positions > last - size), positions % size, size)      # (B, T)
        joined = torch.cat([held[:, : self.old], positions], 1) if self.join else None
        held.scatter_(1, self.index, positions)
        held[:, size] = -1
        self.key_positions = joined if self.join else positions if self.fresh else held[:, : self.used]


class Cache:
    """The memory of a batch of sequences, one state a layer.

    length: the longest sequence that layers without a window can hold. dtype: that of the model's activations.
    """

    def __init__(self, config: ModelConfig, batch: int, length: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> None:
        self.config, self.batch, self.length = config, batch, length
        self.dtype, self.device = dtype, torch.device(device)
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)      # tokens of each row so far
        self.ragged = False                                                     # positions were given: rows may differ
        self.history: list[tuple[Tensor, Tensor]] = []                          # tokens and positions, kept if there are:
        ropes = {getattr(layer.mixer, "rope", None) for layer in config.layers}
        self.ropes = [rope for rope in ropes if regime(rope, self.lengths) is not None]
        self.empty()
        self.endless = all(not isinstance(state, KV) or state.ring for state in self.states)

    def empty(self) -> None:
        """Fresh states for all layers."""
        self.states = [new_state(layer.mixer, self.batch, self.length, self.dtype, self.device) for layer in self.config.layers]
        self.held: dict[int, Tensor] = {}                                       # slots → the position in each (B, S + 1)
        self.longest = 0                                                        # tokens of the longest row in the states

    def advance(self, tokens: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        """Take note of new tokens (B, T); return what must be fed now, tokens and positions.

        That is the new ones, except where RoPE's angles follow the length of the sequence and the new tokens change
        them. Then all that is remembered was computed with other angles: the cache empties itself and hands the whole
        sequence back, so the result is that of one full forward pass. LongRoPE pays this once, dynamic NTK at each
        step past its original context. Raises InputError where the positions do not continue the rows, or do not fit.
        """
        if tokens.shape[0] != self.batch:
            raise InputError(f"the cache was made for a batch of {self.batch}, the tokens have {tokens.shape[0]} rows")
        before, ragged = self.lengths, self.ragged or positions is not None
        if positions is None:
            positions = before[:, None] + torch.arange(tokens.shape[1], device=self.device)
            after, longest = before + tokens.shape[1], self.longest + tokens.shape[1]
        else:
            real = positions >= 0
            count = real.cumsum(1)
            broken = real[:, 1:] & ~real[:, :-1] & (count[:, 1:] > 1)           # padding with real tokens on both sides
            if bool((real & (positions != before[:, None] + count - 1)).any() | broken.any()):
                raise InputError("with a cache, the positions of a row go on by one from where it stopped; -1 is padding, before or behind them")
            after = before + real.sum(1)
            longest = int(after.max())
        rows = self.config.positions
        if rows is not None and longest > rows:
            raise InputError(f"the model has {rows} positions, from 0 to {rows - 1}; position {longest - 1} was fed")
        if longest > self.length and not self.endless:
            raise InputError(f"the cache holds {self.length} positions, position {longest - 1} was fed; make it with a larger length")
        if self.ropes:
            self.history.append((tokens, positions))
            if any(bool(((regime(r, before) != regime(r, after)) & (before > 0)).any()) for r in self.ropes):
                tokens, positions = (torch.cat(parts, 1) for parts in zip(*self.history))
                self.empty()
        self.filled, self.longest, self.lengths, self.ragged = self.longest, longest, after, ragged
        return tokens, positions

    def plan(self, state: KV, positions: Tensor) -> Plan:
        """Called once a forward pass for each distinct number of slots."""
        if state.size not in self.held:
            self.held[state.size] = torch.full((self.batch, state.size + 1), -1, device=self.device)
        return Plan(self.held[state.size], positions, state.ring, not self.ragged, self.filled, self.longest)
