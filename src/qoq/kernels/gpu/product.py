"""The Triton kernel of linear: int8 rows times packed weights, exact sums, then the epilogue.

Weights are the left operand: output channels lie along the long side of a tensor core's tile and
tokens along its short one, so that few tokens cost little, and codes are unpacked in registers
straight into the product. ``tiles`` tells how they lie in memory.
"""

import triton
import triton.language as tl


@triton.jit
def low_codes(pairs, scale, offset, INTERPRETED: tl.constexpr):
    """int8 of low nibbles: the code itself, or (in groups) code * scale + offset - 128.

    ``pairs`` uint8. ``offset`` repeats its byte four times: four codes are scaled and shifted by
    one multiply-add of their 32-bit word, which no byte of it ever carries out of.
    """
    if INTERPRETED:  # the interpreter knows no assembly
        codes = pairs & 15
        if scale is not None:
            codes = (codes * scale + offset).to(tl.uint8) ^ 128
        codes = codes.to(tl.int8, bitcast=True)
    elif scale is None:
        codes = tl.inline_asm_elementwise(
            "and.b32 $0, $1, 0x0F0F0F0F;", "=r,r", [pairs], dtype=tl.int8, is_pure=True, pack=4
        )
    else:
        codes = tl.inline_asm_elementwise(
            """{
            .reg .b32 codes;
            and.b32 codes, $1, 0x0F0F0F0F;
            mad.lo.u32 codes, codes, $2, $6;
            xor.b32 $0, codes, 0x80808080;
            }""",
            "=r,r,r,r,r,r,r,r,r,r",
            [pairs, scale, offset],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )
    return codes


@triton.jit
def high_codes(pairs, scale, offset, INTERPRETED: tl.constexpr):
    """As ``low_codes`` of high nibbles; without groups they are read in place, as 16 * (code - 8):
    the packing has turned their highest bit over."""
    if INTERPRETED:
        if scale is None:
            codes = pairs & 240
        else:
            codes = ((pairs >> 4) * scale + offset).to(tl.uint8) ^ 128
        codes = codes.to(tl.int8, bitcast=True)
    elif scale is None:
        codes = tl.inline_asm_elementwise(
            "and.b32 $0, $1, 0xF0F0F0F0;", "=r,r", [pairs], dtype=tl.int8, is_pure=True, pack=4
        )
    else:
        codes = tl.inline_asm_elementwise(
            """{
            .reg .b32 codes;
            shr.u32 codes, $1, 4;
            and.b32 codes, codes, 0x0F0F0F0F;
            mad.lo.u32 codes, codes, $2, $6;
            xor.b32 $0, codes, 0x80808080;
            }""",
            "=r,r,r,r,r,r,r,r,r,r",
            [pairs, scale, offset],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )
    return codes


@triton.jit
def gather(acc, partials, FIRST: tl.constexpr, CHANNELS: tl.constexpr):
    """``acc`` and what the programs of its tile have summed, [programs, channels, tokens]: all of
    them, round from the one ``FIRST`` after this one."""
    ROWS: tl.constexpr = acc.shape[0]
    TOKENS: tl.constexpr = acc.shape[1]
    inner = tl.arange(0, ROWS)[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
    programs = tl.num_programs(1)
    program = tl.program_id(1) + FIRST
    end = tl.program_id(1) + programs
    # A loop of unknown length is not unrolled: one tile at a time is all that registers hold.
    while program < end:
        at = partials + program % programs * (CHANNELS * TOKENS) + inner
        acc += tl.load(at, cache_modifier=".cg")
        program += 1
    return acc


@triton.jit
def finish(
    acc,
    channel,
    token,
    act_scale,
    row_sum,
    scale,
    offset,
    bias,
    out,
    m,
    N: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Exact sums int32 [channels, tokens] to ``out`` [m, N], by the oracle's operations in its
    order; sums themselves where ``out`` is int32. ``WHOLE``: every channel is one of the N."""
    live = token < m
    if out.dtype.element_ty == tl.int32:
        y = acc
    else:
        act = tl.load(act_scale + token, mask=live, other=0.0)[None, :]
        y = acc.to(tl.float32)
        if offset is not None:
            sums = tl.load(row_sum + token, mask=live, other=0).to(tl.float32)[None, :]
            y = y * tl.load(scale + channel)[:, None] + tl.load(offset + channel)[:, None] * sums
            y = y * act
        else:
            y = y * act * tl.load(scale + channel)[:, None]
        if bias is not None:
            y += tl.load(bias + channel, mask=channel < N, other=0.0).to(tl.float32)[:, None]
    # Channels are neighbours in memory: the transposed tile is laid out anew, through shared
    # memory, and stored in whole vectors.
    y = tl.trans(y.to(out.dtype.element_ty))
    mask = live[:, None]
    if not WHOLE:
        mask = mask & (channel < N)[None, :]
    tl.store(out + token.to(tl.int64)[:, None] * N + channel[None, :], y, mask=mask)


@triton.jit(
    do_not_specialize=["m"],
    do_not_specialize_on_alignment=["act_scale", "row_sum", "bias", "counters"],
)
def product(
    codes,  # int8 [m, K]
    act_scale,  # fp32 [m]
    row_sum,  # int32 [m]
    tiles,  # uint8 pairs of nibbles [bands, steps, BAND, WIDTH], or int8 codes
    groups,  # int32 [bands, steps, BAND], or None
    scale,  # fp32, of every channel of every band
    offset,  # likewise, of weights with one offset per channel; else None
    bias,  # any float [N], or None
    out,  # [m, N]: float, or int32 for the sums themselves
    partials,  # int32 [tiles of the output, SPLITS, channels, TOKENS], or None
    counters,  # int32, one per tile of the output, zero; or None
    m,
    N: tl.constexpr,
    K: tl.constexpr,
    PAIRED: tl.constexpr,  # two codes in a byte
    BAND: tl.constexpr,
    WIDTH: tl.constexpr,  # input channels of a step
    ROWS: tl.constexpr,  # bytes across: of a band, those of this program
    TOKENS: tl.constexpr,
    SPLITS: tl.constexpr,  # programs that share one tile of the output
    CROWD: tl.constexpr,  # tiles of tokens that pass by a tile of weights while it is in L2
    INTERPRETED: tl.constexpr,
):
    """One tile of the output, or one of SPLITS runs of input channels of it."""
    STEPS: tl.constexpr = (K + WIDTH - 1) // WIDTH
    TURNS: tl.constexpr = (STEPS + SPLITS - 1) // SPLITS
    EVEN: tl.constexpr = STEPS % SPLITS == 0
    CHANNELS: tl.constexpr = 2 * ROWS if PAIRED else ROWS
    WHOLE: tl.constexpr = N % (2 * BAND if PAIRED else BAND) == 0
    token_tiles = tl.cdiv(m, TOKENS)
    row_tiles = tl.cdiv(N, 2 * BAND if PAIRED else BAND) * (BAND // ROWS)
    tile = tl.program_id(0)
    before = tile // (CROWD * row_tiles) * CROWD
    crowd = tl.minimum(token_tiles - before, CROWD)
    inside = tile - before * row_tiles
    first_row = inside // crowd * ROWS
    first_step = tl.program_id(1) * TURNS

    token = (before + inside % crowd) * TOKENS + tl.arange(0, TOKENS)
    live = token < m
    column = tl.arange(0, WIDTH)
    # In rows of `tiles`. No remainders here: the compiler must see how addresses divide.
    place = first_row + first_row // BAND * ((STEPS - 1) * BAND) + first_step * BAND
    tile_at = (
        tiles + place.to(tl.int64) * WIDTH + (tl.arange(0, ROWS)[:, None] * WIDTH + column[None, :])
    )
    codes_at = codes + token.to(tl.int64)[None, :] * K + (first_step * WIDTH + column)[:, None]
    if groups is not None:
        groups_at = groups + place + tl.arange(0, ROWS)

    low = tl.zeros((ROWS, TOKENS), tl.int32)
    high = tl.zeros((ROWS, TOKENS), tl.int32)
    for turn in range(TURNS):
        step = first_step + turn
        mask = live[None, :]
        if not EVEN or K % WIDTH != 0:
            mask = mask & (column[:, None] < K - step * WIDTH)
        x = tl.load(codes_at, mask=mask, other=0)
        # Past the last step there are no weights; within it, past K, zeros of x meet any weight.
        here = tl.full((ROWS,), step, tl.int32) < STEPS
        w = tl.load(tile_at) if EVEN else tl.load(tile_at, mask=here[:, None], other=0)
        if groups is not None:
            g = tl.load(groups_at) if EVEN else tl.load(groups_at, mask=here, other=0)
            low_scale = (g & 255)[:, None]
            low_offset = ((g >> 8 & 255) * 0x01010101)[:, None]
            high_scale = (g >> 16 & 255)[:, None]
            high_offset = ((g >> 24 & 255) * 0x01010101)[:, None]
            low_x = low_codes(w, low_scale, low_offset, INTERPRETED)
            low = tl.dot(low_x, x, low, out_dtype=tl.int32)
            high_x = high_codes(w, high_scale, high_offset, INTERPRETED)
            high = tl.dot(high_x, x, high, out_dtype=tl.int32)
            groups_at += BAND
        elif PAIRED:
            low = tl.dot(low_codes(w, None, None, INTERPRETED), x, low, out_dtype=tl.int32)
            high = tl.dot(high_codes(w, None, None, INTERPRETED), x, high, out_dtype=tl.int32)
        else:
            low = tl.dot(w, x, low, out_dtype=tl.int32)
        tile_at += BAND * WIDTH
        codes_at += WIDTH

    last = True
    if SPLITS > 1:
        inner = tl.arange(0, ROWS)[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
        partials += tile.to(tl.int64) * (SPLITS * CHANNELS * TOKENS)
        at = partials + tl.program_id(1) * (CHANNELS * TOKENS) + inner
        tl.store(at, low)
        if PAIRED:
            tl.store(at + ROWS * TOKENS, high)
        # All threads' sums are stored before one of them counts this program in. The last one
        # leaves the counter at zero.
        tl.debug_barrier()
        last = tl.atomic_add(counters + tile, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
        if last:
            tl.store(counters + tile, 0)
    if last:
        channel = first_row + tl.arange(0, ROWS)
        if PAIRED:
            channel += first_row // BAND * BAND
        if SPLITS > 1:
            low = gather(low, partials, 1, CHANNELS)
        finish(low, channel, token, act_scale, row_sum, scale, offset, bias, out, m, N, WHOLE)
        if PAIRED:
            if SPLITS > 1:
                # Its own sums too: by now the registers that held them were needed.
                high = tl.zeros((ROWS, TOKENS), tl.int32)
                high = gather(high, partials + ROWS * TOKENS, 0, CHANNELS)
            if groups is None:
                high = (high >> 4) + 8 * tl.load(row_sum + token, mask=live, other=0)[None, :]
            channel += BAND
            finish(high, channel, token, act_scale, row_sum, scale, offset, bias, out, m, N, WHOLE)
