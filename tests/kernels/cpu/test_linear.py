"""linear in C++: equal to the oracle to the bit, on every instruction set of this machine."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels.test_linear import KINDS, random_rows, random_weight
from qoq.errors import BackendUnavailable
from qoq.formats.activation import QuantizedActivation
from qoq.formats.packing import pack_nibbles
from qoq.formats.weights import ChannelWeight, GroupWeight, Int8Weight
from qoq.kernels.cpu.linear import prepare
from qoq.kernels.cpu.linear import unsupported as refusal
from qoq.kernels.linear import linear, linear_oracle
from qoq.kernels.linear import prepare as prepare_for

pytestmark = pytest.mark.usefixtures("variant")

# Rows around every switch (direct up to 4, blocks of 6 or 2, blocks of 384; with tile registers
# blocks of 32, at most 16 together), tiles of 64 channels, chunks of 2048 input channels (or 512).
SIZES = [
    *[(1, 128, 1), (2, 256, 63), (3, 2176, 64), (4, 4224, 65), (5, 128, 200), (6, 2048, 64)],
    *[(7, 384, 31), (8, 2176, 130), (17, 4224, 65), (385, 256, 64), (800, 128, 70)],
    (70, 1152, 65),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("m", "k", "n"), SIZES)
def test_equals_the_oracle_to_the_bit(kind: str, m: int, k: int, n: int) -> None:
    weight, x = random_weight(kind, n, k), random_rows(m, k)
    prepared = prepare(weight)
    assert prepared.shape == (n, k)
    assert prepared.format == weight.format
    for bias in (None, torch.randn(n)):
        assert torch.equal(linear(x, prepared, bias), linear_oracle(x, weight, bias))


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    m=st.integers(0, 30),
    n=st.integers(1, 150),
    blocks=st.integers(1, 5),
    kind=st.sampled_from(KINDS),
)
def test_any_size(m: int, n: int, blocks: int, kind: str) -> None:
    k = blocks * (int(kind.removeprefix("group")) if "group" in kind else 32)
    weight, x = random_weight(kind, n, k), random_rows(m, k)
    assert torch.equal(linear(x, prepare(weight)), linear_oracle(x, weight))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 67])
def test_every_number_of_rows(kind: str, n: int) -> None:
    """Which loops multiply depends on the rows: a few, from 12 on tile registers, blocks of 32."""
    k = 17 * (int(kind.removeprefix("group")) if "group" in kind else 32)
    weight, bias = random_weight(kind, n, k), torch.randn(n)
    prepared = prepare(weight)
    for m in (*range(1, 18), 31, 32, 33, 47, 49, 64, 65):
        x = random_rows(m, k)
        assert torch.equal(linear(x, prepared, bias), linear_oracle(x, weight, bias)), m


@pytest.mark.parametrize("m", [1, 9, 33])
@pytest.mark.parametrize("sign", [-127, 127])
def test_largest_sums(m: int, sign: int) -> None:
    k, n = 16384, 64
    codes = torch.full((m, k), sign, dtype=torch.int8)
    x = QuantizedActivation(codes, torch.ones(m), codes.sum(1, dtype=torch.int32))
    most = pack_nibbles(torch.full((n, k), 15, dtype=torch.uint8))
    grid = torch.ones(n, k // 128, dtype=torch.uint8)
    weights = [
        Int8Weight(torch.full((n, k), sign, dtype=torch.int8), torch.ones(n)),
        ChannelWeight(most, torch.ones(n), torch.zeros(n)),
        GroupWeight(most, torch.ones(n), grid * 16, (grid.to(torch.int8) * -113)),
        GroupWeight(most, torch.ones(n), grid, (grid.to(torch.int8) * 112)),
        GroupWeight(most * 0, torch.ones(n), grid, (grid.to(torch.int8) * -128)),
    ]
    for weight in weights:
        assert torch.equal(linear(x, prepare(weight)), linear_oracle(x, weight))


def test_rows_do_not_know_each_other() -> None:
    weight, x = prepare(random_weight("group128", 130, 512)), random_rows(23, 512)
    together = linear(x, weight)
    for r in (0, 11, 22):
        row = slice(r, r + 1)
        alone = QuantizedActivation(x.codes[row], x.scale[row], x.row_sum[row])
        assert torch.equal(linear(alone, weight)[0], together[r])


def test_torch_defaults_do_not_matter() -> None:
    weight, x = random_weight("group32", 70, 64), random_rows(3, 64)
    prepared, want = prepare(weight), linear_oracle(x, weight)
    before = torch.get_default_dtype()
    try:
        for dtype in (torch.bfloat16, torch.float64):
            torch.set_default_dtype(dtype)
            assert torch.equal(linear(x, prepared), want)
    finally:
        torch.set_default_dtype(before)


def test_weights_that_are_not_what_they_say_are_refused() -> None:
    good = random_weight("int8", 8, 64)
    assert isinstance(good, Int8Weight)
    for wrong in (
        Int8Weight(good.codes, good.scale.half()),
        Int8Weight(good.codes, good.scale[:5]),
    ):
        with pytest.raises(ValueError, match="contiguous"):
            prepare(wrong)
    away = good.to("meta")
    assert "meta" in str(refusal(torch.device("cpu"), weight=away))


def test_a_bias_of_another_dtype_is_converted() -> None:
    weight, x, bias = random_weight("channel", 9, 64), random_rows(2, 64), torch.randn(9).half()
    assert torch.equal(linear(x, prepare(weight), bias), linear_oracle(x, weight, bias))


def test_no_rows_no_channels() -> None:
    assert linear(random_rows(0, 64), prepare(random_weight("int8", 5, 64))).shape == (0, 5)
    assert linear(random_rows(3, 64), prepare(random_weight("channel", 0, 64))).shape == (3, 0)


def test_inputs_that_do_not_fit_are_refused() -> None:
    weight, x = prepare(random_weight("int8", 8, 64)), random_rows(4, 64)
    with pytest.raises(ValueError, match="contiguous"):
        linear(random_rows(4, 96), weight)
    with pytest.raises(ValueError, match="contiguous"):
        linear(QuantizedActivation(x.codes[:, ::2], x.scale, x.row_sum), weight)
    with pytest.raises(ValueError, match="contiguous"):
        linear(x, weight, torch.randn(7))
    with pytest.raises(BackendUnavailable, match="oracle"):
        linear(torch.randn(4, 64), weight)


def test_what_is_refused_by_declaration() -> None:
    cpu = torch.device("cpu")
    assert refusal(cpu) is None
    assert "CPU only" in str(refusal(torch.device("cuda")))
    assert "multiple of 32" in str(refusal(cpu, weight=random_weight("int8", 4, 33)))
    assert "int8 rows" in str(refusal(cpu, x=torch.zeros(1, 32)))


def test_weights_are_prepared_for_the_backend_asked_for() -> None:
    weight = random_weight("group32", 8, 64)
    assert prepare_for(weight, "oracle") is weight
    assert type(prepare_for(weight, "cpu")).__name__ == "TiledWeight"
    x = random_rows(3, 64)
    assert torch.equal(linear(x, weight, backend="cpu"), linear_oracle(x, weight))
    with pytest.raises(BackendUnavailable, match="laid out for backend 'cpu'"):
        linear(x, prepare(weight), backend="oracle")
