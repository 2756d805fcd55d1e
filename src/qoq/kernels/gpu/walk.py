"""Triton kernels of attention: each tile of query rows walks its sequence's pages, split by split.

Keys and values are the left operands (``swap-AB``): tokens, then dims, run along the tensor core's
rows, and the query heads that share a KV head along its columns. So a decode row costs one narrow
instruction, and codes go from registers into the product. Scales and offsets meet scores and
probabilities, never elements (design section 2):

    score = k_scale[t] (q . c[t]) + k_offset[t] sum(q)
    out   = sum_t (p[t] v_scale[t]) c[t] + sum_t p[t] v_offset[t]

A row's bits depend on its own position alone: its keys come in steps of STEP and splits of SPLIT
tokens from position 0 on, keys it may not see add exact zeros, and splits are folded in order.
"""

import triton
import triton.language as tl

from qoq.kernels.gpu.codes import in_order, operand, parts
from qoq.kernels.gpu.fold import NOTHING, fold, locate, rescale


@triton.jit
def find(
    table, start, t, seen, kv_head, KV_HEADS: tl.constexpr, PAGE: tl.constexpr, STEP: tl.constexpr
):
    """Rows of the pages that hold tokens t [STEP] = start..: an int64 and what to add to it."""
    if PAGE % STEP == 0:  # all on one page
        page = tl.load(table + start // PAGE).to(tl.int64)
        base = tl.multiple_of((page * KV_HEADS + kv_head) * PAGE + start % PAGE, 16)
        place = t - start
    else:
        page = tl.load(table + t // PAGE, mask=seen, other=0).to(tl.int64)
        base = 0
        place = (page * KV_HEADS + kv_head) * PAGE + t % PAGE
        place = tl.max_contiguous(tl.multiple_of(place, 16), 16)
    return base, place


@triton.jit
def fetch(
    codes,
    base,
    place,
    seen,
    DIM: tl.constexpr,
    BITS: tl.constexpr,
    WORDS: tl.constexpr,
    TOKENS_FIRST: tl.constexpr,
):
    """Words [STEP, WORDS] of those rows, or [WORDS, STEP]; zeros past a row's end."""
    ROW: tl.constexpr = DIM * BITS // 16
    if TOKENS_FIRST:
        word = tl.arange(0, WORDS)[None, :]
        place = place[:, None]
        seen = seen[:, None]
    else:
        word = tl.arange(0, WORDS)[:, None]
        place = place[None, :]
        seen = seen[None, :]
    at = codes + base * ROW + (place * ROW + word)
    if BITS == 16:  # free slots may hold NaN
        words = tl.load(at, mask=seen & (word < ROW), other=0.0)
    elif WORDS == ROW:
        words = tl.load(at)
    else:
        words = tl.load(at, mask=word < ROW, other=0)
    return words


@triton.jit
def score(
    words, x0, x1, x2, x3, BITS: tl.constexpr, SUBNORMAL: tl.constexpr, INTERPRETED: tl.constexpr
):
    """Keys times queries [tokens, columns], summed over the parts of the words."""
    y = tl.dot(operand(words, 0, BITS, SUBNORMAL, INTERPRETED), x0)
    if BITS <= 8:
        y = tl.dot(operand(words, 1, BITS, SUBNORMAL, INTERPRETED), x1, y)
    if BITS == 4:
        y = tl.dot(operand(words, 2, BITS, SUBNORMAL, INTERPRETED), x2, y)
        y = tl.dot(operand(words, 3, BITS, SUBNORMAL, INTERPRETED), x3, y)
    return y


@triton.jit
def mix(
    words,
    p,
    o0,
    o1,
    o2,
    o3,
    alpha,
    BITS: tl.constexpr,
    SUBNORMAL: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Each part's output times alpha, plus values times probabilities p [tokens, columns]."""
    alpha = alpha[None, :]
    o0 = tl.dot(operand(words, 0, BITS, SUBNORMAL, INTERPRETED), p, o0 * alpha)
    if BITS <= 8:
        o1 = tl.dot(operand(words, 1, BITS, SUBNORMAL, INTERPRETED), p, o1 * alpha)
    if BITS == 4:
        o2 = tl.dot(operand(words, 2, BITS, SUBNORMAL, INTERPRETED), p, o2 * alpha)
        o3 = tl.dot(operand(words, 3, BITS, SUBNORMAL, INTERPRETED), p, o3 * alpha)
    return o0, o1, o2, o3


# A batch's tensors lie one after the other: where depends on its sizes, and must not make a kernel.
@triton.jit(
    do_not_specialize=["rows", "sequences", "max_pages", "window", "slots"],
    do_not_specialize_on_alignment=["page_table", "kv_lens", "cu_seqlens", "tops", "sums"],
)
def attend(
    q,
    k_codes,
    k_scale,
    k_offset,
    v_codes,
    v_scale,
    v_offset,
    page_table,
    kv_lens,
    cu_seqlens,
    out,
    tops,
    sums,
    rows,
    sequences,
    max_pages,
    slots,
    window,
    scale,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    K_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    WINDOWED: tl.constexpr,
    SPREAD: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    SUBNORMAL: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    SHARING: tl.constexpr = HEADS // KV_HEADS
    GROUPS: tl.constexpr = (SHARING + GROUP - 1) // GROUP
    ROWS: tl.constexpr = COLUMNS // GROUP
    K_PARTS: tl.constexpr = 16 // K_BITS
    V_PARTS: tl.constexpr = 16 // V_BITS
    K_WORDS: tl.constexpr = WIDTH // K_PARTS
    V_WORDS: tl.constexpr = WIDTH // V_PARTS
    MIDDLE: tl.constexpr = (2.0**V_BITS - 1) / 2
    EVEN: tl.constexpr = 2.0**24 if SUBNORMAL else 1.0
    ODD: tl.constexpr = EVEN / 16 if V_BITS == 4 else EVEN
    sequence, first, stop, before = locate(
        cu_seqlens, kv_lens, rows, sequences, max_pages * PAGE, tl.program_id(0), ROWS
    )
    if first >= stop:
        return
    kv_head = tl.program_id(1) // GROUPS
    column = tl.arange(0, COLUMNS)
    sharer = tl.program_id(1) % GROUPS * GROUP + column % GROUP
    row = first + column // GROUP
    position = before + row
    live = (row < stop) & (sharer < SHARING)
    tile = first.to(tl.int64) * HEADS + kv_head * SHARING  # its first row and head
    head = column // GROUP * HEADS + sharer
    dim = tl.arange(0, WIDTH)
    inside = live[None, :] & (dim < DIM)[:, None]
    spot = head[None, :] * DIM + dim[:, None]

    # Queries, each divided by a power of two, so that any of them fits fp16.
    x = tl.load(q + tile * DIM + spot, mask=inside, other=0.0).to(tl.float32) * scale
    power = tl.max(tl.abs(x), axis=0).to(tl.int32, bitcast=True) & 0x7F800000
    power = tl.minimum(tl.maximum(power, 0x01000000), 0x7E000000)
    x = x * (0x7F000000 - power).to(tl.float32, bitcast=True)[None, :]
    power = power.to(tl.float32, bitcast=True)
    x = x.to(k_codes.dtype.element_ty if K_BITS == 16 else tl.float16)
    x0, x1, x2, x3 = parts(x, K_BITS, WIDTH, COLUMNS)
    if K_BITS < 16:
        # sum(q), by the tensor core, whose order does not hang on the tile.
        q_sum = tl.dot(tl.full((16, WIDTH), 1.0, tl.float16), x)
        if K_BITS == 4:
            x0 *= 16.0  # the nibbles that x1 and x3 meet weigh 16
            x2 *= 16.0
        UNIT: tl.constexpr = (2.0**-24 if SUBNORMAL else 1.0) * (16 if K_BITS == 4 else 1)
        q_sum = tl.max(q_sum, axis=0) * UNIT
        power = power * (1.0 / UNIT)

    low = 0
    if WINDOWED:
        low = tl.maximum(before + first - window + 1, 0)
    high = before + tl.minimum(first + ROWS, stop)
    first_split = low // SPLIT
    last_split = (high + SPLIT - 1) // SPLIT
    token = tl.arange(0, STEP)
    table = page_table + sequence.to(tl.int64) * max_pages
    all_top = tl.full((COLUMNS,), NOTHING, tl.float32)
    all_sum = tl.zeros((COLUMNS,), tl.float32)
    if (not SPREAD) & (last_split <= first_split):
        tl.store(out + tile * DIM + spot, tl.zeros((WIDTH, COLUMNS), tl.float32), mask=inside)

    for split in range(first_split + tl.program_id(2), last_split, tl.num_programs(2)):
        top = tl.full((COLUMNS,), NOTHING, tl.float32)
        p_sum = tl.zeros((COLUMNS,), tl.float32)
        rest = tl.zeros((COLUMNS,), tl.float32)
        rounded = tl.zeros((16, COLUMNS), tl.float32)
        o0 = tl.zeros((V_WORDS, COLUMNS), tl.float32)
        o1 = tl.zeros((V_WORDS, COLUMNS), tl.float32)
        o2 = tl.zeros((V_WORDS, COLUMNS), tl.float32)
        o3 = tl.zeros((V_WORDS, COLUMNS), tl.float32)
        begin = tl.maximum(split * SPLIT, low // STEP * STEP)
        end = tl.minimum(split * SPLIT + SPLIT, high)
        for start in tl.range(begin, end, STEP, num_stages=STAGES):
            t = start + token
            seen = (t >= low) & (t < high)
            base, place = find(table, start, t, seen, kv_head, KV_HEADS, PAGE, STEP)
            words = fetch(k_codes, base, place, seen, DIM, K_BITS, K_WORDS, True)
            y = score(words, x0, x1, x2, x3, K_BITS, SUBNORMAL, INTERPRETED)
            if K_BITS < 16:
                s = tl.load(k_scale + base + place).to(tl.float32)
                o = tl.load(k_offset + base + place).to(tl.float32)
                y = tl.fma(y, s[:, None], o[:, None] * q_sum[None, :])
            hidden = t[:, None] > position[None, :]
            if WINDOWED:
                hidden |= t[:, None] <= position[None, :] - window
            y = tl.where(hidden, NOTHING, y)

            words = fetch(v_codes, base, place, seen, DIM, V_BITS, V_WORDS, False)
            if V_BITS < 16:
                s = tl.where(seen, tl.load(v_scale + base + place), 0.0).to(tl.float32)
                o = tl.where(seen, tl.load(v_offset + base + place), 0.0).to(tl.float32)
                # The exponents are taken against p * v_scale, which must fit fp16; log2 need not
                # be exact for that, and s's own bits are log2(s) to within 0.09.
                log = s.to(tl.int32, bitcast=True).to(tl.float32) * 2.0**-23 - 127.0
                reach = tl.fma(y, power[None, :], log[:, None])
            else:
                reach = y * power[None, :]
            new_top = tl.maximum(top, tl.max(reach, axis=0))
            alpha = rescale(top, new_top)
            top = new_top
            p = tl.exp2(tl.fma(y, power[None, :], tl.where(top == NOTHING, 0.0, -top)[None, :]))
            p_sum = p_sum * alpha + tl.sum(p, axis=0)
            if V_BITS < 16:
                middle = tl.fma(s, MIDDLE, o)
                rest = rest * alpha + tl.sum(p * middle[:, None], axis=0)
                p = (p * s[:, None]).to(tl.float16)
                rounded = tl.dot(tl.full((16, STEP), 1.0, tl.float16), p, rounded * alpha[None, :])
            else:
                p = p.to(v_codes.dtype.element_ty)
            o0, o1, o2, o3 = mix(words, p, o0, o1, o2, o3, alpha, V_BITS, SUBNORMAL, INTERPRETED)

        if V_BITS < 16:
            # What rounding p * v_scale to fp16 took or gave, is given back at the middle code.
            rest -= MIDDLE * tl.max(rounded, axis=0)
            o0 = tl.fma(o0, EVEN, rest[None, :])
            o1 = tl.fma(o1, ODD, rest[None, :])
            o2 = tl.fma(o2, EVEN, rest[None, :])
            o3 = tl.fma(o3, ODD, rest[None, :])
        mixed = in_order(o0, o1, o2, o3, V_BITS, WIDTH, COLUMNS)
        if SPREAD:
            slot = tile + (split % slots).to(tl.int64) * rows * HEADS
            tl.store(out + slot * DIM + spot, mixed, mask=inside)
            tl.store(tops + slot + head, top, mask=live)
            tl.store(sums + slot + head, p_sum, mask=live)
        else:
            all_top, all_sum, old, new = fold(all_top, all_sum, top, p_sum)
            later = tl.full((COLUMNS,), split, tl.int32) > first_split
            earlier = tl.load(out + tile * DIM + spot, mask=inside & later[None, :], other=0.0)
            total = tl.fma(mixed, new[None, :], earlier * old[None, :])
            if split == last_split - 1:
                total *= tl.where(all_sum == 0, 0.0, 1.0 / all_sum)[None, :]
            tl.store(out + tile * DIM + spot, total, mask=inside)
            tl.debug_barrier()  # the next split reads what this one has stored
