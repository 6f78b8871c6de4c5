"""How long a chat may be, where nobody says: as long as the model was trained for, if its cache is not too large.
How long the session of one answer is, where the model has a table of positions.

    Llama-3.1-8B     128 KiB of keys and values a token in bfloat16    8,192 of its 131,072 tokens
    SmolLM2-135M      22.5 KiB a token                                 all 2,048
    GPT-2             36 KiB a token                                   all 1,024
"""

import bisect
import itertools

import torch

from nanollm.cache import Cache
from nanollm.config import ModelConfig
from nanollm.config.positions import places

MEMORY = 1 << 30        # bytes of the cache
UNKNOWN = 4096          # tokens, where config.json does not say what the model was trained for


def cache_bytes(config: ModelConfig, length: int, dtype: torch.dtype, rows: int = 1) -> int:
    """The memory of the cache of one conversation, or of a batch of so many rows; nothing is allocated."""
    states = Cache(config, rows, length, dtype, "meta").states
    held = itertools.chain.from_iterable(vars(state).values() for state in states)
    return sum(each.numel() * each.element_size() for each in held if isinstance(each, torch.Tensor))


def own_context(config: ModelConfig) -> int | None:
    """The positions that the model was trained for, or has a table of; None where config.json names neither."""
    return min((size for size in (config.context, places(config.positions)) if size is not None), default=None)


def default_context(config: ModelConfig, dtype: torch.dtype) -> int:
    """The model's own context, or as much of it as MEMORY holds; at least 2 tokens."""
    own = own_context(config) or UNKNOWN
    if cache_bytes(config, own, dtype) <= MEMORY:
        return own
    return longest_within(MEMORY, config, dtype, own)


def longest_within(memory: int, config: ModelConfig, dtype: torch.dtype, most: int, rows: int = 1) -> int:
    """The longest cache, of 2 to `most` tokens a row, that takes no more memory than this; 2 where none does."""
    lengths = range(2, most + 1)
    fitting = bisect.bisect(lengths, memory, key=lambda length: cache_bytes(config, length, dtype, rows))
    return lengths[max(0, fitting - 1)]


def session_length(config: ModelConfig, prompt: int, new: int) -> int:
    """Of a session for one answer: the prompt's tokens and the new ones, where a table of positions has room for all.

    A prompt that is itself too long gets no less than it asks for, and `Session` says what is wrong with that.
    """
    whole = prompt + new
    most = places(config.positions)
    if most is None or prompt > most:
        return whole
    return min(whole, most + 1)              # the last new token is never read


def past_context(config: ModelConfig, tokens: int) -> str | None:
    """What to say where so many tokens are more than the model was trained for."""
    own = own_context(config)
    if own is None or tokens <= own:
        return None
    return f"{tokens:,} tokens are more than the {own:,} that the model was trained for: its answers get worse"
