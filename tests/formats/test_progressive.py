"""Progressive groups never leave int8: proved over every pair of integer extremes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qoq.formats.progressive import (
    MAX_GROUP_SCALE,
    PROTECTIVE_RANGE,
    channel_scales,
    group_codes,
    group_qparams,
    group_values,
    max_codes,
)


def extreme_pairs(limit: int) -> tuple[Tensor, Tensor]:
    """Every integer (low, high) with -limit <= low <= high <= limit."""
    ends = torch.arange(-limit, limit + 1)
    low, high = torch.meshgrid(ends, ends, indexing="ij")
    keep = low <= high
    return low[keep], high[keep]


def unclamped_codes(w8: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """Nearest of 0..15 with no regard to int8: what the protective range alone must make safe."""
    steps = (w8.double() - offset.double()[:, None]) / scale.double()[:, None]
    return steps.round().clamp(0, 15).to(torch.int32)


@pytest.mark.parametrize("ceil", [True, False])
def test_no_pair_of_extremes_leaves_int8(ceil: bool) -> None:
    low, high = extreme_pairs(PROTECTIVE_RANGE)
    assert len(low) == 239 * 240 // 2
    scale, offset = group_qparams(low.float(), high.float(), ceil=ceil)
    assert scale.dtype == torch.uint8
    assert offset.dtype == torch.int8
    assert scale.min() >= 1
    assert scale.max() <= MAX_GROUP_SCALE
    # Every integer weight a group of these extremes can hold, so every code in use.
    every = torch.arange(-PROTECTIVE_RANGE, PROTECTIVE_RANGE + 1)[None]
    weights = torch.minimum(torch.maximum(every, low[:, None]), high[:, None])
    codes = unclamped_codes(weights, scale, offset)
    values = group_values(codes, scale, offset)
    assert values.min() >= -128
    assert values.max() <= 127
    # The solver's clamp therefore never bites here, and a kernel's wrapping int8 sees no wrap.
    assert torch.equal(group_codes(weights.float(), scale, offset).int(), codes)
    assert torch.equal(values.to(torch.int8).int(), values)


def test_the_full_int8_range_would_overflow() -> None:
    low, high = extreme_pairs(127)
    scale, offset = group_qparams(low.float(), high.float(), ceil=True)
    values = group_values(unclamped_codes(high[:, None], scale, offset), scale, offset)
    assert values.max() > 127
    clamped = group_values(group_codes(high[:, None].float(), scale, offset), scale, offset)
    assert clamped.max() <= 127


def test_ceil_covers_the_range_and_floor_has_finer_steps() -> None:
    low, high = extreme_pairs(PROTECTIVE_RANGE)
    coarse, offset = group_qparams(low.float(), high.float(), ceil=True)
    fine, same = group_qparams(low.float(), high.float(), ceil=False)
    assert torch.equal(offset, same)
    assert (fine <= coarse).all()
    assert (coarse.int() - fine.int()).max() == 1
    assert (offset.int() + 15 * coarse.int() >= high).all()
    ends = torch.stack((low, high), dim=1)
    error = group_values(group_codes(ends.float(), coarse, offset), coarse, offset) - ends
    assert (2 * error.abs() <= coarse.int()[:, None]).all()


@given(
    low=st.floats(-119, 119, width=32),
    high=st.floats(-119, 119, width=32),
    inside=st.lists(st.floats(0, 1), max_size=6),
    ceil=st.booleans(),
)
def test_real_valued_weights_stay_in_int8(
    low: float, high: float, inside: list[float], ceil: bool
) -> None:
    low, high = min(low, high), max(low, high)
    w8 = torch.tensor([[low, high, *(low + t * (high - low) for t in inside)]])
    scale, offset = group_qparams(w8.amin(1), w8.amax(1), ceil=ceil)
    codes = unclamped_codes(w8, scale, offset)
    values = group_values(codes, scale, offset)
    assert values.min() >= -128
    assert values.max() <= 127
    if ceil:  # nothing is clipped: half a step, plus the rounding of the minimum below code 0
        assert (values - w8).abs().max() <= max(float(scale[0]) / 2, 0.5) + 1e-4


def test_half_integer_extremes_stay_in_int8() -> None:
    ends = torch.arange(-2 * PROTECTIVE_RANGE, 2 * PROTECTIVE_RANGE + 1) / 2
    for nudge in (0.0, 1e-4):  # on the ties, and just past them
        low, high = torch.meshgrid(ends + nudge, ends + nudge, indexing="ij")
        keep = (low <= high) & (high <= PROTECTIVE_RANGE)
        low, high = low[keep], high[keep]
        for ceil in (True, False):
            scale, offset = group_qparams(low, high, ceil=ceil)
            w8 = torch.stack((low, high), dim=1)
            values = group_values(unclamped_codes(w8, scale, offset), scale, offset)
            assert values.min() >= -128
            assert values.max() <= 127


def test_max_codes_is_the_largest_that_fits() -> None:
    scale = torch.arange(1, 17, dtype=torch.uint8)[:, None].expand(16, 256).contiguous()
    offset = torch.arange(-128, 128).to(torch.int8)[None].expand(16, 256).contiguous()
    got = max_codes(scale, offset)
    for s in range(1, 17):
        for o in range(-128, 128):
            want = max(c for c in range(16) if c * s + o <= 127)
            assert got[s - 1, o + 128] == want


def test_group_codes_never_pass_max_codes() -> None:
    # A solver (GPTQ) may hand over weights far outside the range the group was made for.
    w8 = torch.randn(5, 3, 32) * 200
    scale = torch.randint(1, 17, (5, 3), dtype=torch.uint8)
    offset = torch.randint(-119, 120, (5, 3)).to(torch.int8)
    values = group_values(group_codes(w8, scale, offset), scale, offset)
    assert values.min() >= -128
    assert values.max() <= 127
    assert (group_codes(w8, scale, offset) == 0).any()


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (16, 128)])
def test_channel_scales_fill_the_protective_range(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape) * torch.logspace(-6, 6, shape[0])[:, None]
    scale = channel_scales(weight)
    assert scale.dtype == torch.float32
    peak = (weight / scale[:, None]).abs().amax(1)
    torch.testing.assert_close(peak, torch.full_like(peak, PROTECTIVE_RANGE))


def test_channel_scales_of_empty_rows() -> None:
    assert channel_scales(torch.zeros(2, 4)).tolist() == [1.0, 1.0]
    # absmax / 119 vanishes in fp32: the scale must not become 0.
    assert channel_scales(torch.full((1, 4), 1e-45)).item() > 0
