"""Grids: what a weight may become always fits its format, and searching only helps."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers.quantizing import correlated
from qoq.formats.packing import unpack_nibbles
from qoq.formats.scheme import WeightFormat
from qoq.formats.weights import ChannelWeight, GroupWeight, Int8Weight
from qoq.quantize.grids import Grid, make_grid, pack
from qoq.quantize.rounding import _Rows, round_gptq

FORMATS = [WeightFormat(4, 32), WeightFormat(4, 64), WeightFormat(4), WeightFormat(8)]
PACKED = {4: (GroupWeight, ChannelWeight), 8: (Int8Weight,)}


def heavy(n: int, k: int, tail: float = 2.5) -> Tensor:
    """Weights with long tails, where clipping pays."""
    return torch.randn(n, k) * torch.randn(n, k).abs() ** tail


def loss(grid: Grid, weight: Tensor, importance: Tensor) -> Tensor:
    """Weighted squared error per row."""
    return (grid.values(grid.codes(weight)) - weight).square() @ importance


def objective(weight: Tensor, codes: Tensor, grid: Grid, hessian: Tensor) -> Tensor:
    error = (grid.values(codes) - weight).double()
    return ((error @ hessian.double()) * error).sum(1)


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_packed_codes_are_the_grid_s_values(fmt: WeightFormat, search: bool) -> None:
    weight = heavy(13, 128)
    grid = make_grid(weight, fmt, torch.rand(128), search)
    codes = grid.codes(weight)
    packed = pack(codes, grid, fmt)
    assert isinstance(packed, PACKED[fmt.bits])
    assert packed.format == fmt
    slack = 1e-6 * float(weight.abs().max())  # offset + code * step cancels where values are small
    torch.testing.assert_close(packed.dequantize(), grid.values(codes), rtol=0, atol=slack)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_codes_are_the_nearest_the_grid_has(fmt: WeightFormat) -> None:
    weight = heavy(5, 64)
    grid = make_grid(weight, fmt, None)
    low = int(grid.low)
    every = torch.arange(low, 128 if fmt.bits == 8 else 16, dtype=torch.float32)
    best = torch.full_like(weight, torch.inf)
    for code in every:
        reachable = code <= grid._spread(grid.high)
        error = (grid.values(torch.full_like(weight, float(code))) - weight).abs()
        best = torch.where(reachable, torch.minimum(best, error), best)
    got = (grid.values(grid.codes(weight)) - weight).abs()
    torch.testing.assert_close(got, best, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fmt", FORMATS[:3], ids=str)
def test_searching_the_range_is_never_worse(fmt: WeightFormat) -> None:
    weight, importance = heavy(40, 128), torch.rand(128) ** 4
    none = loss(make_grid(weight, fmt, importance), weight, importance)
    found = loss(make_grid(weight, fmt, importance, True), weight, importance)
    assert (found <= none * (1 + 1e-5)).all()
    assert found.sum() < 0.9 * none.sum()


@given(
    st.integers(1, 6),
    st.sampled_from([32, 64, 128]),
    st.integers(1, 3),
    st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 1e4]),
    st.floats(0, 6),
    st.booleans(),
)
def test_group_values_stay_in_int8_whatever_is_asked(
    n: int, group: int, groups: int, spread: float, tail: float, search: bool
) -> None:
    """Also for weights far from those the grid was made for, as error compensation makes them."""
    weight = heavy(n, group * groups, tail) * spread
    fmt = WeightFormat(4, group)
    grid = make_grid(weight, fmt, None, search)
    for moved in (weight, weight * 50, -weight * 50, weight + 1e5 * spread, weight - 1e5 * spread):
        packed = pack(grid.codes(moved), grid, fmt)
        assert isinstance(packed, GroupWeight)
        exact = grid_integers(packed)
        assert exact.min() >= -128
        assert exact.max() <= 127
        assert torch.equal(exact.to(torch.int8).flatten(1), packed.int8())
        assert 1 <= int(packed.group_scale.min()) <= int(packed.group_scale.max()) <= 16


def grid_integers(packed: GroupWeight) -> Tensor:
    """code * scale + offset in int64, nothing wrapped."""
    n, groups = packed.group_scale.shape
    codes = unpack_nibbles(packed.codes).to(torch.int64).reshape(n, groups, -1)
    return codes * packed.group_scale[..., None].long() + packed.group_offset[..., None].long()


def test_group_values_stay_in_int8_after_gptq() -> None:
    """GPTQ moves weights beyond the range their grid was made for."""
    weight, x = heavy(24, 128), correlated(60, 128, rank=3, noise=0.01)
    x[:, 5] *= 30
    fmt, hessian = WeightFormat(4, 32), x.T @ x
    grid = make_grid(weight, fmt, hessian.diagonal(), True)
    codes = round_gptq(weight, grid, hessian, 0.001)
    packed = pack(codes, grid, fmt)
    assert isinstance(packed, GroupWeight)
    exact = grid_integers(packed)
    assert exact.min() >= -128
    assert exact.max() <= 127


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("rows", ["zero", "constant", "tiny", "negative", "one spike"])
def test_degenerate_rows(fmt: WeightFormat, rows: str) -> None:
    weight = torch.randn(4, 128)
    weight[1] = {
        "zero": torch.zeros(128),
        "constant": torch.full((128,), 0.3),
        "tiny": torch.randn(128) * 1e-42,
        "negative": -torch.rand(128) - 1,
        "one spike": torch.nn.functional.one_hot(torch.tensor(17), 128) * 1e3,
    }[rows].float()
    grid = make_grid(weight, fmt, None, True)
    packed = pack(grid.codes(weight), grid, fmt)
    assert all(torch.isfinite(t.float()).all() for t in packed.tensors().values())
    scales = [t for n, t in packed.tensors().items() if n.endswith("scale")]
    assert all((t > 0).all() for t in scales)
    error = (packed.dequantize()[1] - weight[1]).abs().max()
    span = float(weight[1].abs().max())
    assert error <= span * (1 / 15 + 1 / 119) + 1e-30


def test_columns_and_orders_of_a_grid() -> None:
    weight, order = heavy(7, 96), torch.randperm(96)
    grid = make_grid(weight, WeightFormat(4, 32), None)
    codes = grid.codes(weight)
    assert torch.equal(grid.channels(order).codes(weight[:, order]), codes[:, order])
    rows = _Rows(grid)
    for k in (0, 31, 32, 95):
        one, value = rows.nearest(k, weight[:, k])
        assert torch.equal(one, codes[:, k])
        assert torch.equal(value, grid.values(codes)[:, k])


def test_importance_decides_what_is_clipped() -> None:
    """The one outlier of a group is kept when its input is large, cut when it is always zero."""
    weight = torch.randn(1, 32) * 0.1
    weight[0, 4] = 3.0
    importance = torch.ones(32)
    outlier = []
    for weigh in (1e4, 0.0):
        importance[4] = weigh
        grid = make_grid(weight, WeightFormat(4, 32), importance, True)
        outlier.append(float(grid.values(grid.codes(weight))[0, 4]))
    # Kept: rounded like any other value. Cut: the strongest shrink of a range from about 0 to 3 is
    # the cheapest for all the small weights.
    step = (3 - float(weight.min())) / 15
    assert abs(outlier[0] - 3) < step / 2
    assert outlier[1] < 3 - step
