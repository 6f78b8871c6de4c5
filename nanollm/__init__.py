"""nanollm: modern decoders in plain PyTorch. Start reading at config.py, then block, attention, model.

    from nanollm import Decoder, ModelConfig, generate
"""

from importlib import import_module

_HOME = {"Decoder": "nanollm.model", "ModelConfig": "nanollm.config", "generate": "nanollm.generation"}
__all__ = list(_HOME)


def __getattr__(name: str):
    """The public names, imported when first asked for: `import nanollm` itself loads nothing, not even torch."""
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'nanollm' has no attribute {name!r}")
