"""What a decoder remembers between calls: one state a layer (layers/state.py), and the length of each row.

A cache is passed in and never owned by the model:

    cache = Cache(config, batch=2, length=512)
    logits = model(prompt, cache=cache);  logits = model(next_token, cache=cache)

What each mixer needs is said by its module, `new_state`.

Shapes: B batch, S slots, T new tokens.
"""

import torch
from torch import Tensor

from nanollm.config import ModelConfig
from nanollm.config.positions import places
from nanollm.errors import InputError
from nanollm.layers import MODULES
from nanollm.layers.scaling import length_key
from nanollm.layers.state import KVCache, SlotMapping


class Cache:
    """The memory of a batch of sequences, one state a layer.

    length: the longest sequence that layers without a window can hold. dtype: that of the model's activations.
    """

    def __init__(self, config: ModelConfig, batch: int, length: int, dtype: torch.dtype = torch.float32,
                 device: torch.device | str = "cpu") -> None:
        self.config, self.batch, self.length = config, batch, length
        self.dtype, self.device = dtype, torch.device(device)
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)      # tokens of each row so far
        self.ragged = False                                                     # positions were given: rows may differ
        self.history: list[tuple[Tensor, Tensor]] = []                          # all tokens and positions, for `ropes`
        ropes = {getattr(layer.mixer, "rope", None) for layer in config.layers}
        self.ropes = [rope for rope in ropes if length_key(rope, self.lengths) is not None]
        self.empty()
        self.endless = all(not isinstance(state, KVCache) or state.ring for state in self.states)

    def empty(self) -> None:
        """Fresh states for all layers."""
        shape = self.batch, self.length, self.dtype, self.device
        self.states = [MODULES[type(layer.mixer)].new_state(layer.mixer, *shape) for layer in self.config.layers]
        self.held: dict[int, Tensor] = {}                                       # S → position in each slot (B, S + 1)
        self.longest = 0                                                        # tokens of the longest row so far

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
                raise InputError("with a cache, the positions of a row go on by one from where it stopped; "
                                 "-1 is padding, before or behind them")
            after = before + real.sum(1)
            longest = int(after.max())
        self.check_room(longest)
        if self.ropes:
            self.history.append((tokens, positions))
            if any(bool(((length_key(r, before) != length_key(r, after)) & (before > 0)).any()) for r in self.ropes):
                tokens, positions = (torch.cat(parts, 1) for parts in zip(*self.history, strict=True))
                self.empty()
        self.filled, self.longest, self.lengths, self.ragged = self.longest, longest, after, ragged
        return tokens, positions

    def check_room(self, longest: int) -> None:
        """Raise InputError where a row of so many tokens does not fit."""
        rows = places(self.config.positions)
        if rows is not None and longest > rows:
            raise InputError(f"the model has {rows} positions, from 0 to {rows - 1}; position {longest - 1} was fed")
        if longest > self.length and not self.endless:
            raise InputError(f"the cache holds {self.length} positions, position {longest - 1} was fed; "
                             "make it with a larger length")

    def slots(self, state: KVCache, positions: Tensor) -> SlotMapping:
        """Called once a forward pass for each distinct number of slots."""
        if state.size not in self.held:
            self.held[state.size] = torch.full((self.batch, state.size + 1), -1, device=self.device)
        return SlotMapping(self.held[state.size], positions, state.ring, not self.ragged, self.filled, self.longest)
