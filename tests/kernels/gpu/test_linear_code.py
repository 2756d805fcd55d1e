"""linear's machine code, on GPUs that need not be here: what makes it fast, what makes it safe.

``pytest -m gpu_code`` compiles every tile of every kind for every architecture, ``make test`` some.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from helpers.triton_code import ARCHS, SHARED_MEMORY, Code, Compiler, Kernel
from kernels.test_linear import KINDS, random_weight
from qoq.formats.activation import QuantizedActivation
from qoq.kernels.gpu import linear as linear_module
from qoq.kernels.gpu.linear import prepare
from qoq.kernels.gpu.product import product
from qoq.kernels.gpu.tilings import Gpu, Shape, Tiling, shared_bytes, tilings

GPUS = {
    80: Gpu((8, 0), 108, 164 << 10),
    89: Gpu((8, 9), 142, 100 << 10),
    90: Gpu((9, 0), 132, 228 << 10),
}
K = 8192  # enough steps for a loop that is not unrolled
# What ``make test`` looks at: (kind, tokens, rows, splits).
SOME = {
    90: [
        *[("group128", 16, 64, 3), ("group128", 128, 128, 1), ("group128", 256, 64, 1)],
        *[("channel", 16, 64, 1), ("channel", 128, 128, 3), ("group32", 64, 128, 1)],
        *[("int8", 16, 128, 3), ("int8", 128, 128, 1)],
    ],
    89: [("group128", 64, 128, 3), ("channel", 16, 64, 1)],
    80: [
        *[("group128", 16, 64, 1), ("group64", 64, 64, 1), ("channel", 64, 128, 3)],
        ("int8", 128, 128, 1),
    ],
}


@dataclass(frozen=True)
class Case:
    """A kernel as it is launched for a weight [n, K] of this kind, on this architecture."""

    arch: int
    kind: str
    tiling: Tiling
    n: int = 512
    dtype: torch.dtype = torch.float32
    bias: bool = False

    def __str__(self) -> str:
        t = self.tiling
        tail = f"-n{self.n}-{self.dtype}".replace("torch.", "") + "-bias" * self.bias
        return f"sm_{self.arch}-{self.kind}-{t.tokens}x{t.rows}-{t.splits}{tail}"

    @property
    def shape(self) -> Shape:
        width = int(self.kind.removeprefix("group")) if self.kind.startswith("group") else 128
        return Shape(self.n, K, width, 8 if self.kind == "int8" else 4)

    def kernel(self) -> Kernel:
        """What ``multiply_into`` launches."""
        launched: list[Kernel] = []

        class Recorder:
            def __getitem__(self, grid: Any) -> Any:
                return lambda *args, **named: launched.append(
                    Kernel.launched(product, *args, **named | {"INTERPRETED": False})
                )

        weight = prepare(random_weight(self.kind, self.n, K))
        x = QuantizedActivation(
            torch.empty(3, K, dtype=torch.int8), torch.empty(3), torch.empty(3, dtype=torch.int32)
        )
        out = torch.empty(3, self.n, dtype=self.dtype)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(linear_module, "product", Recorder())
            weight.multiply_into(out, x, torch.empty(self.n) if self.bias else None, self.tiling)
        return launched[0]


def cases(arch: int) -> Iterator[Case]:
    """Every tile of every kind; then split, with tails and a bias; then for the sums themselves."""
    for kind in KINDS:
        for tiling in tilings(Case(arch, kind, Tiling(16, 64, 4, 2)).shape, GPUS[arch]):
            yield Case(arch, kind, tiling)
            splits = 3 if tiling.may_split else 1
            yield Case(arch, kind, replace(tiling, splits=splits), 500, torch.float16, bias=True)
            if tiling.may_split:
                yield Case(arch, kind, replace(tiling, splits=4), 512, torch.int32)


def parameters() -> Iterator[Any]:
    for arch in ARCHS:
        for case in cases(arch):
            key = (case.kind, case.tiling.tokens, case.tiling.rows, case.tiling.splits)
            marks = [] if key in SOME[arch] else [pytest.mark.gpu_code]
            yield pytest.param(case, marks=marks, id=str(case))


@pytest.fixture(scope="module")
def codes(compiler: Compiler, request: pytest.FixtureRequest) -> dict[Case, Code]:
    """Machine code of the cases of this run, compiled together."""
    here = [item for item in request.session.items if item.module is request.module]
    wanted: list[Case] = [item.callspec.params["case"] for item in here]
    answers: dict[Case, Code] = {}
    for arch in ARCHS:
        of = [case for case in wanted if case.arch == arch]
        found = compiler([case.kernel() for case in of], [arch])
        answers |= {case: code for case, (code,) in zip(of, found, strict=True)}
    return answers


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("case", list(parameters()))
def test_code(case: Case, codes: dict[Case, Code]) -> None:
    code, tiling = codes[case], case.tiling
    assert code.stack <= 8  # bytes; some compilers keep one address there, outside the loop
    assert code.shared <= shared_bytes(tiling, case.shape) <= SHARED_MEMORY[case.arch]
    # Rounded as the oracle rounds: no product is fused with the sum after it.
    assert code.count("FFMA") == 0
    (loop,) = [loop for loop in code.loops() if {"IGMMA", "IMMA"} & {i.opcode for i in loop}]
    count = Counter(instruction.opcode for instruction in loop)
    # All that the loop reads is on its way steps ahead; nothing returns to memory.
    assert count["LDGSTS"]
    assert not count.keys() & {"LDG", "STG", "STS", "STL", "LDL"}
    if case.kind != "int8":
        # Codes are unpacked by as few instructions as there can be.
        words = tiling.rows * case.shape.width // 4 // (32 * min(tiling.warps, tiling.rows // 16))
        each = 2 if case.kind == "channel" else 4
        assert words * each <= count["LOP3"] <= words * each + 10
        assert count["PRMT"] <= 4
    macs = tiling.channels(case.shape.bits) * tiling.tokens * case.shape.width
    if case.arch == 90:
        wide = min(tiling.tokens, 128)
        assert count["IGMMA"] == macs // (64 * wide * 32 * (tiling.warps // 4))
        check_waits(case, code, wide)
    else:
        assert count["IMMA"] == macs // (16 * 8 * 32 * tiling.warps)
    if tiling.splits > 1:
        check_meeting(code.ptx)


def check_waits(case: Case, code: Code, wide: int) -> None:
    """Asynchronous products of the wanted shape, waited for before their operands are reused."""
    shape = f"m64n{wide}k32.s32.s8.s8"
    products = re.findall(rf"wgmma\.mma_async\.sync\.aligned\.{shape} {{[^}}]*}}, (.)", code.ptx)
    assert len(products) == code.ptx.count("wgmma.mma_async") == code.count("IGMMA") > 0
    # Nibbles go from registers into the product; whole bytes are read from shared memory.
    assert set(products) == {"%" if case.kind == "int8" else "{"}
    assert set(re.findall(r"wgmma\.wait_group\.sync\.aligned (\d+)", code.ptx)) == {"0"}
    assert code.hazards == []


def check_meeting(ptx: str) -> None:
    """Sums are stored by all threads before the counter moves, and read by all after it has."""
    before, atomic, after = ptx.partition("atom.global.gpu.acq_rel.add")
    assert atomic
    assert before.rindex("st.global") < before.rindex("bar.sync")
    assert after.index("bar.sync") < after.index("ld.global.cg")
