"""Machine code of Triton kernels without a GPU: compiled elsewhere, taken apart here."""

import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ARCHS = (80, 89, 90)  # A100; L40S and RTX 40; H100 and H200
# What one thread block may hold, in bytes (CUDA's programming guide, compute capabilities).
SHARED_MEMORY = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}

_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}
_ROOT = Path(__file__).parents[2]
_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")


@dataclass(frozen=True)
class Kernel:
    """A kernel as it is launched: ``function`` is "module:name".

    ``types`` are Triton's ("*i8", "i32", ...) by argument, ``constants`` the constexprs,
    ``options`` those of the launch (num_warps, num_stages, ...). Arguments named in ``aligned``
    are multiples of 16, as a launch finds out by itself; by default those are the pointers.
    """

    function: str
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    aligned: tuple[str, ...] | None = None

    @classmethod
    def launched(cls, kernel: Any, *args: Any, **named: Any) -> "Kernel":
        """What ``kernel[grid](*args, **named)`` compiles; tensors may be anywhere."""
        parameters = inspect.signature(kernel.fn).parameters
        given = dict(zip(parameters, args, strict=False)) | named
        types, constants = {}, {}
        for name, parameter in parameters.items():
            value = given.pop(name)
            if value is None or "constexpr" in str(parameter.annotation):
                constants[name] = value
            elif isinstance(value, torch.Tensor):
                types[name] = "*" + _TYPES[value.dtype]
            else:
                types[name] = "fp32" if isinstance(value, float) else "i32"
        return cls(f"{kernel.fn.__module__}:{kernel.fn.__name__}", types, constants, given)

    def job(self, arch: int) -> dict[str, Any]:
        """What the compiling process reads."""
        aligned = self.aligned
        if aligned is None:
            aligned = tuple(name for name, kind in self.types.items() if kind.startswith("*"))
        return {
            "function": self.function,
            "types": dict(self.types),
            "constants": dict(self.constants),
            "options": dict(self.options),
            "aligned": aligned,
            "arch": arch,
        }


@dataclass(frozen=True)
class Instruction:
    """One line of SASS: ``IGMMA.64x64x32.S8.S8 R24, R88, gdesc[UR16], R24`` at ``address``."""

    address: int
    predicate: str
    name: str
    operands: tuple[str, ...]

    @property
    def opcode(self) -> str:
        """The name without its modifiers."""
        return self.name.partition(".")[0]

    @property
    def writes(self) -> range:
        """Numbers of the general registers it writes."""
        operands = self.operands
        if operands and re.fullmatch(r"!?U?P[\dT]", operands[0]):
            operands = operands[1:]
        found = re.match(r"R(\d+)\b", operands[0]) if operands else None
        if found is None or self.opcode in ("ST", "STG", "STS", "STL", "RED", "BRX", "RET"):
            return range(0)
        return range(int(found[1]), int(found[1]) + self._width())

    def _width(self) -> int:
        if tile := re.match(r"[A-Z]GMMA\.64x(\d+)x", self.name):
            return int(tile[1]) // 2
        if self.opcode in ("IMMA", "HMMA"):
            return 4
        if ".128" in self.name:
            return 4
        if self.opcode == "LDSM":
            return int((re.search(r"\.([24])$", self.name) or [0, 1])[1])
        return 2 if re.search(r"\.(64|WIDE)\b|^CS2R$", self.name) else 1


@dataclass(frozen=True)
class Code:
    """A compiled kernel. ``stack`` and ``shared`` are bytes."""

    ptx: str
    sass: tuple[Instruction, ...]
    registers: int
    stack: int
    shared: int

    def count(self, opcode: str) -> int:
        return sum(i.opcode == opcode for i in self.sass)

    @property
    def spills(self) -> int:
        """Loads from and stores to a thread's local memory."""
        return self.count("STL") + self.count("LDL")

    @property
    def hazards(self) -> list[Instruction]:
        """See ``overwritten``; a loop's end also meets its beginning."""
        return overwritten(self.sass) + [i for loop in self.loops() for i in overwritten(2 * loop)]

    def loops(self) -> Iterator[tuple[Instruction, ...]]:
        """The instructions between each backward branch and its target."""
        for branch in self.sass:
            target = re.fullmatch(r"(?:.*, *)?`?\(?(0x[0-9a-f]+)\)?", ", ".join(branch.operands))
            if branch.opcode == "BRA" and target and int(target[1], 16) < branch.address:
                start = int(target[1], 16)
                yield tuple(i for i in self.sass if start <= i.address <= branch.address)


def overwritten(sass: Iterable[Instruction]) -> list[Instruction]:
    """Writes to a register that an asynchronous GMMA may still be reading as its A operand.

    A GMMA reads its operands until the warpgroup has waited for it; compilers have been known to
    reuse those registers earlier (ptxas before CUDA 13.3).
    """
    reading: set[int] = set()
    hits = []
    for instruction in sass:
        if instruction.name.startswith("WARPGROUP.DEPBAR"):
            reading.clear()
            continue
        if not reading.isdisjoint(instruction.writes):
            hits.append(instruction)
        if re.fullmatch(r"[A-Z]GMMA", instruction.opcode):
            source = re.match(r"R(\d+)\b", instruction.operands[1])
            if source:
                reading.update(range(int(source[1]), int(source[1]) + 4))
    return hits


def parse_sass(text: str) -> tuple[Instruction, ...]:
    """The instructions of a cuobjdump listing."""
    return tuple(
        Instruction(
            int(address, 16),
            predicate,
            name,
            tuple(part.strip() for part in operands.split(",")) if operands.strip() else (),
        )
        for address, predicate, name, operands in _LINE.findall(text)
    )


class Compiler:
    """Compiles lists of kernels and remembers them; ``cache`` is a folder for Triton's own."""

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self._done: dict[str, Code | str] = {}

    def __call__(self, kernels: Iterable[Kernel], archs: Iterable[int] = ARCHS) -> list[list[Code]]:
        """For each kernel its code for each architecture. One call is cheaper than many."""
        jobs = [[kernel.job(arch) for arch in archs] for kernel in kernels]
        keys = [[json.dumps(job, sort_keys=True) for job in row] for row in jobs]
        new = sorted({key for row in keys for key in row} - self._done.keys())
        share = max(1, min(os.cpu_count() or 1, 4, len(new)))
        with ThreadPoolExecutor(share) as pool:
            for answers in pool.map(self._run, [new[start::share] for start in range(share)]):
                self._done.update(answers)
        return [[self._get(key) for key in row] for row in keys]

    def _get(self, key: str) -> Code:
        code = self._done[key]
        if isinstance(code, str):
            raise AssertionError(f"{key} does not compile:\n{code}")
        return code

    def _run(self, keys: list[str]) -> dict[str, Code | str]:
        if not keys:
            return {}
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment |= {
            "TRITON_CACHE_DIR": str(self._cache),
            "PYTHONPATH": os.pathsep.join(map(str, [_ROOT / "src", _ROOT / "tests", *sys.path])),
            "OMP_NUM_THREADS": "1",
        }
        child = Path(__file__).with_name("triton_child.py")
        with tempfile.TemporaryDirectory() as folder:
            jobs, results = Path(folder, "jobs.json"), Path(folder, "results.json")
            jobs.write_text("[" + ",".join(keys) + "]")
            subprocess.run([sys.executable, child, jobs, results], env=environment, check=True)
            answers = json.loads(results.read_text())
        return {key: _code(answer) for key, answer in zip(keys, answers, strict=True)}


def _code(answer: dict[str, Any]) -> Code | str:
    if "error" in answer:
        return str(answer["error"])
    usage = _USAGE.search(answer["dump"])
    assert usage is not None, answer["dump"][:500]
    return Code(
        answer["ptx"],
        parse_sass(answer["dump"]),
        int(usage[1]),
        int(usage[2]),
        answer["shared"],
    )
