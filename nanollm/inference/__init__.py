"""Tokens out of a model: sampling, generation, weights in 8 and 4 bits; and what generate.py makes of them: answers,
chats, files of prompts, a server.

    from nanollm.inference import Engine            many requests at once (engine.py)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanollm.inference.engine import Engine

__all__ = ["Engine"]


def __getattr__(name: str) -> Any:
    """Imported when it is first asked for: a module of this folder is imported without all the others."""
    if name == "Engine":
        from nanollm.inference.engine import Engine

        return Engine
    raise AttributeError(f"module 'nanollm.inference' has no attribute {name!r}")
