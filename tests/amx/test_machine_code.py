"""What the compiler made of the amx kernels, read with objdump."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

TILE_CODE = re.compile(
    r"\b(ldtilecfg|sttilecfg|tilerelease|tilezero|tileload\w*|tilestored|tdp\w+)"
)
WIDTHS = {"movb": 1, "movw": 2, "movl": 4, "movq": 8, "vmovd": 4, "vmovq": 8}
REGISTER_WIDTHS = {"z": 64, "y": 32, "x": 16, "r": 8, "e": 4}
STORE = re.compile(r"^(v?mov\w*)\s+([%$]\w+),(-?(?:0x)?[0-9a-f]*)\((%\w+)\)$")
LOADCONFIG = re.compile(r"^ldtilecfg (-?(?:0x)?[0-9a-f]*)\((%\w+)\)$")

pytestmark = pytest.mark.skipif(not shutil.which("objdump"), reason="objdump is not installed")


def functions(file: Path) -> dict[str, list[str]]:
    """The instructions of each function of an object file."""
    command = ["objdump", "-d", "--no-show-raw-insn", str(file)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    out: dict[str, list[str]] = {}
    for line in listing.splitlines():
        if name := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            lines = out.setdefault(name[1], [])
        elif "\t" in line:
            lines.append(line.split("\t", 1)[1].strip())
    return out


def objects() -> dict[str, Path]:
    """Object files of the build by the folder CMake gave their target, and their name."""
    build = Path(os.environ["QOQ_AMX_EMULATOR"]).parent / "CMakeFiles"
    return {f"{f.relative_to(build).parts[0]}/{f.name}": f for f in build.rglob("*.cpp.o")}


def tile_functions() -> dict[str, list[str]]:
    found = functions(objects()["kernels_amx.dir/kernels.cpp.o"])
    return {name: code for name, code in found.items() if any(map(TILE_CODE.match, code))}


def configuring_functions() -> dict[str, list[str]]:
    """Those that configure tiles. (Where a caller forgets to, the emulator aborts.)"""
    return {
        name: code
        for name, code in tile_functions().items()
        if any(line.startswith("ldtilecfg") for line in code)
    }


def number(text: str) -> int:
    return int(text, 16) if text else 0


def test_tile_instructions_are_in_the_amx_kernels_alone() -> None:
    assert len(configuring_functions()) >= 5  # three kinds of weight, attention and the roof
    for name, file in objects().items():
        if name != "kernels_amx.dir/kernels.cpp.o":
            for code in functions(file).values():
                assert not any(map(TILE_CODE.match, code)), name


def stored(code: list[str], base: str, zeros: bool) -> set[int]:
    """Offsets from ``base`` that the code stores to: from zeroed vector registers too, or not."""
    offsets: set[int] = set()
    zeroed: set[str] = set()
    for line in code:
        store = STORE.match(line)
        if store and store[4] == base and (zeros or store[2] not in zeroed):
            width = WIDTHS.get(store[1]) or REGISTER_WIDTHS[store[2][1]]
            offsets |= set(range(number(store[3]), number(store[3]) + width))
        if target := re.search(r"%[xyz](mm\d+)$", line):
            names = {f"%{size}{target[1]}" for size in "xyz"}
            zeroed = zeroed | names if "xor" in line else zeroed - names
    return offsets


def test_configurations_are_stored_before_they_are_loaded() -> None:
    """GCC 12 takes ldtilecfg for a reader of 8 bytes, and drops stores that nobody else reads."""
    for name, code in configuring_functions().items():
        configurations = [i for i, line in enumerate(code) if line.startswith("ldtilecfg")]
        for at in configurations:
            where = LOADCONFIG.match(code[at])
            assert where, code[at]
            start, base = number(where[1]), where[2]
            assert stored(code[:at], base, zeros=True) >= {start + i for i in range(64)}, name
            # The palette, the bytes of rows, and the rows of the eight tiles are not zeros.
            numbers = {0, *range(16, 32), *range(48, 56)}
            assert stored(code[:at], base, zeros=False) >= {start + i for i in numbers}, name


def test_every_function_that_takes_tiles_gives_them_back() -> None:
    for name, code in configuring_functions().items():
        assert any(line.startswith("tilerelease") for line in code), name
