"""What looks at machine code sees what is there: else its tests would pass on anything."""

import dataclasses

import pytest

from helpers.triton_code import ARCHS, Code, Compiler, Instruction, Kernel, overwritten, parse_sass


def sample(**options: int) -> Kernel:
    pointers = {"w": "*u8", "x": "*i8", "y": "*i32"}
    constants = {"K": 8192, "TOKENS": 64}
    return Kernel("helpers.triton_samples:masked_product", pointers, constants, options)


@pytest.fixture(scope="module")
def codes(compiler: Compiler) -> dict[int, Code]:
    return dict(zip(ARCHS, compiler([sample(num_warps=4)])[0], strict=True))


def test_each_architecture_gets_its_own_instructions(codes: dict[int, Code]) -> None:
    assert codes[90].count("IGMMA") == 4
    assert "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8" in codes[90].ptx
    for arch in (80, 89):
        assert codes[arch].count("IMMA") % 32 == 0 < codes[arch].count("IMMA")
        assert codes[arch].count("IGMMA") == 0
    for code in codes.values():
        assert 32 < code.registers < 256
        assert code.stack == code.spills == 0
        assert code.shared >= 64 * 128


def test_a_loop_is_found(codes: dict[int, Code]) -> None:
    loops = list(codes[90].loops())
    assert [sum(i.opcode == "IGMMA" for i in loop) for loop in loops] == [4]
    assert sum(i.opcode == "LOP3" for i in loops[0]) >= 16


def test_spills_are_counted(compiler: Compiler) -> None:
    ((code,),) = compiler([sample(num_warps=4, maxnreg=40)], [80])
    assert code.spills
    assert code.stack


def test_what_does_not_compile_says_why(compiler: Compiler) -> None:
    broken = dataclasses.replace(sample(), constants={"K": 8192, "TOKENS": 3})
    with pytest.raises(AssertionError, match="power of 2"):
        compiler([broken], [90])


def test_operands_written_early_are_found(codes: dict[int, Code]) -> None:
    sass = codes[90].sass
    assert overwritten(sass) == []
    place = next(n for n, i in enumerate(sass) if i.opcode == "IGMMA")
    reads = int(sass[place].operands[1].removeprefix("R"))
    for planted in (
        Instruction(0, "", "LOP3.LUT", (f"R{reads + 3}", "R1", "0xf", "RZ", "0xc0", "!PT")),
        Instruction(0, "P0", "LDSM.16.M88.4", (f"R{reads - 3}", "[R2]")),
    ):
        assert overwritten([*sass[: place + 1], planted, *sass[place + 1 :]]) == [planted]
        assert overwritten([*sass[:place], planted, *sass[place:]]) == []


@pytest.mark.parametrize(
    ("line", "writes"),
    [
        ("IGMMA.64x64x32.S8.S8 R24, R88, gdesc[UR16], R24", range(24, 56)),
        ("IMMA.16832.S8.S8 R4, R8.ROW, R12.COL, R4", range(4, 8)),
        ("LDSM.16.M88.4 R8, [R2+0x400]", range(8, 12)),
        ("@!P0 LDG.E.128 R8, desc[UR4][R2.64]", range(8, 12)),
        ("IMAD.WIDE R2, R3, 0x4, R6", range(2, 4)),
        ("CS2R R56, SRZ", range(56, 58)),
        ("LOP3.LUT P0, R7, R1, 0xf, RZ, 0xc0, !PT", range(7, 8)),
        ("SHFL.BFLY PT, R5, R1, 0x1, 0x1f", range(5, 6)),
        ("ISETP.GE.AND P0, PT, R1, R2, PT", range(0)),
        ("STG.E.128 desc[UR4][R2.64], R8", range(0)),
        ("LDGSTS.E.BYPASS.128 [R1+0x800], desc[UR4][R2.64]", range(0)),
        ("WARPGROUP.DEPBAR.LE gsb0, 0x0", range(0)),
    ],
)
def test_what_an_instruction_writes(line: str, writes: range) -> None:
    (one,) = parse_sass(f"  /*0e70*/   {line} ;   /* 0x01e0001058187df1 */")
    assert one.address == 0x0E70
    assert one.writes == writes
