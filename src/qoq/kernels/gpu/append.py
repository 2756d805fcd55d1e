"""The Triton kernel of kv_append: RoPE, centering, rotation and quantization of head vectors.

Every float operation is the oracle's, in its order and singly rounded (launch it without FMA
fusion), so pages and queries equal the oracle's to the bit. The rotation sums in fp64, where no
order of the sum survives rounding to fp32 (but for one sum in 2^28 or so).
"""

import triton
import triton.language as tl

LARGEST_HALF = tl.constexpr(65504.0)
TO_INTEGER = tl.constexpr(1.5 * 2**23)  # added and taken off, it rounds to nearest even


@triton.jit
def turned(x, cos, sin, token, dim, live, DIM: tl.constexpr, PAIRS: tl.constexpr):
    """fp32 [tokens, dims] of vectors at x [tokens], turned by their angles."""
    inside = live[:, None] & (dim < DIM)[None, :]
    pair = inside & (dim < 2 * PAIRS)[None, :]
    first = dim < PAIRS
    other = tl.where(first, dim + PAIRS, dim - PAIRS)
    angle = token[:, None] * PAIRS + tl.where(first, dim, dim - PAIRS)[None, :]
    one = tl.load(x[:, None] + dim[None, :], mask=inside, other=0.0).to(tl.float32)
    two = tl.load(x[:, None] + other[None, :], mask=pair, other=0.0).to(tl.float32)
    c = tl.load(cos + angle, mask=pair, other=1.0).to(tl.float32)
    s = tl.load(sin + angle, mask=pair, other=0.0).to(tl.float32)
    two *= s
    return tl.where(pair, one * c + tl.where(first[None, :], -two, two), one)


@triton.jit
def prepared(
    x,
    cos,
    sin,
    token,
    live,
    center,
    rotation,
    DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """fp32 [TOKENS, WIDTH]: turned, minus ``center`` [DIM] and times ``rotation`` if they are."""
    dim = tl.arange(0, WIDTH)
    if rotation is None:
        y = turned(x, cos, sin, token, dim, live, DIM, PAIRS)
        if center is not None:
            y -= tl.load(center + dim, mask=dim < DIM, other=0.0)[None, :]
    else:
        exact = tl.zeros((TOKENS, WIDTH), tl.float64)
        for start in range(0, DIM, 16):
            some = start + tl.arange(0, 16)
            part = turned(x, cos, sin, token, some, live, DIM, PAIRS)
            if center is not None:
                part -= tl.load(center + some, mask=some < DIM, other=0.0)[None, :]
            inside = (some < DIM)[:, None] & (dim < DIM)[None, :]
            matrix = tl.load(rotation + some[:, None] * DIM + dim[None, :], mask=inside, other=0.0)
            exact = tl.dot(part.to(tl.float64), matrix.to(tl.float64), exact, out_dtype=tl.float64)
        y = exact.to(tl.float32)
    return y


@triton.jit
def put(
    y,
    codes,
    scales,
    offsets,
    row,
    live,
    BITS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Vectors y [TOKENS, WIDTH] into rows of one half of the pages."""
    dim = tl.arange(0, WIDTH)
    inside = (dim < DIM)[None, :]
    if BITS == 16:
        place = codes + row[:, None] * DIM + dim[None, :]
        tl.store(place, y.to(codes.dtype.element_ty), mask=live[:, None] & inside)
    else:
        LEVELS: tl.constexpr = 2.0**BITS - 1
        low = tl.min(tl.where(inside, y, float("inf")), axis=1)
        high = tl.max(tl.where(inside, y, float("-inf")), axis=1)
        low = tl.minimum(tl.maximum(low, -LARGEST_HALF), LARGEST_HALF)
        high = tl.minimum(tl.maximum(high, -LARGEST_HALF), LARGEST_HALF)
        # A vector with a NaN is seen to be bad: scale 1, offset NaN.
        bad = tl.max((y != y).to(tl.int32), axis=1) > 0
        low = tl.where(bad, float("nan"), low)
        scale = tl.div_rn(high, LEVELS) - tl.div_rn(low, LEVELS)
        scale = tl.where(scale > LARGEST_HALF, LARGEST_HALF, scale).to(tl.float16)
        scale = tl.where(scale > 0, scale, 1.0).to(tl.float16)
        offset = low.to(tl.float16)
        tl.store(scales + row, scale, mask=live)
        tl.store(offsets + row, offset, mask=live)
        ratio = tl.div_rn(
            y - offset.to(tl.float32)[:, None],
            tl.broadcast_to(scale.to(tl.float32)[:, None], (TOKENS, WIDTH)),
        )
        ratio = tl.where(ratio > 0, tl.where(ratio < LEVELS, ratio, LEVELS), 0.0)
        number = ((ratio + TO_INTEGER) - TO_INTEGER).to(tl.int32)
        if BITS == 8:
            place = codes + row[:, None] * DIM + dim[None, :]
            tl.store(place, number.to(tl.uint8), mask=live[:, None] & inside)
        else:
            even, odd = tl.split(tl.reshape(number, (TOKENS, WIDTH // 2, 2)))
            byte = tl.arange(0, WIDTH // 2)
            place = codes + row[:, None] * (DIM // 2) + byte[None, :]
            inside = live[:, None] & (byte < DIM // 2)[None, :]
            tl.store(place, (even | (odd << 4)).to(tl.uint8), mask=inside)


@triton.jit(do_not_specialize=["tokens", "slot_count"], do_not_specialize_on_alignment=["slots"])
def append(
    q,
    k,
    v,
    cos,
    sin,
    slots,
    center,
    rotation,
    out,
    k_codes,
    k_scale,
    k_offset,
    v_codes,
    v_scale,
    v_offset,
    tokens,
    slot_count,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    PAGE: tl.constexpr,
    K_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """A block of tokens: one query head of theirs, or key and value of one KV head.

    x_row and x_head are strides in elements. Slots outside the pages are left out, as -1 is.
    """
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    live = token < tokens
    dim = tl.arange(0, WIDTH)
    head = tl.program_id(1)
    if head < HEADS:
        # A name for each: addresses of different types cannot share one.
        queries = q + token * q_row + head * q_head
        y = prepared(queries, cos, sin, token, live, None, rotation, DIM, PAIRS, WIDTH, TOKENS)
        place = out + (token[:, None] * HEADS + head) * DIM + dim[None, :]
        tl.store(place, y, mask=live[:, None] & (dim < DIM)[None, :])
    else:
        head -= HEADS
        slot = tl.load(slots + token, mask=live, other=-1)
        live = (slot >= 0) & (slot < slot_count)
        row = (slot // PAGE * KV_HEADS + head) * PAGE + slot % PAGE
        keys = k + token * k_row + head * k_head
        if center is not None:
            center += head * DIM
        y = prepared(keys, cos, sin, token, live, center, rotation, DIM, PAIRS, WIDTH, TOKENS)
        put(y, k_codes, k_scale, k_offset, row, live, K_BITS, DIM, WIDTH, TOKENS)
        values = v + token * v_row + head * v_head
        inside = live[:, None] & (dim < DIM)[None, :]
        y = tl.load(values[:, None] + dim[None, :], mask=inside, other=0.0).to(tl.float32)
        put(y, v_codes, v_scale, v_offset, row, live, V_BITS, DIM, WIDTH, TOKENS)
