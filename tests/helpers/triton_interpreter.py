"""What Triton's interpreter gets wrong or leaves open, put right while a test runs.

- With numpy 2.4 on, a scalar of the kernel's is no bound for ``range``.
- Numbers in bf16 are multiplied as if they were integers, and fp32 is cut instead of rounded.
- A BLAS sums in an order that hangs on a tile's sizes; a tensor core does not: every element is
  summed over the same steps of 16, wherever in the tile it lies.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch


@contextmanager
def faithful() -> Iterator[None]:
    """Kernels launched meanwhile are interpreted so. Nothing happens on a GPU."""
    if torch.cuda.is_available():
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    patch_tensor, cast = interpreter._patch_lang_tensor, builder.cast_impl

    def tensor_with_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def rounding_cast(self: Any, handle: Any, dtype: Any) -> Any:
        if handle.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16:
            numbers = torch.from_numpy(np.ascontiguousarray(handle.data)).bfloat16()
            return interpreter.TensorHandle(
                numbers.view(torch.int16).numpy().view(np.uint16), tl.bfloat16
            )
        return cast(self, handle, dtype)

    def dot(self: Any, a: Any, b: Any, c: Any, *rest: Any) -> Any:
        if np.issubdtype(c.data.dtype, np.integer):
            return interpreter.TensorHandle(
                np.matmul(a.data, b.data, dtype=c.data.dtype) + c.data, c.dtype.scalar
            )
        left, right = (
            (x.data.astype(np.uint32) << 16).view(np.float32)
            if x.dtype.scalar == tl.bfloat16
            else x.data
            for x in (a, b)
        )
        total = c.data
        for k in range(0, left.shape[1], 16):
            x, y = left[:, k : k + 16].astype(np.float64), right[k : k + 16].astype(np.float64)
            # numpy's own loop, one fixed order for every element
            total = (np.einsum("mk,kn->mn", x, y, optimize=False) + total).astype(total.dtype)
        return interpreter.TensorHandle(total, c.dtype.scalar)

    with (
        patch.object(interpreter, "_patch_lang_tensor", tensor_with_index),
        patch.object(builder, "cast_impl", rounding_cast),
        patch.object(builder, "create_dot", dot),
    ):
        yield
