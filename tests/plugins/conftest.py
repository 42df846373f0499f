"""Triton's interpreter, chosen in the conftest above, runs the kernels on CPU tensors."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

# For `benchmarks`, which is not installed.
sys.path.append(str(Path(__file__).parents[2]))


def decode_bfloat16() -> None:
    """Triton 3.9's interpreter keeps bfloat16 as uint16, multiplies and compares the bits, and makes integers its bits;
    go by way of float32."""
    try:
        import triton.language as tl
        from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
    except ImportError:
        return
    create_dot, create_maxnumf = InterpreterBuilder.create_dot, InterpreterBuilder.create_maxnumf

    def decoded(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return create_dot(self, decoded(a), decoded(b), *rest)

    def maxnumf(self: Any, a: Any, b: Any) -> Any:
        largest = create_maxnumf(self, decoded(a), decoded(b))
        if a.dtype.scalar != tl.bfloat16:
            return largest
        return TensorHandle((largest.data.view(np.uint32) >> 16).astype(np.uint16), tl.bfloat16)

    def si_to_fp(self: Any, source: Any, dst_type: Any) -> Any:
        if dst_type.scalar != tl.bfloat16:
            return self.cast_impl(source, dst_type)
        return self.cast_impl(self.cast_impl(source, tl.float32), dst_type)

    InterpreterBuilder.create_dot = dot
    InterpreterBuilder.create_si_to_fp = si_to_fp
    InterpreterBuilder.create_maxnumf = maxnumf


decode_bfloat16()
