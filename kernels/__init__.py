"""Triton kernels, one file an operation; README.md is the map. Each has the signature of its definition in `nanollm`.

    from kernels import rms_norm
    rms_norm(x, gain, eps)                  ValueError, naming the argument, for what it does not support
    rms_norm.refuses(x, gain, eps)          the same as a sentence, None where all is well

Nothing is imported before it is asked for.
"""

import importlib

OPERATIONS = {                              # operation → the file it is in
    "rms_norm": "norm",
    "add_rms_norm": "norm",
    "layer_norm": "norm",
    "rotate": "rope",
    "gated": "gating",
    "attend": "attention",
    "expert_mlp": "moe",
    "mamba_scan": "scan",
    "causal_conv": "conv",
    "ssd": "duality",
    "delta_walk": "delta",
    "linear_cross_entropy": "cross_entropy",
    "quantized_linear": "quantized",
}
__all__ = list(OPERATIONS)


def __getattr__(name: str):
    if name not in OPERATIONS:
        raise AttributeError(f"module 'kernels' has no attribute {name!r}")
    globals()[name] = found = getattr(importlib.import_module(f"kernels.{OPERATIONS[name]}"), name)
    return found
