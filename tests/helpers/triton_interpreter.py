"""What Triton's interpreter gets wrong or leaves open, put right while a test runs.

- With numpy 2.4 on, a kernel's scalar is no bound for ``range``.
- Numbers in bf16 are multiplied as if they were integers, and fp32 is cut to them, not rounded.
- A BLAS sums in an order that hangs on a tile's sizes; on a tensor core every element is summed
  over the same steps of 16, wherever in the tile it lies.
- Each call of a function in a kernel looks through all of the language again, for a third of the
  time.
"""

import functools
import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch


@contextmanager
def faithful_interpreter() -> Iterator[None]:
    """Kernels launched meanwhile are interpreted so; nothing changes where there is a GPU."""
    if torch.cuda.is_available():
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    patch_tensor, cast = interpreter._patch_lang_tensor, builder.cast_impl

    def patch_tensor_with_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def rounding_cast(self: Any, handle: Any, dtype: Any) -> Any:
        if (handle.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, handle, dtype)
        rounded = torch.from_numpy(np.ascontiguousarray(handle.data)).bfloat16()
        return interpreter.TensorHandle(
            rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16
        )

    def numbers(handle: Any) -> Any:
        if handle.dtype.scalar == tl.bfloat16:  # kept as uint16
            return (handle.data.astype(np.uint32) << 16).view(np.float32)
        return handle.data

    def dot(self: Any, a: Any, b: Any, c: Any, *rest: Any) -> Any:
        left, right, total = numbers(a), numbers(b), c.data
        exact = np.float64 if np.issubdtype(total.dtype, np.floating) else total.dtype
        for k in range(0, left.shape[1], 16):
            # einsum's own loop has one order for every element; a BLAS is not asked.
            steps = left[:, k : k + 16].astype(exact), right[k : k + 16].astype(exact)
            total = (np.einsum("mk,kn->mn", *steps, optimize=False) + total).astype(total.dtype)
        return interpreter.TensorHandle(total, c.dtype.scalar)

    @functools.cache
    def builtins(package: Any) -> list[tuple[str, Any]]:
        return [pair for pair in inspect.getmembers(package) if tl.core.is_builtin(pair[1])]

    def patch_builtin(package: Any, of: Any, scope: Any) -> None:
        for name, member in builtins(package):
            interpreter._patch_attr(package, name, member, of, scope)

    with (
        warnings.catch_warnings(action="ignore", category=RuntimeWarning),  # NaN, infinity
        patch.object(interpreter, "_patch_lang_tensor", patch_tensor_with_index),
        patch.object(interpreter, "_patch_builtin", patch_builtin),
        patch.object(builder, "cast_impl", rounding_cast),
        patch.object(builder, "create_dot", dot),
    ):
        yield
