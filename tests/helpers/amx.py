"""Tile instructions, run one by one as the machine code that `as` makes of them (tests/amx)."""

import ctypes
import functools
import mmap
import os
import secrets
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

# As x86 numbers them.
REGISTERS = [
    "rax",
    "rcx",
    "rdx",
    "rbx",
    "rsp",
    "rbp",
    "rsi",
    "rdi",
    *(f"r{i}" for i in range(8, 16)),
]
COUNTS = ["loadconfig", "storeconfig", "release", "zero", "load", "store", "multiply", "in_use"]
SAVED = ["rbx", "rbp", "r12", "r13", "r14", "r15"]


@functools.cache
def emulator() -> ctypes.CDLL:
    """tests/amx/emulator.cpp, at work: QOQ_AMX_EMULATOR names its shared library."""
    library = ctypes.CDLL(os.environ["QOQ_AMX_EMULATOR"])
    library.qoq_emulate_amx.restype = ctypes.c_bool
    library.qoq_amx_count.restype = ctypes.c_int64
    return library


def counts() -> dict[str, int]:
    """How many instructions of each kind were carried out; how many threads have tiles now."""
    return {name: emulator().qoq_amx_count(i) for i, name in enumerate(COUNTS)}


@functools.cache
def assembled(instructions: str, own_stack: bool) -> bytes:
    """A function: all registers set, the instructions run, all registers written down behind it.

    The code ends with what the registers are set to (zeros here) and room for what they are then.
    """
    lines = [f"push %{r}" for r in SAVED]
    lines += ["mov %rsp, stack(%rip)"]
    for i, r in enumerate(REGISTERS):
        if r != "rsp" or own_stack:
            lines.append(f"mov in+{8 * i}(%rip), %{r}")
    lines += [instructions]
    lines += [f"mov %{r}, out+{8 * i}(%rip)" for i, r in enumerate(REGISTERS)]
    lines += ["mov stack(%rip), %rsp", *(f"pop %{r}" for r in reversed(SAVED)), "ret"]
    lines += [".balign 64", "stack: .quad 0", "in: .skip 128", "out: .skip 128", ""]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        subprocess.run(["as", "--64", "-o", out, "-"], input="\n".join(lines).encode(), check=True)
        subprocess.run(["objcopy", "-O", "binary", "-j", ".text", out], check=True)
        return out.read_bytes()


def program(instructions: str, registers: dict[str, int]) -> bytes:
    """Machine code for ``execute``; registers that are not named hold random numbers."""
    code = assembled(instructions, "rsp" in registers)
    values = [registers.get(r, secrets.randbits(64)) % 2**64 for r in REGISTERS]
    return code[:-256] + struct.pack("16Q", *values) + code[-128:]


def execute(code: bytes) -> None:
    """Run a program in this thread. No register may change (tile instructions change none)."""
    if not emulator().qoq_emulate_amx():
        raise OSError("no handler of SIGILL could be set")
    page = mmap.mmap(-1, len(code), prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(code)
    ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
    before, after = (struct.unpack("16Q", page[-n : len(page) - n + 128]) for n in (256, 128))
    for name, old, new in zip(REGISTERS, before, after, strict=True):
        if new != old and name != "rsp":
            raise AssertionError(f"{name} was {old:x} and is {new:x}")


def run(instructions: str, **registers: int) -> None:
    execute(program(instructions, registers))


def dies(instructions: str, before: str = "pass") -> tuple[int, str]:
    """Exit status and complaint of a process that runs this; ``before`` is Python run first."""
    script = f"{before}\nfrom helpers.amx import execute\nexecute(bytes.fromhex(input()))"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=program(instructions, {}).hex(),
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stderr


def config(shapes: list[tuple[int, int]], palette: int = 1) -> bytes:
    """What ldtilecfg reads: (rows, bytes of a row) of the first tiles; the others are not used."""
    rows, row_bytes = [r for r, _ in shapes], [b for _, b in shapes]
    rest = [0] * (16 - len(shapes))
    return struct.pack("<2B14x16H16B", palette, 0, *row_bytes, *rest, *rows, *rest)
