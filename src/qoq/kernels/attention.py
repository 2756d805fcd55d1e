"""attention: ragged, paged, causal attention that always reads the cache as stored (QServe 5.3).

Prefill chunks and decode rows mix in one call; a prompt sees its own keys through the cache, so
perplexity, chunked prefill and decode all measure the same numbers (design decision 4).
"""

import torch
from torch import Tensor

from qoq.formats.kv import KVPages, QuantizedHeads, dequantize_heads
from qoq.kernels.dispatch import resolve

# Query rows of a block and keys of a segment (see _attend); _ROWS divides SEGMENT.
_ROWS, SEGMENT = 32, 256


def attention(
    q: Tensor,
    pages: KVPages,
    page_table: Tensor,
    kv_lens: Tensor,
    cu_seqlens_q: Tensor,
    sm_scale: float,
    sliding_window: int | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """fp32 [T, Hq, D]: softmax(q k^T * sm_scale) v for S sequences, keys and values from pages.

    q [T, Hq, D], Hq a multiple of Hkv (GQA: query heads h*g .. h*g+g-1 share KV head h);
    page_table int32 [S, max_pages] page ids in order; kv_lens int32 [S] tokens in the cache,
    the queries' own included; cu_seqlens_q int32 [S+1] rows of q per sequence, some may be empty.
    Row j of a sequence stands at position kv_len - q_len + j and sees keys at positions <= its own
    (with a window w: > its own - w). A sequence's rows depend on nothing but that sequence.
    Rows past cu_seqlens_q's end are padding, their output is 0. Over fp32 pages ``auto`` is the
    oracle: they are what quantized models are calibrated on and compared with, and neither may
    depend on the machine's instruction set. bf16 pages are for speed.
    """
    if backend == "auto" and pages.k_codes.dtype == pages.v_codes.dtype == torch.float32:
        backend = "oracle"
    run = resolve("attention", backend, q.device, q=q, pages=pages, sliding_window=sliding_window)
    out: Tensor = run(q, pages, page_table, kv_lens, cu_seqlens_q, sm_scale, sliding_window)
    return out


def attention_oracle(
    q: Tensor,
    pages: KVPages,
    page_table: Tensor,
    kv_lens: Tensor,
    cu_seqlens_q: Tensor,
    sm_scale: float,
    sliding_window: int | None = None,
) -> Tensor:
    """Torch truth of ``attention``: dequantize a sequence's pages, then dense query blocks."""
    if q.shape[1] % pages.k_codes.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads do not share {pages.k_codes.shape[1]} KV heads")
    q = q.to(torch.float32)
    out = torch.zeros_like(q)
    starts, lens = cu_seqlens_q.tolist(), kv_lens.tolist()
    for s, kv_len in enumerate(lens):
        start, stop = starts[s], starts[s + 1]
        if start == stop:
            continue
        first_position = kv_len - (stop - start)
        if first_position < 0 or kv_len > page_table.shape[1] * pages.page_size:
            raise ValueError(
                f"sequence {s}: {stop - start} queries, {kv_len} cached tokens and "
                f"{page_table.shape[1]} pages of {pages.page_size} do not fit each other"
            )
        # Segments wholly before the window of the first query's block are never read.
        first_key = 0
        if sliding_window is not None:
            first_block = _down(first_position, _ROWS)
            first_key = _down(max(0, first_block - sliding_window + 1), SEGMENT)
        first_page, before = divmod(first_key, pages.page_size)
        ids = page_table[s, first_page : -(-kv_len // pages.page_size)].long()
        keys, values = (
            half[:, before : before + kv_len - first_key] for half in gather_pages(pages, ids)
        )
        out[start:stop] = _attend(
            q[start:stop] * sm_scale, keys, values, first_position - first_key, sliding_window
        )
    return out


def gather_pages(pages: KVPages, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Dequantized keys and values fp32 [Hkv, len(ids) * page_size, D] of pages ``ids`` int64."""

    def half(bits: int, codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        if bits == 16:
            values = codes[ids].to(torch.float32)
        else:
            values = dequantize_heads(QuantizedHeads(codes[ids], scale[ids], offset[ids]), bits)
        return values.transpose(0, 1).flatten(1, 2)  # [n, Hkv, page, D] -> [Hkv, n * page, D]

    return (
        half(pages.format.k_bits, pages.k_codes, pages.k_scale, pages.k_offset),
        half(pages.format.v_bits, pages.v_codes, pages.v_scale, pages.v_offset),
    )


def _attend(q: Tensor, keys: Tensor, values: Tensor, first: int, window: int | None) -> Tensor:
    """One sequence: scaled q [t, Hq, D] of positions first..; keys, values [Hkv, L, D] of all
    positions from a multiple of SEGMENT on, counted from there; row j is key first + j.

    A BLAS sums in an order that hangs on the sizes it is given. So queries go through it in blocks
    that begin at multiples of _ROWS, with the keys up to the end of the block's segment: the sizes
    and its place in them hang on a row's position alone, and so does every bit of the result,
    wherever the prompt is cut into chunks. Places without a query or a key hold zeros.
    """
    rows, num_heads, dim = q.shape
    kv_heads = keys.shape[0]
    out = q.new_empty(rows, num_heads, dim)
    missing = -keys.shape[1] % SEGMENT
    keys, values = (torch.nn.functional.pad(half, (0, 0, 0, missing)) for half in (keys, values))
    keys_t = keys.transpose(1, 2)
    for block in range(first - first % _ROWS, first + rows, _ROWS):
        begin, end = max(block, first), min(block + _ROWS, first + rows)
        low = 0 if window is None else _down(max(0, block - window + 1), SEGMENT)
        high = _down(block, SEGMENT) + SEGMENT
        padded = q.new_zeros(_ROWS, num_heads, dim)
        padded[begin - block : end - block] = q[begin - first : end - first]
        # [Hkv, g * rows, D]: the g query heads of a KV head become rows of one matrix product.
        part = padded.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3).flatten(1, 2)
        scores = (part @ keys_t[:, :, low:high]).unflatten(1, (-1, _ROWS))
        own = torch.arange(block, block + _ROWS, device=q.device)[:, None]
        key = torch.arange(low, high, device=q.device)
        hidden = key > own if window is None else (key > own) | (key <= own - window)
        probs = scores.masked_fill_(hidden, -torch.inf).softmax(dim=-1)
        mixed = (probs.flatten(1, 2) @ values[:, low:high]).unflatten(1, (-1, _ROWS))
        mixed = mixed.permute(2, 0, 1, 3).flatten(1, 2)
        out[begin - first : end - first] = mixed[begin - block : end - block]
    return out


def _down(value: int, step: int) -> int:
    return value - value % step
