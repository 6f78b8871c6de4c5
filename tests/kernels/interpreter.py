"""bfloat16 as a GPU computes it, in Triton's interpreter, which stores it as 16-bit integers and computes with those.

Three repairs, for triton 3.6 to 3.9. Casts from float32 round to nearest even (the interpreter cuts the low half off),
products of matrices are taken of the values, and so is elementwise arithmetic, in float32 and rounded. What stays wrong
is a reduction (tl.sum, tl.max) of bfloat16: kernels reduce in float32 only.

And what saves half of its time (`hasten`): it computes less that nobody reads.
"""

import dataclasses

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from kernels import common

COMPARISONS = {np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal}


def values(handle: TensorHandle) -> np.ndarray:
    """The numbers that the bit patterns stand for."""
    return (handle.data.astype(np.uint32) << 16).view(np.float32)


def rounded(x: np.ndarray) -> np.ndarray:
    """float32 → the bits of the nearest bfloat16, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, nearest).astype(np.uint16)


def narrow(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def widened(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(values(handle), tl.float32) if narrow(handle) else handle


def hasten() -> None:
    """For this process. Within a launch, the functions of triton.language are replaced once for each module whose
    functions are called, not once a call. Whether integers overflow is not computed: the result is dropped where there
    is no debugging, and there is none. And dtypes are looked up in one table, not in one a lookup."""
    replace, launch, done = interpreter._patch_lang, interpreter._LangPatchScope(), set()

    def once(function):
        nonlocal launch
        module = id(function.__globals__)
        if not launch._changes:                 # nothing yet, or all restored, at the end of the launch
            done.clear()
            launch = replace(function)
        elif module not in done:
            replace(function)
        done.add(module)
        return launch

    look_up, known = interpreter._get_np_dtype, {}

    def found(kind):
        name = kind.scalar.name
        if name not in known:
            known[name] = look_up(kind.scalar)
        return known[name]

    interpreter._patch_lang, interpreter._get_np_dtype = once, found
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def repair() -> None:
    """Put the three repairs in place, for this process."""
    cast, dot, binary = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot, InterpreterBuilder.binary_op

    def cast_impl(self, source, target):
        if target.scalar == tl.bfloat16 and source.dtype.scalar == tl.float32:
            return TensorHandle(rounded(source.data), tl.bfloat16)
        if narrow(source) and target.scalar != tl.bfloat16:
            return widened(source) if target.scalar == tl.float32 else cast(self, widened(source), target)
        return cast(self, source, target)

    def create_dot(self, a, b, d, *rest):
        return dot(self, widened(a), widened(b), d, *rest)

    def binary_op(self, left, right, operation):
        if not narrow(left):
            return binary(self, left, right, operation)
        result = operation(values(left), values(right))
        return TensorHandle(result, tl.int1) if operation in COMPARISONS else TensorHandle(rounded(result), tl.bfloat16)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast_impl, create_dot
    InterpreterBuilder.binary_op = binary_op
    common.INTERPRETS_BFLOAT16 = True
