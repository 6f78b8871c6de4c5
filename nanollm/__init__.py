"""nanollm: modern decoders in plain PyTorch. Start reading at config/, then block.py, layers/attention.py, model.py.

    from nanollm import Decoder, ModelConfig, generate, tokenizer
"""

from importlib import import_module
from typing import Any

_HOME = {
    "Decoder": "nanollm.model",
    "ModelConfig": "nanollm.config",
    "generate": "nanollm.inference.generation",
    "tokenizer": "nanollm.text",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    """The public names, imported when first asked for: `import nanollm` itself loads nothing, not even torch."""
    if name in _HOME:
        found = import_module(_HOME[name])
        return import_module(f"{_HOME[name]}.{name}") if name == "tokenizer" else getattr(found, name)
    raise AttributeError(f"module 'nanollm' has no attribute {name!r}")
