"""linear in Triton: exact sums under every tile, the epilogue to the bit."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.test_linear import KINDS, integer_weight, random_rows, random_weight
from qoq.errors import BackendUnavailable
from qoq.formats.activation import QuantizedActivation
from qoq.formats.packing import pack_nibbles
from qoq.formats.weights import ChannelWeight, GroupWeight, Int8Weight, PackedWeight
from qoq.kernels.gpu.linear import GpuWeight, linear, prepare, unsupported
from qoq.kernels.gpu.tilings import SPLITS, Gpu, Tiling, tilings
from qoq.kernels.linear import linear as linear_op
from qoq.kernels.linear import linear_oracle
from qoq.kernels.linear import prepare as prepare_for

GPUS = (Gpu((9, 0), 132, 228 << 10), Gpu((8, 0), 108, 164 << 10))


def to(x: QuantizedActivation, device: torch.device) -> QuantizedActivation:
    return QuantizedActivation(*(t.to(device) for t in (x.codes, x.scale, x.row_sum)))


def sums(prepared: GpuWeight, x: QuantizedActivation, tiling: Tiling | None = None) -> Tensor:
    """int64 [M, N] on the CPU: the kernel's integers. What lies behind its output is left alone."""
    m, n, device = x.codes.shape[0], prepared.shape[0], prepared.counters.device
    around = torch.full((m * n + 4096,), 12345, dtype=torch.int32, device=device)
    out = around[: m * n].view(m, n)
    assert prepared.multiply_into(out, to(x, device), tiling=tiling) is out
    assert around[m * n :].eq(12345).all()
    assert not prepared.counters.any()
    return out.cpu().long()


def want_sums(weight: PackedWeight, x: QuantizedActivation) -> Tensor:
    return x.codes.long() @ integer_weight(weight).T


def all_tilings() -> Iterator[tuple[str, Tiling]]:
    for kind in KINDS:
        shape = prepare(random_weight(kind, 1, 128)).traits
        for tiling in dict.fromkeys(t for gpu in GPUS for t in tilings(shape, gpu)):
            yield kind, tiling


@pytest.mark.parametrize(("kind", "tiling"), list(all_tilings()), ids=str)
def test_every_tile_gives_exact_sums(kind: str, tiling: Tiling, device: torch.device) -> None:
    # Tails everywhere: of tokens, of channels and, where there are no groups, of a step.
    k = {"group32": 96, "group64": 192, "group128": 384}.get(kind, 288)
    n, m = 2 * tiling.channels(8 if kind == "int8" else 4) + 9, tiling.tokens + 3
    weight, x = random_weight(kind, n, k), random_rows(m, k)
    prepared = prepare(weight.to(device))
    want = want_sums(weight, x)
    for splits in (1, 2):
        assert torch.equal(sums(prepared, x, replace(tiling, splits=splits)), want)


@pytest.mark.parametrize(
    ("kind", "splits"),
    [*(("channel", splits) for splits in (*SPLITS, 5)), ("group32", 7), ("int8", 3)],
)
def test_any_number_of_programs_may_share_a_tile(
    kind: str, splits: int, device: torch.device
) -> None:
    k = 32 * splits if kind == "group32" else 128 * splits - 96
    weight, x = random_weight(kind, 70, k), random_rows(9, k)
    prepared, tiling = prepare(weight.to(device)), Tiling(16, 128, 4, 3, splits)
    for _ in range(2):  # the first leaves the counters as it found them
        assert torch.equal(sums(prepared, x, tiling), want_sums(weight, x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("code", [127, -128])
def test_the_largest_sums_there_are(kind: str, code: int, device: torch.device) -> None:
    # Far beyond 2**24, where floats would round; -128 is no code of ours, but it is an int8.
    n, k = 3, 2048
    nibbles, ones = torch.tensor([[0], [15], [8]]).expand(n, k), torch.ones(n)
    if kind == "int8":
        weight: PackedWeight = Int8Weight(
            torch.tensor([[-128], [127], [-127]], dtype=torch.int8).expand(n, k), ones
        )
    elif kind == "channel":
        weight = ChannelWeight(pack_nibbles(nibbles), ones, ones)
    else:
        group = torch.ones(n, k // int(kind.removeprefix("group")))
        scale, offset = torch.tensor([[16], [16], [1]]), torch.tensor([[-128], [-113], [119]])
        weight = GroupWeight(
            pack_nibbles(nibbles), ones, (scale * group).byte(), (offset * group).char()
        )
    codes = torch.full((2, k), code, dtype=torch.int8)
    x = QuantizedActivation(codes, torch.ones(2), codes.sum(1, dtype=torch.int32))
    want = want_sums(weight, x)
    assert want.abs().max() > 1 << (24 if kind != "channel" else 21)
    assert torch.equal(sums(prepare(weight.to(device)), x, Tiling(16, 128, 4, 3, 2)), want)


@settings(max_examples=15)
@given(
    kind=st.sampled_from(KINDS),
    m=st.integers(0, 40),
    n=st.integers(1, 150),
    steps=st.integers(1, 5),
    tiled=st.sampled_from([(16, 64), (32, 64), (16, 128), (32, 128)]),
    splits=st.integers(1, 5),
)
def test_any_shape_gives_exact_sums(
    kind: str,
    m: int,
    n: int,
    steps: int,
    tiled: tuple[int, int],
    splits: int,
    device: torch.device,
) -> None:
    k = steps * int(kind.removeprefix("group") if kind.startswith("group") else 32)
    weight, x = random_weight(kind, n, k), random_rows(m, k)
    tiling = Tiling(*tiled, 4, 3, min(splits, steps))
    assert torch.equal(sums(prepare(weight.to(device)), x, tiling), want_sums(weight, x))


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_oracle_to_the_bit(kind: str, device: torch.device) -> None:
    for m, n, k, with_bias in ((1, 1, 128, True), (5, 300, 256, True), (21, 37, 256, False)):
        weight, x = random_weight(kind, n, k), random_rows(m, k)
        bias = torch.randn(n) if with_bias else None
        want = linear_oracle(x, weight, bias)
        bias = None if bias is None else bias.to(device)
        got = linear_op(to(x, device), prepare(weight.to(device)), bias)
        assert got.dtype == torch.float32
        assert torch.equal(got.cpu(), want)
        assert torch.equal(linear(to(x, device), weight.to(device), bias).cpu(), want)


@pytest.mark.parametrize("kind", ["group128", "channel", "int8"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_outputs_are_rounded_once(
    kind: str, dtype: torch.dtype, device: torch.device
) -> None:
    weight, x, bias = random_weight(kind, 70, 128), random_rows(9, 128), torch.randn(70).to(dtype)
    out = torch.empty(9, 70, dtype=dtype, device=device)
    prepare(weight.to(device)).multiply_into(out, to(x, device), bias.to(device))
    want = linear_oracle(x, weight, bias)
    if dtype == torch.bfloat16 and device.type == "cpu":  # the interpreter cuts bits off instead
        torch.testing.assert_close(out.float(), want, rtol=2**-7, atol=0)
    else:
        assert torch.equal(out.cpu(), want.to(dtype))


@pytest.mark.filterwarnings("ignore:overflow")
def test_subnormal_and_huge_scales(device: torch.device) -> None:
    weight, x = random_weight("channel", 40, 128), random_rows(4, 128)
    assert isinstance(weight, ChannelWeight)
    weight = replace(weight, scale=torch.logspace(-44, 34, 40), offset=-torch.logspace(-44, 34, 40))
    x = replace(x, scale=torch.tensor([1e-44, 1e-20, 1.0, 1e6]))
    got = prepare(weight.to(device)).multiply(to(x, device), None).cpu()
    assert torch.equal(got, linear_oracle(x, weight))


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows_no_channels(kind: str, device: torch.device) -> None:
    some = prepare(random_weight(kind, 3, 128).to(device))
    assert some.multiply(to(random_rows(0, 128), device), None).shape == (0, 3)
    none = prepare(random_weight(kind, 0, 128).to(device))
    assert none.multiply(to(random_rows(3, 128), device), None).shape == (3, 0)


def test_many_tiles_of_tokens_each_find_their_weights(device: torch.device) -> None:
    # More than pass by a tile of weights at a time, and a last crowd that is not full.
    weight, x = random_weight("group32", 257, 32), random_rows(16 * 19 + 1, 32)
    prepared = prepare(weight.to(device))
    assert torch.equal(sums(prepared, x, Tiling(16, 64, 4, 3)), want_sums(weight, x))


def test_inputs_are_left_alone(device: torch.device) -> None:
    weight, x = random_weight("channel", 9, 128).to(device), to(random_rows(3, 128), device)
    bias = torch.randn(9, device=device)
    before = [t.clone() for t in (x.codes, x.scale, x.row_sum, bias, *weight.tensors().values())]
    linear(x, weight, bias)
    after = (x.codes, x.scale, x.row_sum, bias, *weight.tensors().values())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_rows_within_a_larger_batch(device: torch.device) -> None:
    # Views that begin anywhere: addresses need not be multiples of anything.
    weight, x = random_weight("group64", 40, 128), random_rows(20, 128)
    whole = to(x, device)
    part = QuantizedActivation(whole.codes[3:12], whole.scale[3:12], whole.row_sum[3:12])
    got = prepare(weight.to(device)).multiply(part, None).cpu()
    assert torch.equal(got, linear_oracle(x, weight)[3:12])


def test_inputs_that_do_not_fit_are_refused(device: torch.device) -> None:
    weight, x = prepare(random_weight("int8", 8, 64).to(device)), to(random_rows(4, 64), device)
    with pytest.raises(ValueError, match="contiguous"):
        weight.multiply(to(random_rows(4, 96), device), None)
    with pytest.raises(ValueError, match="contiguous"):
        weight.multiply(replace(x, codes=x.codes[:, ::2]), None)
    with pytest.raises(ValueError, match="contiguous"):
        weight.multiply(replace(x, scale=x.scale.double()), None)
    with pytest.raises(ValueError, match="contiguous"):
        weight.multiply(x, torch.randn(7, device=device))
    with pytest.raises(ValueError, match="contiguous"):
        weight.multiply_into(torch.empty(8, 4, device=device).T, x)
    with pytest.raises(ValueError, match="on meta"):
        weight.multiply(to(x, torch.device("meta")), None)
    with pytest.raises(BackendUnavailable, match="oracle"):
        weight.multiply(torch.randn(4, 64, device=device), None)
    with pytest.raises(BackendUnavailable, match="laid out for backend 'gpu'"):
        linear_op(x, weight, backend="cpu")


def test_what_is_refused_by_declaration() -> None:
    cuda = torch.device("cuda", 0)
    assert "CUDA GPUs only" in str(unsupported(torch.device("cpu")))
    assert "the weight is on cpu" in str(unsupported(cuda, weight=random_weight("int8", 4, 32)))
    for k in (16, 48, 1 << 17):
        weight = Int8Weight(torch.empty(1, k, dtype=torch.int8, device="meta"), torch.ones(1))
        assert f"{k} input channels" in str(unsupported(torch.device("meta"), weight=weight))
    assert "int8 rows" in str(unsupported(cuda, x=torch.zeros(1, 32)))
    with pytest.raises(BackendUnavailable, match="cuda devices only"):
        prepare_for(random_weight("int8", 4, 32), "gpu")


def test_a_cuda_graph_may_hold_it(cuda: torch.device) -> None:
    weight, tiling = random_weight("group128", 300, 1024), Tiling(16, 64, 4, 5, 4)
    prepared, x = prepare(weight.to(cuda)), to(random_rows(7, 1024), cuda)
    out = prepared.multiply_into(torch.empty(7, 300, device=cuda), x, tiling=tiling)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        prepared.multiply_into(out, x, tiling=tiling)
    for _ in range(3):
        fresh = random_rows(7, 1024)
        for name in ("codes", "scale", "row_sum"):
            getattr(x, name).copy_(getattr(fresh, name))
        graph.replay()
        assert torch.equal(out.cpu(), linear_oracle(fresh, weight))


def test_auto_takes_the_gpu_where_there_is_one(cuda: torch.device) -> None:
    weight = prepare_for(random_weight("group128", 64, 256).to(cuda))
    assert isinstance(weight, GpuWeight)
    assert unsupported(cuda, weight=random_weight("group128", 64, 256).to(cuda)) is None
