"""linear: integers exact against int64, the epilogue to the bit against numpy."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qoq.errors import BackendUnavailable
from qoq.formats.activation import QuantizedActivation, quantize_per_token
from qoq.formats.packing import pack_nibbles
from qoq.formats.progressive import max_codes
from qoq.formats.weights import ChannelWeight, GroupWeight, Int8Weight, PackedWeight
from qoq.kernels import linear as linear_module
from qoq.kernels.linear import int_matmul, linear

KINDS = ["group32", "group64", "group128", "channel", "int8"]


@pytest.fixture(params=["vnni or not", "no vnni"])
def accumulator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both exact ways of a CPU: what this one takes, and the way of one without VNNI."""
    if request.param == "no vnni":
        monkeypatch.setattr(linear_module, "_has_vnni", lambda: False)


def random_weight(kind: str, n: int, k: int) -> PackedWeight:
    scale = torch.rand(n) * 0.1 + 1e-3
    if kind == "int8":
        return Int8Weight(torch.randint(-127, 128, (n, k), dtype=torch.int8), scale)
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    if kind == "channel":
        return ChannelWeight(pack_nibbles(codes), scale, torch.randn(n))
    group = int(kind.removeprefix("group"))
    group_scale = torch.randint(1, 17, (n, k // group), dtype=torch.uint8)
    group_offset = torch.randint(-119, 120, (n, k // group)).to(torch.int8)
    top = max_codes(group_scale, group_offset).to(torch.uint8).repeat_interleave(group, dim=1)
    return GroupWeight(pack_nibbles(codes.minimum(top)), scale, group_scale, group_offset)


def random_rows(m: int, k: int) -> QuantizedActivation:
    return quantize_per_token(torch.randn(m, k) * 3)


def integer_weight(weight: PackedWeight) -> Tensor:
    """int64 [N, K] rebuilt without the formats' own code."""
    tensors = weight.tensors()
    if isinstance(weight, Int8Weight):
        return weight.codes.long()
    low, high = tensors["codes"].long() % 16, tensors["codes"].long() // 16
    codes = torch.stack((low, high), dim=2).reshape(weight.shape)
    if isinstance(weight, ChannelWeight):
        return codes
    group = weight.shape[1] // weight.group_scale.shape[1]
    spread = [
        t.long().repeat_interleave(group, 1) for t in (weight.group_scale, weight.group_offset)
    ]
    return codes * spread[0] + spread[1]


@pytest.mark.usefixtures("accumulator")
@pytest.mark.parametrize(
    ("m", "k", "n"),
    [
        *[(1, 1, 1), (3, 5, 7), (1, 2048, 33), (17, 1023, 5), (2, 1025, 64), (33, 3000, 17)],
        *[(0, 8, 4), (4, 8, 0), (4, 0, 8), (0, 0, 0)],
    ],
)
def test_int_matmul_is_exact(m: int, k: int, n: int) -> None:
    a = torch.randint(-128, 128, (m, k), dtype=torch.int8)
    w = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    got = int_matmul(a, w)
    assert got.dtype == torch.int32
    assert torch.equal(got.long(), a.long() @ w.long().T)


@pytest.mark.usefixtures("accumulator")
@pytest.mark.parametrize("k", [1, 2, 64])
@pytest.mark.parametrize("n", [1, 2, 17])
@pytest.mark.parametrize("m", [1, 2, 17])
def test_int_matmul_takes_any_strides(m: int, k: int, n: int) -> None:
    # Strides of axes of length 1 are arbitrary; torch's int8 GEMM once trusted them.
    def layouts(rows: int) -> list[Tensor]:
        def base(*shape: int) -> Tensor:
            return torch.randint(-128, 128, shape, dtype=torch.int8)

        views = [
            base(rows, k),
            base(k, rows).T,
            base(rows, k + 5)[:, 2 : 2 + k],
            base(2 * rows, k)[::2],
        ]
        views += [base(rows, 2 * k)[:, ::2], base(k).expand(rows, k), base(rows, 1).expand(rows, k)]
        if rows == 1:
            views += [base(1, k).as_strided((1, k), (stride, 1)) for stride in (0, 1, 3, 999)]
        return views

    for a, w in itertools.product(layouts(m), layouts(n)):
        assert torch.equal(int_matmul(a, w).long(), a.long() @ w.long().T)


@pytest.mark.usefixtures("accumulator")
@pytest.mark.parametrize("k", [1024, 1025, 4097])
@pytest.mark.parametrize("signs", [(-128, -128), (127, -128), (127, 127)])
def test_int_matmul_at_the_extremes(k: int, signs: tuple[int, int]) -> None:
    # The largest sums there are; an odd term at the end is lost if fp32 ran past 2**24.
    a, w = (torch.full((17, k), s, dtype=torch.int8) for s in signs)
    a[:, -1], w[:, -1] = 1, 1
    assert int_matmul(a, w).eq((k - 1) * signs[0] * signs[1] + 1).all()


@pytest.mark.usefixtures("accumulator")
@given(m=st.integers(1, 20), k=st.integers(1, 300), n=st.integers(1, 20), cut=st.integers(0, 299))
def test_splitting_k_changes_nothing(m: int, k: int, n: int, cut: int) -> None:
    cut = min(cut, k)
    a = torch.randint(-127, 128, (m, k), dtype=torch.int8)
    w = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    parts = int_matmul(a[:, :cut], w[:, :cut]) + int_matmul(a[:, cut:], w[:, cut:])
    assert torch.equal(int_matmul(a, w), parts)


@pytest.mark.usefixtures("accumulator")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 128), (5, 37, 256), (33, 16, 1152)])
def test_epilogue_to_the_bit(kind: str, with_bias: bool, m: int, n: int, k: int) -> None:
    x, weight = random_rows(m, k), random_weight(kind, n, k)
    bias = torch.randn(n) if with_bias else None
    got = linear(x, weight, bias)
    assert got.dtype == torch.float32
    assert got.shape == (m, n)

    acc = (x.codes.long() @ integer_weight(weight).T).numpy().astype(np.float32)
    s_a, row_sum = x.scale.numpy()[:, None], x.row_sum.numpy().astype(np.float32)[:, None]
    if isinstance(weight, ChannelWeight):
        want = s_a * (weight.scale.numpy() * acc + weight.offset.numpy() * row_sum)
    elif isinstance(weight, GroupWeight):
        want = (acc * s_a) * weight.channel_scale.numpy()
    else:
        want = (acc * s_a) * weight.scale.numpy()
    if bias is not None:
        want = want + bias.numpy()
    assert np.array_equal(got.numpy(), want)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_dequantized_product(kind: str) -> None:
    x, weight = random_rows(9, 256), random_weight(kind, 21, 256)
    want = x.dequantize().double() @ weight.dequantize().double().T
    scale = x.dequantize().double().abs() @ weight.dequantize().double().abs().T
    assert ((linear(x, weight).double() - want).abs() <= 1e-5 * scale).all()


@pytest.mark.parametrize("kind", KINDS)
def test_float_rows_meet_packed_weights(kind: str) -> None:
    x, weight, bias = torch.randn(5, 128), random_weight(kind, 11, 128), torch.randn(11)
    want = x.double() @ weight.dequantize().double().T + bias.double()
    torch.testing.assert_close(linear(x, weight, bias).double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_meet_float_weights(dtype: torch.dtype) -> None:
    weight = torch.randn(11, 40).to(dtype)
    x, q = torch.randn(5, 40), random_rows(5, 40)
    got = linear(x, weight)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), x.double() @ weight.double().T, rtol=1e-4, atol=1e-5)
    want = q.dequantize().double() @ weight.double().T
    torch.testing.assert_close(linear(q, weight).double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_and_channels_are_independent(kind: str) -> None:
    x, bias = random_rows(19, 256), torch.randn(12)
    parts = [random_weight(kind, n, 256) for n in (5, 7)]
    whole = linear(x, type(parts[0]).stack(parts), bias)  # type: ignore[arg-type]
    split = [linear(x, p, b) for p, b in zip(parts, bias.split([5, 7]), strict=True)]
    assert torch.equal(whole, torch.cat(split, dim=1))
    for i in (0, 18):
        row = slice(i, i + 1)
        one = QuantizedActivation(x.codes[row], x.scale[row], x.row_sum[row])
        alone = linear(one, type(parts[0]).stack(parts), bias)  # type: ignore[arg-type]
        assert torch.equal(alone[0], whole[i])


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows(kind: str) -> None:
    assert linear(random_rows(0, 128), random_weight(kind, 3, 128)).shape == (0, 3)
    assert linear(torch.empty(0, 128), random_weight(kind, 3, 128)).shape == (0, 3)


def test_inputs_are_left_alone() -> None:
    x, weight, bias = random_rows(3, 128), random_weight("channel", 4, 128), torch.randn(4)
    before = [t.clone() for t in (x.codes, x.scale, *weight.tensors().values(), bias)]
    linear(x, weight, bias)
    after = (x.codes, x.scale, *weight.tensors().values(), bias)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="do not meet"):
        linear(random_rows(2, 64), random_weight("int8", 3, 65))
    with pytest.raises(BackendUnavailable, match="gpu"):
        linear(random_rows(2, 64), random_weight("int8", 3, 64), backend="gpu")
