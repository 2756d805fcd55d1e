"""C++ twin of attention: integer products over 4- and 8-bit pages, fp32 over bf16 and fp32 pages.

Over codes, queries and probabilities become 16-bit integers, so scores carry an error of about 2e-5
of the largest: with scores of ordinary size the output is within 1e-3 of the oracle's largest. Over
floats it is within 1e-4. To the bit independent of the batch, of how a prompt is cut, and of
threads.
"""

from typing import Any

import torch
from torch import Tensor

from qoq.formats.kv import KVPages
from qoq.kernels.cpu.backend import address, backend, extension, rows
from qoq.kernels.cpu.backend import unsupported as unsupported_device
from qoq.kernels.cpu.pages import page_halves, unsupported_floats

MAX_DIM = 256


def attention(
    q: Tensor,
    pages: KVPages,
    page_table: Tensor,
    kv_lens: Tensor,
    cu_seqlens_q: Tensor,
    sm_scale: float,
    sliding_window: int | None = None,
) -> Tensor:
    """As the oracle; see the module for how close."""
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"a sliding window of {sliding_window} keys leaves nothing to see")
    q = rows(q).contiguous()
    tokens, heads, dim = q.shape
    kv_heads = pages.k_codes.shape[1]
    table, lens, starts = (
        t.to(torch.int32).contiguous() for t in (page_table, kv_lens, cu_seqlens_q)
    )
    sequences, max_pages = table.shape
    out = torch.empty_like(q)

    extension().attention(
        backend(),
        (sequences, tokens, heads, kv_heads, dim, pages.num_pages, pages.page_size, max_pages),
        q.data_ptr(),
        *page_halves(pages, kv_heads, dim),
        address(table, torch.int32, sequences, max_pages),
        address(lens, torch.int32, sequences),
        address(starts, torch.int32, sequences + 1),
        sm_scale,
        sliding_window or 0,
        out.data_ptr(),
    )
    return out


def unsupported(device: torch.device, **what: Any) -> str | None:
    """Why this call must be left to another twin, or None."""
    pages, q = what.get("pages"), what.get("q")
    if pages is not None:
        if (pages.format.k_bits == 16) != (pages.format.v_bits == 16):
            return "it reads codes or floats, not keys of one and values of the other"
        if reason := unsupported_floats(pages):
            return reason
    if q is not None and (q.shape[2] % 8 or q.shape[2] > MAX_DIM):
        return f"head_dim {q.shape[2]} is no multiple of 8 up to {MAX_DIM}"
    return unsupported_device(device)
