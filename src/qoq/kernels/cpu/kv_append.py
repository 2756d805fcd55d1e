"""C++ twin of kv_append: pages equal to the oracle's to the bit."""

from typing import Any

import torch
from torch import Tensor

from qoq.formats.kv import KVPages
from qoq.kernels.cpu.backend import CPU, address, backend, extension, row_address, rows
from qoq.kernels.cpu.backend import unsupported as unsupported_device
from qoq.kernels.cpu.pages import page_halves, unsupported_floats
from qoq.kernels.kv_append import kv_append_oracle


def unsupported(device: torch.device, *, pages: KVPages | None = None, **what: Any) -> str | None:
    """See ``dispatch.Twin``."""
    reason = unsupported_device(device)
    return reason if reason or pages is None else unsupported_floats(pages)


def kv_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    pages: KVPages,
    k_center: Tensor | None = None,
    k_rotation: Tensor | None = None,
) -> Tensor:
    """See ``qoq.kernels.kv_append``."""
    if k_rotation is not None and k_rotation.dtype is torch.float64:
        # The kernel reads fp32, which would round it.
        return kv_append_oracle(q, k, v, cos, sin, slots, pages, k_center, k_rotation)
    tokens, q_heads, dim = q.shape
    kv_heads, pairs = k.shape[1], cos.shape[1]
    if 2 * pairs > dim:
        raise ValueError(f"{pairs} rotary pairs do not fit head_dim {dim}")
    if dim % 2 and 4 in (pages.format.k_bits, pages.format.v_bits):
        raise ValueError(f"cannot pack {dim} nibbles: head_dim must be even")
    if not q.numel() and not k.numel():
        return torch.empty(q.shape, dtype=torch.float32, device=CPU)
    q, k, v = _heads(q), _heads(k), _heads(v)
    cos, sin = rows(cos).contiguous(), rows(sin).contiguous()
    slots = slots.to(torch.int64).contiguous()
    center_at = rotation_at = 0
    if k_center is not None:
        k_center = rows(k_center).contiguous()
        center_at = address(k_center, torch.float32, kv_heads, dim)
    if k_rotation is not None:
        k_rotation = rows(k_rotation).contiguous()
        rotation_at = address(k_rotation, torch.float32, dim, dim)
    out = torch.empty(q.shape, dtype=torch.float32, device=CPU)
    extension().kv_append(
        backend(),
        tokens,
        q_heads,
        kv_heads,
        dim,
        pairs,
        (row_address(q, tokens, q_heads, dim), q.stride(0)),
        (row_address(k, tokens, kv_heads, dim), k.stride(0)),
        (row_address(v, tokens, kv_heads, dim), v.stride(0)),
        address(cos, torch.float32, tokens, pairs),
        address(sin, torch.float32, tokens, pairs),
        address(slots, torch.int64, tokens),
        center_at,
        rotation_at,
        out.data_ptr(),
        pages.num_pages,
        pages.page_size,
        *page_halves(pages, kv_heads, dim),
    )
    return out


def _heads(x: Tensor) -> Tensor:
    """x [T, H, D] with every token's heads side by side, whatever lies between tokens."""
    x = rows(x)
    return x if x.stride(1) == x.shape[2] else x.contiguous()
