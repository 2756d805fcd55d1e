"""Codes of KV pages as tensor core operands, and head vectors in the order of their words (Triton).

A 16-bit word of a page holds dims 4j..4j+3 in nibbles 0..3, or dims 2j and 2j+1 in bytes. A code,
masked where it stands, *is* a number in fp16, below the smallest normal one: ``code * 2^-24``, and
``code * 2^-20`` in nibbles 1 and 3. Products simply carry that power of two along.
"""

import triton
import triton.language as tl


@triton.jit
def operand(
    words,
    PART: tl.constexpr,
    BITS: tl.constexpr,
    SUBNORMAL: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """fp16 of code PART of each int16 word; 16 times as large from nibbles 1 and 3.

    SUBNORMAL: in units of 2^-24, by one AND for two codes; else in units of 1, by an OR with 1024.0
    and a subtraction. The interpreter knows no assembly.
    16-bit words pass as they are.
    """
    MASK: tl.constexpr = 0x00FF if BITS == 8 else 0x000F if PART % 2 == 0 else 0x00F0
    TWICE: tl.constexpr = (
        "0x00FF00FF" if BITS == 8 else "0x000F000F" if PART % 2 == 0 else "0x00F000F0"
    )
    if BITS == 16:
        codes = words
    elif INTERPRETED:
        codes = (words >> 8 if PART >= 8 // BITS else words) & MASK
        if not SUBNORMAL:
            codes = codes | 0x6400
    else:
        codes = packed("shr.b32 $0, $1, 8;", words) if PART >= 8 // BITS else words
        if SUBNORMAL:
            codes = packed("and.b32 $0, $1, " + TWICE + ";", codes)
        else:
            codes = packed("lop3.b32 $0, $1, " + TWICE + ", 0x64006400, 0xEA;", codes)
    if BITS < 16:
        codes = codes.to(tl.float16, bitcast=True)
        if not SUBNORMAL:
            codes -= 1024.0
    return codes


@triton.jit
def packed(ASSEMBLY: tl.constexpr, words):
    """One instruction on two 16-bit words at a time."""
    return tl.inline_asm_elementwise(
        ASSEMBLY, "=r,r", [words], dtype=tl.int16, is_pure=True, pack=2
    )


@triton.jit
def parts(x, BITS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """x [WIDTH, COLUMNS], a head vector per column -> what meets each part of the words.

    Four tensors [WIDTH * BITS / 16, COLUMNS]; those past the last part repeat it.
    """
    if BITS == 16:
        x0, x1, x2, x3 = x, x, x, x
    elif BITS == 8:
        x0, x1 = tl.split(tl.trans(tl.reshape(x, (WIDTH // 2, 2, COLUMNS)), 0, 2, 1))
        x2, x3 = x1, x1
    else:
        even, odd = tl.split(tl.trans(tl.reshape(x, (WIDTH // 4, 2, 2, COLUMNS)), 0, 3, 1, 2))
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def in_order(x0, x1, x2, x3, BITS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """The inverse of ``parts``: [WIDTH, COLUMNS]."""
    if BITS == 16:
        x = x0
    elif BITS == 8:
        x = tl.reshape(tl.trans(tl.join(x0, x1), 0, 2, 1), (WIDTH, COLUMNS))
    else:
        x = tl.join(tl.join(x0, x2), tl.join(x1, x3))
        x = tl.reshape(tl.trans(x, 0, 2, 3, 1), (WIDTH, COLUMNS))
    return x
