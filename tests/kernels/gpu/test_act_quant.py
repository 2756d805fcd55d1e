"""Triton act_quant, rms_norm_quant, silu_mul_quant against their oracles."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.activations import close, equal, random_rows
from helpers.triton_code import ARCHS, Compiler, Kernel
from qoq.formats.activation import QuantizedActivation
from qoq.kernels import act_quant as oracle
from qoq.kernels.gpu import act_quant as twin

WIDTHS = st.one_of(st.integers(1, 140), st.sampled_from([255, 256, 1000, 2048, 4099]))
FEW = settings(max_examples=30)

pytestmark = pytest.mark.usefixtures("faithful")


@FEW
@given(m=st.integers(1, 9), k=WIDTHS, spread=st.sampled_from([0.0, 3.0, 30.0, 44.0]))
def test_act_quant_is_the_oracle(device: torch.device, m: int, k: int, spread: float) -> None:
    x = random_rows(m, k, spread).to(device)
    half = x.clamp(-6e4, 6e4).half()
    brain = x.bfloat16() if spread < 44 else x  # the interpreter misreads bf16 subnormals
    for y in (x, x.contiguous(), x.t().contiguous().t(), half, brain, x.double()):
        equal(twin.act_quant(y, 8), oracle.act_quant_oracle(y, 8))
    equal(twin.act_quant(half, 16), oracle.act_quant_oracle(half, 16))


def test_the_longest_rows(device: torch.device) -> None:
    x = torch.randn(2, twin.MAX_COLUMNS, device=device)
    equal(twin.act_quant(x, 8), oracle.act_quant_oracle(x, 8))
    longer = torch.empty(1, twin.MAX_COLUMNS + 1, device=device)
    assert "longer" in str(twin.unsupported(torch.device("cuda"), x=longer))
    wide = torch.empty(1, 2 * twin.MAX_COLUMNS + 2, device=device)
    assert "longer" in str(twin.unsupported(torch.device("cuda"), gate_up=wide))


def test_ties_round_to_even_and_both_ends_are_reached(device: torch.device) -> None:
    x = torch.arange(-254, 255, device=device).float()[None] / 2  # scale 1, every half among them
    got = twin.act_quant(x, 8)
    equal(got, oracle.act_quant_oracle(x, 8))
    assert isinstance(got, QuantizedActivation)
    assert got.codes.min() == -127
    assert got.codes.max() == 127


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, 2.5e-43, 1.8e-43, 1e-38, 3e38, torch.inf])
def test_extreme_rows(device: torch.device, value: float) -> None:
    x = torch.zeros(3, 37)
    x[1, 5], x[1, 36], x[2] = value, -value / 2, value
    finite = x.isfinite()
    x = x.to(device)
    got, want = twin.act_quant(x, 8), oracle.act_quant_oracle(x.cpu(), 8)
    assert isinstance(got, QuantizedActivation)
    assert isinstance(want, QuantizedActivation)
    codes = got.codes.cpu()
    assert torch.equal(got.scale.cpu(), want.scale)
    assert torch.equal(codes[finite], want.codes[finite])  # inf / inf: torch's cast is undefined
    assert codes[~finite].eq(0).all()
    assert torch.equal(got.row_sum, got.codes.sum(1, dtype=torch.int32))


def test_nan_spoils_its_own_row_only(device: torch.device) -> None:
    x = torch.randn(3, 50, device=device) * 20
    clean = twin.act_quant(x, 8)
    x[1, 7] = torch.nan
    got, want = twin.act_quant(x, 8), oracle.act_quant_oracle(x, 8)
    for out in (clean, got, want):
        assert isinstance(out, QuantizedActivation)
    assert torch.equal(got.scale, want.scale)
    known = ~x.isnan()
    assert torch.equal(got.codes[known], want.codes[known])
    assert got.codes[1, 7] == 0
    assert torch.equal(got.codes[::2], clean.codes[::2])


@FEW
@given(
    m=st.integers(1, 9),
    k=WIDTHS,
    bits=st.sampled_from([8, 16]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    with_residual=st.booleans(),
    spread=st.sampled_from([0.0, 2.0]),
)
def test_rms_norm_quant(
    device: torch.device,
    m: int,
    k: int,
    bits: int,
    dtype: torch.dtype,
    with_residual: bool,
    spread: float,
) -> None:
    x, gain = (random_rows(m, k, spread) + 0.1).to(device, dtype), torch.rand(k, device=device)
    residual = torch.randn(m, k, device=device) if with_residual else None
    before = x.clone()
    got, stream = twin.rms_norm_quant(x, gain, 1e-5, bits, residual)
    assert torch.equal(x, before)
    assert torch.equal(stream, oracle.rms_norm_quant_oracle(x, gain, 1e-5, bits, residual)[1])
    exact = stream.double()
    exact = exact / (exact.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain.double()
    close(got, exact, 1e-6, bits)


@FEW
@given(m=st.integers(1, 9), k=WIDTHS, bits=st.sampled_from([8, 16]))
def test_silu_mul_quant(device: torch.device, m: int, k: int, bits: int) -> None:
    gate_up = random_rows(m, 2 * k, 1.5).to(device)
    gate, up = gate_up.double().chunk(2, dim=1)
    # The hardware's exponential loses relative precision as its argument grows.
    rtol = 1e-6 + 2e-7 * float(gate.clamp(min=-80).abs().max())
    close(twin.silu_mul_quant(gate_up, bits), gate * gate.sigmoid() * up, rtol, bits)


def test_silu_of_extreme_gates(device: torch.device) -> None:
    gate = torch.tensor([-3e38, -1000.0, -104, -100, -88, -1e-40, 0, 1e-40, 88, 1000, 3e38])
    out = twin.silu_mul_quant(torch.cat((gate, torch.ones(11)))[None].to(device), 16)
    assert isinstance(out, torch.Tensor)
    want = (gate.double() * gate.double().sigmoid())[None]
    torch.testing.assert_close(out.double().cpu(), want, rtol=1e-5, atol=1e-35)
    nan = twin.silu_mul_quant(torch.tensor([[torch.nan, 1.0, 1.0, 2.0]], device=device), 16)
    assert isinstance(nan, torch.Tensor)
    assert nan.isnan().tolist() == [[True, False]]


def test_zero_rows_stay_finite(device: torch.device) -> None:
    zeros, ones = torch.zeros(2, 8, device=device), torch.ones(8, device=device)
    got, stream = twin.rms_norm_quant(zeros, ones, 1e-5, 8)
    equal(got, oracle.act_quant_oracle(zeros, 8))
    assert stream.eq(0).all()


@pytest.mark.parametrize("k", [384, 5001])
def test_a_row_does_not_know_its_batch(device: torch.device, k: int) -> None:
    x, residual = torch.randn(2, 17, k, device=device)
    gain = torch.rand(k, device=device)

    def run(rows: slice) -> list[oracle.Activation]:
        out, stream = twin.rms_norm_quant(x[rows], gain, 1e-5, 16, residual[rows])
        return [out, stream, twin.silu_mul_quant(torch.cat((x, residual), 1)[rows], 16)]

    whole = run(slice(None))
    for i in (0, 5, 16):
        for one, all_ in zip(run(slice(i, i + 1)), whole, strict=True):
            assert isinstance(one, torch.Tensor)
            assert torch.equal(one[0], all_[i])


@pytest.mark.parametrize("k", [1, 15, 33, 64, 67])
def test_nothing_is_written_beyond_the_row(device: torch.device, k: int) -> None:
    x = torch.randn(2, k, device=device)
    codes = torch.full((2 * k + 64,), 99, dtype=torch.int8, device=device)
    scale = torch.full((3,), -1.0, device=device)
    sums = torch.full((3,), 7, dtype=torch.int32, device=device)
    launch = {"QUANTIZE": True, "BLOCK": 128, "num_warps": 4}
    twin.act_quant_kernel[2,](x, k, codes, scale, sums, scale, k, **launch)
    assert codes[2 * k :].eq(99).all()
    assert scale[2] == -1
    assert sums[2] == 7
    want = oracle.act_quant_oracle(x, 8)
    assert isinstance(want, QuantizedActivation)
    assert torch.equal(codes[: 2 * k].view(2, k), want.codes)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("shape", [(0, 8), (3, 0)])
def test_empty(device: torch.device, bits: int, shape: tuple[int, int]) -> None:
    x, ones = torch.empty(shape, device=device), torch.ones(shape[1], device=device)
    equal(twin.act_quant(x, bits), oracle.act_quant_oracle(x, bits))
    equal(twin.silu_mul_quant(x, bits), oracle.silu_mul_quant_oracle(x, bits))
    out, stream = twin.rms_norm_quant(x, ones, 1e-5, bits)
    equal(out, oracle.rms_norm_quant_oracle(x, ones, 1e-5, bits)[0])
    assert stream.shape == shape


def test_refusals(device: torch.device) -> None:
    x, gain = torch.ones(2, 4, device=device), torch.ones(4, device=device)
    with pytest.raises(ValueError, match="8 or 16"):
        twin.act_quant(x, 4)
    with pytest.raises(ValueError, match="8 or 16"):
        twin.silu_mul_quant(x, 4)
    with pytest.raises(ValueError, match="equal"):
        twin.silu_mul_quant(torch.ones(1, 3, device=device), 8)
    with pytest.raises(ValueError, match=r"\[2, 4\]"):
        twin.rms_norm_quant(x, gain, 1e-5, 8, torch.ones(1, 4, device=device))
    with pytest.raises(ValueError, match=r"\[4\]"):
        twin.rms_norm_quant(x, torch.ones(3, device=device), 1e-5, 8)
    assert "CUDA" in str(twin.unsupported(torch.device("cpu")))


def test_rows_of_one_number_compile(compiler: Compiler) -> None:
    """A launch makes constants of integers that are 1."""
    types = {"x": "*fp32", "residual": "*fp32", "gain": "*fp32", "stream": "*fp32", "eps": "fp32"}
    types |= {"codes": "*i8", "scale": "*fp32", "row_sum": "*i32", "floats": "*fp32"}
    ones = {"K": 1, "stride": 1, "residual_stride": 1, "BLOCK": 1}
    flags = {"ADD": True, "WRITE_STREAM": True, "QUANTIZE": True}
    name = "qoq.kernels.gpu.act_quant:rms_norm_quant_kernel"
    ((code,),) = compiler([Kernel(name, types, ones | flags, {"num_warps": 1})], [90])
    assert code.spills == 0


def test_machine_code(compiler: Compiler) -> None:
    """No spills at the longest rows, wide loads, rounding and division as IEEE has them."""
    outputs = {"codes": "*i8", "scale": "*fp32", "row_sum": "*i32", "floats": "*fp32", "K": "i32"}
    norm = {"x": "*fp32", "residual": "*fp32", "residual_stride": "i32", "gain": "*fp32"}
    flags = {"ADD": True, "WRITE_STREAM": True}
    kernels = [
        Kernel(
            f"qoq.kernels.gpu.act_quant:{name}_kernel",
            {**inputs, "stride": "i32", **outputs},
            {**constants, "QUANTIZE": True, "BLOCK": block},
            {"num_warps": 16},
            aligned=tuple(name for name in (*inputs, "stride", *outputs) if name != "eps"),
        )
        for name, inputs, constants, block in (
            ("act_quant", {"x": "*fp32"}, {}, 32768),
            ("rms_norm_quant", {**norm, "stream": "*fp32", "eps": "fp32"}, flags, 16384),
            ("silu_mul_quant", {"gate_up": "*fp32"}, {}, 32768),
        )
    ]
    for kernel, row in zip(kernels, compiler(kernels), strict=True):
        for arch, code in zip(ARCHS, row, strict=True):
            what = f"{kernel.function} on {arch}"
            assert code.spills == 0, what
            assert any(i.name.startswith("LDG") and ".128" in i.name for i in code.sass), what
            assert "div.rn.f32" in code.ptx, what
            assert not re.search(r"(add|mul|sub|div\.rn|fma\.rn)\.ftz", code.ptx), what
