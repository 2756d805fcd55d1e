"""attention's and kv_append's machine code, on GPUs that need not be here.

``pytest -m gpu_code`` compiles every format, head size and tile for every architecture, ``make
test`` some.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from helpers.triton_code import ARCHS, SHARED_MEMORY, Code, Compiler, Instruction, Kernel
from qoq.formats.kv import KVPages
from qoq.formats.scheme import KVFormat
from qoq.kernels.gpu import attention as attention_module
from qoq.kernels.gpu import kv_append as append_module
from qoq.kernels.gpu.append import append
from qoq.kernels.gpu.attention import Plan, attention
from qoq.kernels.gpu.fold import merge
from qoq.kernels.gpu.kv_append import kv_append
from qoq.kernels.gpu.walk import attend

DECODE = Plan(8, 1)
BITS = [*itertools.product((4, 8), repeat=2), (16, 16), (16, 4)]


@dataclass(frozen=True)
class Case:
    """A launch of ``attend`` on an architecture; 16-bit pages are bf16."""

    arch: int
    bits: tuple[int, int] = (4, 4)
    dim: int = 128
    plan: Plan = DECODE
    heads: int = 32
    page_size: int = 64
    window: int | None = None
    subnormal: bool = True

    def __str__(self) -> str:
        k, v = self.bits
        tail = f"-{self.heads}-page{self.page_size}-{self.window}" + "-plain" * (not self.subnormal)
        return f"sm_{self.arch}-k{k}v{v}-{self.dim}-{self.plan.columns}x{self.plan.turns}{tail}"

    @property
    def step(self) -> int:
        return 64 if self.dim <= 128 else 32

    @property
    def width(self) -> int:
        return max(1 << (self.dim - 1).bit_length(), 256 // min(self.bits))

    def kernels(self) -> list[Kernel]:
        """What ``attention`` launches."""
        recorded: list[Kernel] = []
        q = torch.empty(3, self.heads, self.dim)
        numbers = torch.zeros(4, dtype=torch.int32)
        with pytest.MonkeyPatch.context() as patch:
            launches = Recorder(attend, recorded), Recorder(merge, recorded), False
            patch.setattr(attention_module, "_kernels", lambda: launches)
            patch.setattr(attention_module, "SUBNORMAL", self.subnormal)
            attention(
                q,
                pages(self.bits, self.page_size, self.dim),
                numbers[:3, None],
                numbers[:3],
                numbers,
                0.1,
                self.window,
                plan=self.plan,
            )
        return recorded


class Recorder:
    """A kernel whose launches are written down instead."""

    def __init__(self, kernel: Any, launched: list[Kernel]) -> None:
        self._kernel, self._launched = kernel, launched

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **named: self._launched.append(
            Kernel.launched(self._kernel, *args, **named)
        )


def pages(bits: tuple[int, int], page_size: int, dim: int) -> KVPages:
    return KVPages.empty(KVFormat(*bits), 1, 8, page_size, dim, dtype=torch.bfloat16)


def cases() -> Iterator[tuple[Case, bool]]:
    """With whether ``make test`` compiles it."""
    for arch in ARCHS:
        yield Case(arch), True
        yield Case(arch, plan=Plan(16, 1)), arch == 90
        yield Case(arch, subnormal=False), arch == 80
        for bits, dim in itertools.product(BITS, (32, 64, 80, 96, 128, 256)):
            for columns in (8, 16)[: 2 if dim <= 128 else 1]:
                if (bits, dim) != ((4, 4), 128):
                    yield Case(arch, bits, dim, Plan(columns, 1)), False
        for heads, page_size, window in itertools.product((8, 96), (16, 64, 128), (None, 4096)):
            plan = Plan(16 if heads == 96 else 8, 4)
            yield Case(arch, (4, 4), 128, plan, heads, page_size, window), False


def parameters() -> Iterator[Any]:
    for case, always in cases():
        yield pytest.param(case, marks=[] if always else [pytest.mark.gpu_code], id=str(case))


@pytest.fixture(scope="module")
def codes(compiler: Compiler, request: pytest.FixtureRequest) -> dict[Case, Code]:
    """Machine code of ``attend`` for the cases of this run, compiled together."""
    here = [item for item in request.session.items if item.module is request.module]
    wanted = [i.callspec.params["case"] for i in here if "codes" in getattr(i, "fixturenames", ())]
    answers: dict[Case, Code] = {}
    for arch in ARCHS:
        of = [case for case in wanted if case.arch == arch]
        found = compiler([case.kernels()[0] for case in of], [arch])
        answers |= {case: code for case, (code,) in zip(of, found, strict=True)}
    return answers


def inner_loop(code: Code) -> tuple[Instruction, ...]:
    """The walk over the steps of a split."""
    loops = [loop for loop in code.loops() if any(i.opcode == "HMMA" for i in loop)]
    return min(loops, key=len)


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("case", list(parameters()))
def test_walk(case: Case, codes: dict[Case, Code]) -> None:
    code = codes[case]
    loop = inner_loop(code)
    has = [i.opcode for i in loop].count
    # What an iteration multiplies, and with what: one instruction, whatever the architecture.
    tiles = case.step // 16 * (case.plan.columns // 8)
    k_tiles, v_tiles = (tiles * case.width // 16,) * 2
    assert has("HMMA") == k_tiles + v_tiles + (tiles if case.bits[1] < 16 else 0)
    kinds = {"bf16" if bits == 16 else "f16" for bits in case.bits}
    for kind in kinds:
        assert f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32" in code.ptx
    assert "wgmma" not in code.ptx
    # Everything comes by asynchronous copies; nothing is spilled where it would be felt.
    assert has("LDGSTS") > 0 == has("LDG")
    assert has("LDL") == has("STL") == 0
    assert code.shared <= SHARED_MEMORY[case.arch]
    if case.plan.columns == 8 and case.page_size == case.step:
        assert code.spills == code.stack == 0
    # Codes are masked two by two, and nothing else is done to them.
    masks = dict.fromkeys(("0xf000f", "0xf000f0", "0xff00ff"), 0)
    for bits in case.bits:
        pairs = case.step * (case.width * bits // 16) // 2 // 32
        for mask, parts in {4: (("0xf000f", 2), ("0xf000f0", 2)), 8: (("0xff00ff", 2),)}.get(
            bits, ()
        ):
            masks[mask] += pairs * parts
    for mask, count in masks.items():
        assert sum(i.opcode == "LOP3" and mask in i.operands for i in loop) == count, mask
    assert any("0x64006400" in i.operands for i in code.sass) == (not case.subnormal)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("arch", ARCHS)
def test_decode_over_four_bits(arch: int, compiler: Compiler) -> None:
    """What the speed of decode hangs on: the work per 64 tokens, and how many programs fit."""
    ((code,),) = compiler([Case(arch).kernels()[0]], [arch])
    assert len(inner_loop(code)) < 1000
    assert code.registers <= 224
    assert code.shared <= SHARED_MEMORY[arch] // (8 if arch != 89 else 5)


def append_kernel(bits: int, rotated: bool, values: torch.dtype = torch.float32) -> Kernel:
    """A decode batch's, or with the rotation."""
    recorded: list[Kernel] = []
    qkv = torch.empty(3, 48, 128)
    rotation = torch.empty(128, 128) if rotated else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(append_module, "_kernel", lambda: Recorder(append, recorded))
        kv_append(
            *(qkv[:, :32], qkv[:, 32:40], qkv[:, 40:].to(values)),
            *(torch.empty(3, 64), torch.empty(3, 64), torch.empty(3, dtype=torch.int64)),
            pages((bits, bits), 64, 128),
            torch.empty(8, 128),
            rotation,
        )
    (kernel,) = recorded
    strides = [name for name in kernel.types if name.endswith(("_row", "_head"))]
    pointers = [name for name, kind in kernel.types.items() if kind.startswith("*")]
    return replace(kernel, aligned=(*pointers, *strides))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    ("bits", "rotated"),
    [
        (4, False),
        pytest.param(8, False, marks=pytest.mark.gpu_code),
        pytest.param(16, False, marks=pytest.mark.gpu_code),
        pytest.param(4, True, marks=pytest.mark.gpu_code),
    ],
)
def test_append(arch: int, bits: int, rotated: bool, compiler: Compiler) -> None:
    ((code,),) = compiler([append_kernel(bits, rotated)], [arch])
    assert code.spills == code.stack == 0
    assert code.shared <= SHARED_MEMORY[arch]
    assert "ld.global.v4.b32" in code.ptx
    # Every operation is rounded on its own, as the oracle's are.
    assert "fma" not in code.ptx.replace("mma.sync.aligned", "")
    assert "div.full" not in code.ptx
    assert "div.approx" not in code.ptx
    assert ("div.rn.f32" in code.ptx) == (bits < 16)


def test_append_takes_values_of_another_type(compiler: Compiler) -> None:
    ((code,),) = compiler([append_kernel(4, False, torch.float16)], [90])
    assert code.spills == 0


@pytest.mark.timeout(600)
def test_merge(compiler: Compiler) -> None:
    ((code,),) = compiler([Case(90, plan=Plan(8, 4)).kernels()[1]], [90])
    assert code.spills == code.stack == 0
    assert code.registers <= 64
