"""Query rows by tile, and splits of a row's softmax folded in order (Triton)."""

import triton
import triton.language as tl

NOTHING = tl.constexpr(float("-inf"))


@triton.jit
def locate(cu_seqlens, kv_lens, rows, sequences, most, tile, ROWS: tl.constexpr):
    """(sequence, its row's ends first and stop, position of row 0) of a tile of ROWS query rows.

    Sequence s has the tiles from ``cu[s] // ROWS + s`` on, which are enough; number ``sequences``
    is the padding behind the last one, and has no keys. Tiles with first >= stop have no rows.
    """
    sequence = -1
    for start in range(0, sequences + 1, 128):
        s = start + tl.arange(0, 128)
        begin = tl.load(cu_seqlens + s, mask=s <= sequences, other=1 << 30)
        sequence += tl.sum((begin // ROWS + s <= tile).to(tl.int32), axis=0)
    begin = tl.load(cu_seqlens + sequence)
    stop = rows
    kv_len = 0
    if sequence < sequences:
        stop = tl.load(cu_seqlens + sequence + 1)
        kv_len = tl.minimum(tl.load(kv_lens + sequence), most)
    first = begin + (tile - begin // ROWS - sequence) * ROWS
    return sequence, first, stop, kv_len - stop


@triton.jit
def rescale(old, new):
    """Factor exp2(old - new) of what was summed under the exponent old; 0 if that was nothing."""
    return tl.exp2(old - tl.where(new == NOTHING, 0.0, new))


@triton.jit
def fold(all_top, all_sum, top, p_sum):
    """One split more: (exponent, sum) of all, and the factors of what they had and of its own."""
    new_top = tl.maximum(all_top, top)
    old, new = rescale(all_top, new_top), rescale(top, new_top)
    return new_top, tl.fma(p_sum, new, all_sum * old), old, new


@triton.jit(
    do_not_specialize=["rows", "sequences", "max_pages", "window", "slots"],
    do_not_specialize_on_alignment=["kv_lens", "cu_seqlens", "tops", "sums"],
)
def merge(
    partial,
    tops,
    sums,
    kv_lens,
    cu_seqlens,
    out,
    rows,
    sequences,
    max_pages,
    slots,
    window,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOWED: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out [row, head] from its splits in order, as ``attend`` does where it walks them all."""
    _, row, stop, before = locate(
        cu_seqlens, kv_lens, rows, sequences, max_pages * PAGE, tl.program_id(0), 1
    )
    if row >= stop:
        return
    dim = tl.arange(0, WIDTH)
    at = row.to(tl.int64) * HEADS + tl.program_id(1)
    low = 0
    if WINDOWED:
        low = tl.maximum(before + row - window + 1, 0)
    all_top = NOTHING
    all_sum = 0.0
    total = tl.zeros((WIDTH,), tl.float32)
    end = (before + row + SPLIT) // SPLIT
    for split in tl.range(low // SPLIT, end, num_stages=STAGES):
        slot = at + (split % slots).to(tl.int64) * rows * HEADS
        top = tl.load(tops + slot)
        mixed = tl.load(partial + slot * DIM + dim, mask=dim < DIM, other=0.0)
        all_top, all_sum, old, new = fold(all_top, all_sum, top, tl.load(sums + slot))
        total = tl.fma(mixed, new, total * old)
    total *= tl.where(all_sum == 0, 0.0, 1.0 / all_sum)
    tl.store(out + at * DIM + dim, total, mask=dim < DIM)
