"""One decode step whose shapes and addresses never change: it can be captured once and replayed, or compiled once.

`feed` reads as many slots of the cache as are filled. That is a Python number, and another one at each step. Here one
token a row runs over all slots, and what is not filled is masked:

    slot          0  1  2  3  4 …  S−1                  position 2 of a row of S slots
    holds         0  1  2  ·  ·      ·                  · is position −1: no query sees it
    mask          x  x  x  .  .      .                  the kernel reads first = 0, last = 2 on the device, and no more

    step = StaticStep(model, cache)                     after a prompt was fed to this cache
    logits = step(tokens)                               (B, 1) → (B, V), as feed(model, tokens, None, cache)
    logits = step(tokens, positions)                    rows of their own length; −1 is padding

Steps and calls of `feed` may alternate: both leave the cache as the other expects it.

What lies where. Keys, values and the positions in slots (`held`) are written in place anyway. What a layer replaces at
each call (the state of a scan, the window of a convolution), and the length of each row, is copied back into a buffer
of its own at the end of a step, so that the next step finds it at the same address.

Shapes: B batch, T = 1 new token, S slots, V vocabulary.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from nanollm.cache import Cache
from nanollm.errors import InputError
from nanollm.layers.state import KVCache, SlotMapping, State
from nanollm.model import Decoder


class AllSlots(SlotMapping):
    """Every slot is read, whether it is filled or not."""
    full = False

    def __init__(self, held: Tensor, positions: Tensor, ring: bool, alike: bool) -> None:
        size = held.shape[1] - 1
        super().__init__(held, positions, ring, alike, filled=size, longest=size)


class StaticCache(Cache):
    """What a model asks of a cache, answered by the device alone. It shares the states of the cache that it is made of.

    lengths (B,): tokens of each row; of rows that are alike (not ragged) before the step, which adds the new one.
    """

    def __init__(self, cache: Cache, lengths: Tensor, ragged: bool) -> None:
        self.states, self.held, self.lengths, self.ragged = cache.states, cache.held, lengths, ragged

    def advance(self, tokens: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        """Tokens and positions (B, 1)."""
        if positions is None:
            positions = self.lengths[:, None].clone()
            self.lengths += 1
        return tokens, positions

    def slots(self, state: KVCache, positions: Tensor) -> SlotMapping:
        """All of them."""
        return AllSlots(self.held[state.size], positions, state.ring, not self.ragged)


class StaticStep:
    """The step of the head of the file, run operation by operation. graphed.py captures it."""

    def __init__(self, model: Decoder, cache: Cache) -> None:
        """Raises InputError where there can be none, with the reason of `refuses`."""
        if reason := refuses(cache):
            raise InputError(f"no static decode step: {reason}")
        self.model, self.cache = model, cache
        with torch.inference_mode():
            self.tokens = torch.zeros(cache.batch, 1, dtype=torch.long, device=cache.device)
            self.positions = torch.zeros_like(self.tokens)
            self.lengths = cache.lengths.clone()
            owned = [(state, name) for state in cache.states for name in replaced(state)]
            self.buffers = [(cache, "lengths", [self.lengths])]
            self.buffers += [(state, name, [x.clone() for x in tensors(state, name)]) for state, name in owned]

    @torch.inference_mode()
    def __call__(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Logits (B, V) of tokens (B, 1). positions (B, 1): where rows have lengths of their own; −1 is padding.

        The next step may overwrite the logits. Raises InputError where `Cache.advance` would.
        """
        cache = self.cache
        if tokens.shape != self.tokens.shape:
            raise InputError(f"tokens have shape {tuple(tokens.shape)}, this step takes {tuple(self.tokens.shape)}")
        ragged = cache.ragged or positions is not None
        if ragged:
            tokens, positions = cache.advance(tokens, positions)
            self.positions.copy_(positions)
        else:
            cache.check_room(cache.longest + 1)
            cache.filled, cache.longest = cache.longest, cache.longest + 1
        self.tokens.copy_(tokens)
        self.settle()                                           # what `feed` has replaced since the last step
        return self.run(ragged)

    def run(self, ragged: bool) -> Tensor:
        """The step itself, on what lies in the buffers."""
        return self.body(ragged)

    def body(self, ragged: bool) -> Tensor:
        """Nothing here depends on a number that only the device knows. Logits (B, V)."""
        static = StaticCache(self.cache, self.lengths, ragged)
        hidden = self.model.hidden(self.tokens, self.positions if ragged else None, static)     # (B, 1, D)
        logits = self.model.head(hidden[:, -1])
        self.settle()
        return logits

    def settle(self) -> None:
        """Bring what was replaced back into the buffers."""
        for owner, name, buffers in self.buffers:
            for buffer, tensor in zip(buffers, tensors(owner, name), strict=True):
                if tensor is not buffer:
                    buffer.copy_(tensor)
        self.attach()

    def attach(self) -> None:
        """Make the buffers what the cache and its states have."""
        for owner, name, buffers in self.buffers:
            setattr(owner, name, buffers if isinstance(getattr(owner, name), list) else buffers[0])


def refuses(cache: Cache) -> str | None:
    """Why there is no static step over this cache; None: there is one."""
    if cache.longest == 0:
        return "the cache is empty; feed it a prompt first"
    if cache.ropes:
        return "the angles of RoPE follow the length of the sequence, and may change for all tokens at any step"
    return None


def replaced(state: State) -> Iterator[str]:
    """The attributes of a state that a call replaces; keys and values are written in place."""
    for name in vars(state):
        if tensors(state, name) and not (isinstance(state, KVCache) and name in ("k", "v")):
            yield name


def tensors(owner: object, name: str) -> list[Tensor]:
    """An attribute that is a tensor, or a list of them; nothing where it is neither."""
    value = getattr(owner, name)
    found = value if isinstance(value, list) else [value]
    return found if all(isinstance(x, Tensor) for x in found) else []
