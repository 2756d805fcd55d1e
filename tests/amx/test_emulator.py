"""The emulator alone, instruction by instruction, against numpy; shapes and registers at random."""

import ctypes
import mmap
import signal
import threading

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from helpers.amx import REGISTERS, config, counts, dies, run

ROWS, ROW_BYTES = st.integers(1, 16), st.integers(1, 64)
FULL = [(16, 64)] * 8
MIDDLE = 1 << 16  # with room below for the frame of a signal, should the stack pointer point here
BELOW_2GB = 0x40  # MAP_32BIT


def at(array: np.ndarray, offset: int = 0) -> int:
    return array.ctypes.data + offset


def configure(shapes: list[tuple[int, int]]) -> None:
    memory = np.frombuffer(config(shapes), dtype=np.uint8)
    run("ldtilecfg (%rsi)", rsi=at(memory))


def put(tile: int, values: np.ndarray) -> None:
    """Load a contiguous matrix whose rows are the tile's."""
    stride = values[0].nbytes
    run(f"tileloadd (%rsi,%rdi,1), %tmm{tile}", rsi=at(values), rdi=stride)


def got(tile: int, rows: int, row_bytes: int) -> np.ndarray:
    """What the tile holds; bytes around it must stay as they are."""
    out = np.full((18, 80), 0x5A, dtype=np.uint8)
    run(f"tilestored %tmm{tile}, (%rsi,%rdi,1)", rsi=at(out, 80), rdi=80)
    inside = out[1 : rows + 1, :row_bytes].copy()
    out[1 : rows + 1, :row_bytes] = 0x5A
    assert (out == 0x5A).all()
    return inside


def loaded(
    rows: int, row_bytes: int, base: str, index: str | None, scale: int, stride: int, far: int
) -> None:
    """Load by far(base, index, scale), rows ``stride`` times ``scale`` bytes apart; compare."""
    memory = np.random.default_rng().integers(0, 256, 2 * MIDDLE, dtype=np.uint8)
    step = stride * scale if index else 0
    want = np.stack([memory[MIDDLE + r * step :][:row_bytes] for r in range(rows)])
    registers = {base: (at(memory, MIDDLE) - far) % 2**64}
    if index:
        registers[index] = stride % 2**64
    tile = int(np.random.default_rng().integers(8))
    configure([(rows, row_bytes)] * 8)
    where = f"{far}(%{base},%{index},{scale})" if index else f"{far}(%{base})"
    for name in ("tileloadd", "tileloaddt1"):
        run(f"tilezero %tmm{tile}")
        run(f"{name} {where}, %tmm{tile}", **registers)
        assert (got(tile, rows, row_bytes) == want).all()
    out = np.zeros_like(memory)
    registers[base] = (at(out, MIDDLE) - far) % 2**64
    run(f"tilestored %tmm{tile}, {where}", **registers)
    again = np.zeros_like(memory)
    for r in range(rows):
        again[MIDDLE + r * step :][:row_bytes] = want[r]
    # Below the stack pointer lies what the signal left there.
    first = MIDDLE - far - 128 if base == "rsp" else 0
    assert (out[first:] == again[first:]).all()


@given(
    rows=ROWS,
    row_bytes=ROW_BYTES,
    base=st.sampled_from(REGISTERS),
    index=st.sampled_from([None, *(r for r in REGISTERS if r != "rsp")]),
    scale=st.sampled_from([1, 2, 4, 8]),
    stride=st.integers(-300, 300),
    far=st.one_of(st.just(0), st.integers(-128, 127), st.integers(-(1 << 31), (1 << 31) - 1)),
)
def test_loads_and_stores(
    rows: int, row_bytes: int, base: str, index: str | None, scale: int, stride: int, far: int
) -> None:
    assume(base != index)
    if base == "rsp":  # which has to point below the rows, into memory
        stride, far = abs(stride), abs(far) % 1000
    loaded(rows, row_bytes, base, index, scale, stride, far)


@pytest.mark.parametrize("far", [0, -8, 1000])
@pytest.mark.parametrize("register", REGISTERS)
def test_every_register(register: str, far: int) -> None:
    far = abs(far) if register == "rsp" else far
    loaded(16, 64, register, "rax" if register != "rax" else "r9", 1, 64, far)
    loaded(5, 12, register, None, 1, 0, far)
    if register != "rsp":
        loaded(16, 64, "rbp" if register != "rbp" else "r13", register, 4, 17, far)


def test_no_base_at_all() -> None:
    page = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | BELOW_2GB)
    where = ctypes.addressof(ctypes.c_char.from_buffer(page))
    page.write(bytes(range(200)))
    configure([(3, 8)])
    run(f"tileloadd {where}(,%r12,2), %tmm0", r12=20)
    assert (got(0, 3, 8) == np.add.outer([0, 40, 80], np.arange(8))).all()


def test_configurations_from_every_kind_of_address() -> None:
    first, second = config([(2, 3), (4, 5)]), config([(16, 64)] * 8)
    memory = np.frombuffer(first + bytes(64) + second, dtype=np.uint8)
    out = np.zeros(64, dtype=np.uint8)
    for where, registers in (
        ("(%rsi)", {"rsi": at(memory)}),
        ("-64(%r13)", {"r13": at(memory, 64)}),
        ("(%r12)", {"r12": at(memory)}),
        ("1000(%rbx,%r15,8)", {"rbx": at(memory) - 3000, "r15": 250}),
    ):
        run(f"ldtilecfg {where}\nsttilecfg (%rdi)", **registers, rdi=at(out))
        assert out.tobytes() == first
    bytes_of = ", ".join(map(str, second))
    run(f"ldtilecfg 1f(%rip)\njmp 2f\n1: .byte {bytes_of}\n2: sttilecfg (%rdi)", rdi=at(out))
    assert out.tobytes() == second


NUMBERS = {"s": np.int8, "u": np.uint8}


@pytest.mark.parametrize("signs", ["ss", "su", "us", "uu"])
@given(m=ROWS, n=st.integers(1, 16), k=st.integers(1, 16), data=st.data())
def test_products(signs: str, m: int, n: int, k: int, data: st.DataObject) -> None:
    tiles = data.draw(st.permutations(range(8)))
    c, a, b = tiles[:3]
    random = np.random.default_rng(data.draw(st.integers(0, 1 << 30)))
    left, right = (
        random.choice([0, 1, 127, 128, 129, 255, *range(256)], size).astype(np.uint8)
        for size in ((m, 4 * k), (k, 4 * n))
    )
    sums = random.integers(-(1 << 31), 1 << 31, (m, n)).astype(np.int32)
    shapes = [(16, 64)] * 8
    shapes[c], shapes[a], shapes[b] = (m, 4 * n), (m, 4 * k), (k, 4 * n)
    configure(shapes)
    for tile, values in ((c, sums), (a, left), (b, right)):
        put(tile, values)
    run(f"tdpb{signs}d %tmm{b}, %tmm{a}, %tmm{c}")
    x = left.view(NUMBERS[signs[0]]).astype(np.int64)
    y = right.view(NUMBERS[signs[1]]).astype(np.int64).reshape(k, n, 4)
    want = sums + x @ y.transpose(0, 2, 1).reshape(4 * k, n)
    assert (got(c, m, 4 * n).view(np.int32) == want.astype(np.int32)).all()
    assert (got(a, m, 4 * k) == left).all()
    assert (got(b, k, 4 * n) == right).all()


def test_zeros() -> None:
    configure(FULL)
    ones = np.ones((16, 64), dtype=np.uint8)
    for tile in range(8):
        put(tile, ones)
    run("tilezero %tmm5")
    for tile in range(8):
        assert (got(tile, 16, 64) == (tile != 5)).all()
    configure(FULL)
    assert not got(3, 16, 64).any()


def test_release_and_palette_0() -> None:
    out, none = np.ones(64, dtype=np.uint8), np.zeros(64, dtype=np.uint8)
    for end in ("tilerelease", "ldtilecfg (%rsi)"):
        before = counts()
        configure(FULL)
        assert counts()["in_use"] == 1
        run(end, rsi=at(none))
        assert counts()["in_use"] == 0
        assert counts()["storeconfig"] == before["storeconfig"]
        run("sttilecfg (%rdi)", rdi=at(out))
        assert not out.any()
        assert counts()["storeconfig"] == before["storeconfig"] + 1


def test_threads_have_tiles_of_their_own() -> None:
    configure([(1, 4)])
    put(0, np.array([[77]], dtype=np.int32))
    seen = []

    def other() -> None:
        out = np.ones(64, dtype=np.uint8)
        run("sttilecfg (%rdi)", rdi=at(out))
        configure([(2, 8)])
        put(0, np.arange(4, dtype=np.int32).reshape(2, 2))
        seen.extend([out.any(), got(0, 2, 8).view(np.int32).tolist(), counts()["in_use"]])
        run("tilerelease")

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen == [False, [[0, 1], [2, 3]], 2]
    assert got(0, 1, 4).view(np.int32) == 77


def with_config(shapes: list[tuple[int, int]], then: str, change: tuple[int, int] = (0, 1)) -> str:
    data = bytearray(config(shapes))
    data[change[0]] = change[1]
    return f"ldtilecfg 1f(%rip)\njmp 2f\n1: .byte {', '.join(map(str, data))}\n2: {then}"


PRODUCT = "tdpbsud %tmm2, %tmm1, %tmm0"
BAD = {
    "a palette above 1": with_config(FULL, "", (0, 2)),
    "reserved bytes": with_config(FULL, "", (2, 1)),
    "reserved": with_config(FULL, "", (32, 1)),
    "that are not 0": with_config(FULL, "", (63, 1)),
    "start row": with_config(FULL, "", (1, 1)),
    "more than 64 bytes": with_config([(16, 65)], ""),
    "more than 64": with_config(FULL, "", (17, 1)),
    "more than 16 rows": with_config([(17, 64)], ""),
    "only one of rows and bytes": with_config([(0, 64)], ""),
    "only one of": with_config([(16, 0)], ""),
    "before ldtilecfg": PRODUCT,
    "are used before": "tilezero %tmm0",
    "used before": "lea -4096(%rsp), %rax\nxor %ecx, %ecx\ntileloadd (%rax,%rcx,1), %tmm0",
    "without rows": with_config([(16, 64)] * 2, PRODUCT),
    "a tile without rows": with_config([(16, 64)] * 2, "tilezero %tmm7"),
    "names a tile twice": with_config(FULL, ".byte 0xc4, 0xe2, 0x72, 0x5e, 0xc1"),
    "a tile twice": with_config(FULL, ".byte 0xc4, 0xe2, 0x7a, 0x5e, 0xc1"),
    "no such tile": with_config(FULL, ".byte 0xc4, 0xe2, 0x3a, 0x5e, 0xc1"),
    "whole numbers of 4": with_config([(16, 62), (16, 64), (16, 62)], PRODUCT),
    "do not fit": with_config([(16, 64), (15, 64), (16, 64)], PRODUCT),
    "not fit": with_config([(16, 60), (16, 64), (16, 64)], PRODUCT),
    "shapes do not": with_config([(16, 64), (16, 60), (16, 64)], PRODUCT),
}


@pytest.mark.parametrize("why", BAD)
def test_what_hardware_refuses_is_refused_loudly(why: str) -> None:
    status, complaint = dies(BAD[why])
    assert why in complaint
    assert status == -signal.SIGABRT


@pytest.mark.parametrize("code", ["ud2", ".byte 0xc4, 0xe2, 0xf8, 0x49, 0xc0", ".byte 6"])
@pytest.mark.parametrize("before", ["pass", "import faulthandler; faulthandler.enable()"])
def test_other_illegal_instructions_stay_illegal(code: str, before: str) -> None:
    status, complaint = dies(code, before)
    assert status == -signal.SIGILL
    assert ("Illegal instruction" in complaint) == ("faulthandler" in before)
    assert "emulator" not in complaint
