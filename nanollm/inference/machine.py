"""What the machine has: the device, and the memory that is free on it.

    --context N          a cache that does not fit is refused, before the weights are read and again once they are there
    --max-new-tokens N   often means "no limit": what does not fit becomes what 1 GiB holds, which is said

Linux tells the memory that is free (of the machine, and of the container), CUDA that of a GPU; elsewhere nothing is
known, and nothing is refused.
"""

from dataclasses import replace
from pathlib import Path

import torch

from nanollm.config import ModelConfig
from nanollm.errors import InputError
from nanollm.inference.context import MEMORY, cache_bytes, longest_within, session_length
from nanollm.inference.request import Request
from nanollm.inference.terminal import note
from nanollm.model import Decoder

MEMINFO, GROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def device(name: str) -> torch.device:
    """Raises InputError where this machine, or this build of torch, has none of that name, or it computes nothing."""
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"--device {name}: torch {torch.__version__} finds no GPU that it can use; --device cpu runs "
                         "without")
    try:
        found = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:       # torch's word for a build without CUDA is an AssertionError
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from None
    if found.type == "meta":
        raise InputError("--device meta: it computes nothing")
    return found


def free_memory(place: torch.device) -> int | None:
    """Bytes that can be had without taking them from others; None where the system does not say (Linux and CUDA do)."""
    if place.type == "cuda":
        return torch.cuda.mem_get_info(place)[0]
    if not MEMINFO.exists():
        return None
    free = int(_said(MEMINFO)["MemAvailable:"]) * 1024
    limit = GROUP / "memory.max"                           # of a container
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        held = _said(GROUP / "memory.stat")                # files that were read are kept only while there is room
        used = int((GROUP / "memory.current").read_text()) - int(held["active_file"]) - int(held["inactive_file"])
        free = min(free, int(most) - used)
    return max(0, free)


def _said(file: Path) -> dict[str, str]:
    """The first two words of each line."""
    words = (line.split() for line in file.read_text().splitlines())
    return {each[0]: each[1] for each in words if len(each) > 1}


def need_memory(config: ModelConfig, context: int, dtype: torch.dtype, place: torch.device) -> None:
    """Raise InputError where the cache of --context is larger than the memory that is free."""
    needed, free = cache_bytes(config, context, dtype), free_memory(place)
    if free is not None and needed > free:
        raise InputError(f"--context {context}: its cache takes {needed:,} bytes, and {free:,} are free; "
                         f"at most --context {longest_within(free, config, dtype, context)} fits")


def fitted_new(config: ModelConfig, rows: int, prompt: int, new: int, dtype: torch.dtype, place: torch.device) -> int:
    """--max-new-tokens, with `rows` prompts of `prompt` tokens; or, where that cache takes all memory that is free, as
    many as MEMORY (context.py) holds, beside the prompts: all of a cache is filled with zeros before the first token.

    Raises InputError where not one fits.
    """
    length, free = session_length(config, prompt, new), free_memory(place)
    if free is None or cache_bytes(config, length, dtype, rows) <= (most := free * 9 // 10):
        return new
    enough = cache_bytes(config, prompt, dtype, rows) + MEMORY
    fitting = longest_within(min(most, enough), config, dtype, length, rows) - prompt
    if fitting < 1:
        raise InputError(f"{rows} × {prompt:,} tokens of prompts: their cache does not fit into the {free:,} bytes "
                         "that are free; give fewer at once (--batch-size, --n), or shorter ones")
    return fitting


def fitted(request: Request, model: Decoder, rows: int, longest: int) -> Request:
    """The request with as many new tokens as there is memory for, in so many rows whose longest prompt is given."""
    weight, most = model.embed.weight, request.max_new_tokens
    new = fitted_new(model.config, rows, longest, most, weight.dtype, weight.device)
    if new < most:
        note(f"[no memory for --max-new-tokens {most}: the limit is {new}]")
    return replace(request, max_new_tokens=new)
