"""Makes bfloat16 usable in Triton's interpreter. For the test suite only.

The interpreter keeps bfloat16 as raw uint16 and computes on those bits, so that ``+``, ``-``, ``*`` and ``tl.dot`` are
silently wrong, and its cast from float32 truncates where hardware and torch round to nearest even. Two methods of the
interpreter are wrapped so that they go through float32 and round, and its product is replaced by one of float64. A
last wrap lets a loop bound known only at run time be an index, which triton 3.6 fails to do under numpy 2.4 and later.

TRITON_INTERPRET must be set before triton is imported, hence before this file is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Handle = interpreter.TensorHandle
Builder = interpreter.InterpreterBuilder


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits to float32, which holds every one of them."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """float32 to bfloat16 bits, ties to even; every NaN becomes the quiet one."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def apply() -> None:
    """Wrap the interpreter's methods. A second call changes nothing."""
    if getattr(Builder, "computes_bf16", False):
        return
    Builder.computes_bf16 = True
    Builder.create_dot = _create_dot
    Builder.binary_op = _wrap_binary_op(Builder.binary_op)
    Builder.cast_impl = _wrap_cast(Builder.cast_impl)
    interpreter._patch_lang_tensor = _wrap_patch_tensor(interpreter._patch_lang_tensor)


def _is_bf16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _create_dot(self: Any, a: Any, b: Any, d: Any, *precision: Any) -> Any:
    """numpy's product sums a row in another order in another place of the matrix; rounded from float64 it does not."""
    wide = (widen(x.data) if _is_bf16(x) else x.data for x in (a, b))
    with np.errstate(over="ignore", invalid="ignore"):
        product = np.matmul(*(x.astype(np.float64) for x in wide)) + d.data
        return Handle(product.astype(d.data.dtype), d.dtype.scalar)


def _wrap_binary_op(original: Any) -> Any:
    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        if not (_is_bf16(lhs) and _is_bf16(rhs)):
            return original(self, lhs, rhs, op)
        out = op(widen(lhs.data), widen(rhs.data))
        return Handle(out, tl.int1) if out.dtype == np.bool_ else Handle(narrow(out), tl.bfloat16)

    return binary_op


def _wrap_cast(original: Any) -> Any:
    def cast_impl(self: Any, source: Any, to: Any) -> Any:
        if source.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
            return Handle(narrow(source.data), tl.bfloat16)
        if _is_bf16(source) and to.scalar == tl.float32:
            return Handle(widen(source.data), tl.float32)
        return original(self, source, to)

    return cast_impl


def _wrap_patch_tensor(original: Any) -> Any:
    def patch_tensor(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        out = original(tensor, *args, **kwargs)
        tensor.__index__ = lambda self: int(np.asarray(self.handle.data).reshape(-1)[0])
        return out

    return patch_tensor
