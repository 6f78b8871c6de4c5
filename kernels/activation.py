"""The activation functions and their slopes, in float32, for the kernels that gate with one.

    silu(x)       x σ(x)                            slope  σ + x σ (1 − σ)
    gelu(x)       x Φ(x)                            slope  Φ + x φ(x),        Φ the normal distribution, φ its density
    gelu_tanh(x)  x σ(2u),  u = √(2/π)(x + 0.044715 x³)     ½(1 + tanh u) is σ(2u), and there is no tanh to call;
                                                    slope  σ + x σ (1 − σ) · 2u′,   u′ = √(2/π)(1 + 3 · 0.044715 x²)
    relu2(x)      max(x, 0)²                        slope  2 max(x, 0)

NAME is known when a kernel is compiled, so only one branch is ever there.
"""

import triton
import triton.language as tl

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu2")


@triton.jit
def activated(x, NAME: tl.constexpr):
    """act(x), x float32 of any shape."""
    if NAME == "silu":
        return x * tl.sigmoid(x)
    elif NAME == "gelu":
        return 0.5 * x * (1.0 + tl.erf(0.7071067811865476 * x))
    elif NAME == "gelu_tanh":
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        tl.static_assert(NAME == "relu2")
        return tl.maximum(x, 0.0) * tl.maximum(x, 0.0)


@triton.jit
def slope(x, NAME: tl.constexpr):
    """act′(x), x float32 of any shape."""
    if NAME == "silu":
        s = tl.sigmoid(x)
        return s + x * s * (1.0 - s)
    elif NAME == "gelu":
        return 0.5 * (1.0 + tl.erf(0.7071067811865476 * x)) + 0.3989422804014327 * x * tl.exp(-0.5 * x * x)
    elif NAME == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        return s + x * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    else:
        tl.static_assert(NAME == "relu2")
        return 2.0 * tl.maximum(x, 0.0)
