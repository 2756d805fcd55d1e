"""Triton twin of attention: tensor cores over codes as they lie, and over bf16 and fp16 pages.

Queries and probabilities become fp16 (over float pages, the pages' type), so the output is within
2e-3 of the oracle's largest; within 1e-2 over bf16 pages. To the bit independent of the batch, of
how a prompt is cut, and of how the work is spread over the GPU.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qoq.formats.kv import KVPages
from qoq.kernels.attention import SEGMENT
from qoq.kernels.gpu.backend import unsupported as unsupported_device

SPLIT = SEGMENT  # tokens whose softmax is one piece; a part of the numerics, as STEP is
SUBNORMAL = True  # see codes.operand

_MAX_DIM = 256
_FLOATS = (torch.bfloat16, torch.float16)
_BUSY = 8  # programs per multiprocessor, of one warp each, that keep the memory busy
_MOST_SCRATCH = 1 << 29  # bytes of unfinished output


@dataclass(frozen=True)
class Call:
    """What the host knows of a call without waiting for the GPU. ``window`` 0: none."""

    rows: int
    sequences: int
    heads: int
    kv_heads: int
    dim: int
    page_size: int
    max_pages: int
    window: int


@dataclass(frozen=True)
class Plan:
    """How a call is cut into programs; no bit of the result hangs on it.

    A tile has ``columns``: query rows times heads that share a KV head. ``turns`` programs share
    its splits, which a second kernel folds; a single one folds them itself.
    """

    columns: int
    turns: int

    def group(self, call: Call) -> int:
        """Heads of one row in a tile: a power of two, of which the last may be none."""
        return min(self.columns, _up(call.heads // call.kv_heads))

    def tile_rows(self, call: Call) -> int:
        return self.columns // self.group(call)

    def head_tiles(self, call: Call) -> int:
        return call.kv_heads * -(-call.heads // call.kv_heads // self.group(call))

    def slots(self, call: Call) -> int:
        """The most splits that the rows of a tile can see."""
        slots = -(-call.max_pages * call.page_size // SPLIT)
        if call.window:
            seen = call.window + self.tile_rows(call) - 1
            slots = min(slots, (seen + SPLIT - 2) // SPLIT + 1)
        return max(1, slots)


def choose(call: Call, processors: int) -> Plan:
    """The plan for a GPU of so many multiprocessors, from shapes alone: it holds for a captured
    graph, whatever the lengths become.
    """
    plan = Plan(8, 1)
    few = call.rows <= call.sequences * plan.tile_rows(call)
    if call.dim <= 128 and not (few and call.heads <= 8 * call.kv_heads):
        plan = Plan(16, 1)  # half the work per key, once there are rows for it
    tiles = max(call.sequences, -(-call.rows // plan.tile_rows(call))) * plan.head_tiles(call)
    slots = plan.slots(call)
    turns = min(slots, -(-_BUSY * processors // max(1, tiles)))
    if slots * call.rows * call.heads * (call.dim + 2) * 4 > _MOST_SCRATCH:
        turns = 1
    return Plan(plan.columns, turns)


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; those of none are one."""
    if device.type != "cuda":
        return 1
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def attention(
    q: Tensor,
    pages: KVPages,
    page_table: Tensor,
    kv_lens: Tensor,
    cu_seqlens_q: Tensor,
    sm_scale: float,
    sliding_window: int | None = None,
    *,
    plan: Plan | None = None,
) -> Tensor:
    """As the oracle; see the module for how close.

    Lengths that do not fit each other are not refused, which would wait for the GPU: their rows
    mean nothing. ``plan``: another than the one chosen by shape.
    """
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"a sliding window of {sliding_window} keys leaves nothing to see")
    rows, heads, dim = q.shape
    kv_heads, page_size = pages.k_codes.shape[1:3]
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads do not share {kv_heads} KV heads")
    table, lens, starts = (
        t.to(torch.int32).contiguous() for t in (page_table, kv_lens, cu_seqlens_q)
    )
    sequences, max_pages = table.shape
    if lens.shape != (sequences,) or starts.shape != (sequences + 1,):
        raise ValueError(
            f"page_table [{sequences}, {max_pages}] needs kv_lens [{sequences}] and cu_seqlens_q "
            f"[{sequences + 1}], not {list(lens.shape)} and {list(starts.shape)}"
        )
    window = sliding_window or 0
    call = Call(rows, sequences, heads, kv_heads, dim, page_size, max_pages, window)
    plan = plan or choose(call, processors(q.device))
    q = q.contiguous()
    out = q.new_empty(q.shape, dtype=torch.float32)
    if not out.numel():
        return out
    slots = plan.slots(call)
    spread = plan.turns > 1
    unfinished, tops, sums = out, None, None
    if spread:
        unfinished = out.new_empty((slots, *q.shape))
        tops, sums = out.new_empty((2, slots, rows, heads))
    k_bits, v_bits = pages.format.k_bits, pages.format.v_bits
    width = max(_up(dim), 256 // min(k_bits, v_bits))
    attend, merge, interpreted = _kernels()
    attend[rows // plan.tile_rows(call) + sequences + 1, plan.head_tiles(call), plan.turns](
        q,
        *_half(k_bits, pages.k_codes, pages.k_scale, pages.k_offset),
        *_half(v_bits, pages.v_codes, pages.v_scale, pages.v_offset),
        table,
        lens,
        starts,
        unfinished,
        tops,
        sums,
        rows,
        sequences,
        max_pages,
        slots,
        window,
        sm_scale * math.log2(math.e),
        HEADS=heads,
        KV_HEADS=kv_heads,
        DIM=dim,
        PAGE=page_size,
        K_BITS=k_bits,
        V_BITS=v_bits,
        WINDOWED=window > 0,
        SPREAD=spread,
        WIDTH=width,
        GROUP=plan.group(call),
        COLUMNS=plan.columns,
        STEP=64 if dim <= 128 else 32,
        SPLIT=SPLIT,
        STAGES=5,  # two of each tile of keys and values: the page numbers take the other stages
        SUBNORMAL=SUBNORMAL,
        INTERPRETED=interpreted,
        num_warps=1,
        enable_fp_fusion=False,
    )
    if spread:
        merge[rows + sequences + 1, heads](
            unfinished,
            tops,
            sums,
            lens,
            starts,
            out,
            rows,
            sequences,
            max_pages,
            slots,
            window,
            HEADS=heads,
            DIM=dim,
            PAGE=page_size,
            WINDOWED=window > 0,
            WIDTH=width,
            SPLIT=SPLIT,
            STAGES=8,  # few programs, each a chain of short steps
            num_warps=1,
            enable_fp_fusion=False,
        )
    return out


def _up(number: int) -> int:
    """The next power of two."""
    return 1 << (number - 1).bit_length()


@functools.cache
def _kernels() -> tuple[Any, Any, bool]:
    """The kernels, and whether they are interpreted; here, so that the module needs no Triton."""
    import triton

    from qoq.kernels.gpu.fold import merge
    from qoq.kernels.gpu.walk import attend

    return attend, merge, not isinstance(attend, triton.JITFunction)


def _half(
    bits: int, codes: Tensor, scale: Tensor, offset: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Keys or values as the kernel reads them: codes as 16-bit words."""
    for tensor in (codes, scale, offset):
        if not tensor.is_contiguous():
            raise ValueError("pages must be contiguous")
    return (codes, None, None) if bits == 16 else (codes.view(torch.int16), scale, offset)


def unsupported(device: torch.device, **what: Any) -> str | None:
    """See ``dispatch.Twin``."""
    pages, q = what.get("pages"), what.get("q")
    if pages is not None:
        for codes in (pages.k_codes, pages.v_codes):
            if codes.dtype != torch.uint8 and codes.dtype not in _FLOATS:
                return f"float pages must be bf16 or fp16, not {codes.dtype}"
        if pages.page_size % 16:
            return f"pages of {pages.page_size} tokens are no multiple of 16"
    if q is not None and (q.shape[2] % 8 or q.shape[2] > _MAX_DIM):
        return f"head_dim {q.shape[2]} is no multiple of 8 up to {_MAX_DIM}"
    return unsupported_device(device)
