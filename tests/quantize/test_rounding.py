"""Rounding: GPTQ and coordinate descent lower one objective, and nothing makes them crash."""

import pytest
import torch
from torch import Tensor

from helpers.quantizing import correlated
from qoq.formats.scheme import WeightFormat
from qoq.quantize import rounding
from qoq.quantize.grids import Grid, make_grid
from qoq.quantize.rounding import damped, inverse_cholesky, refine, round_gptq

FORMATS = [WeightFormat(4, 32), WeightFormat(4), WeightFormat(8)]


def objective(weight: Tensor, codes: Tensor, grid: Grid, hessian: Tensor) -> Tensor:
    """tr((W - W') H (W - W')^T) per row, fp64."""
    error = (grid.values(codes) - weight).double()
    return ((error @ hessian.double()) * error).sum(1)


def problem(
    fmt: WeightFormat, n: int = 24, k: int = 160, tokens: int = 500
) -> tuple[Tensor, Grid, Tensor]:
    weight, x = torch.randn(n, k), correlated(tokens, k)
    hessian = x.T @ x / tokens
    return weight, make_grid(weight, fmt, hessian.diagonal()), hessian


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("tokens", [40, 500])  # fewer tokens than channels: a singular Hessian
def test_gptq_beats_rounding_to_nearest(fmt: WeightFormat, tokens: int) -> None:
    weight, grid, hessian = problem(fmt, tokens=tokens)
    nearest = objective(weight, grid.codes(weight), grid, hessian)
    found = objective(weight, round_gptq(weight, grid, hessian, 0.01), grid, hessian)
    assert found.sum() < 0.6 * nearest.sum()
    assert (found <= nearest).double().mean() > 0.95  # nearly every single row


def test_gptq_equals_a_plain_transcription_of_the_paper() -> None:
    """Column after column, the inverse of what is left recomputed each time; no Cholesky."""
    weight, grid, hessian = problem(WeightFormat(4, 32), n=6, k=64)
    left = damped(hessian, 0.01).double()
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True).tolist()
    work, codes = weight.double().clone(), torch.zeros_like(weight)
    for position, column in enumerate(order):
        rest = order[position:]
        inverse = torch.linalg.inv(left[rest][:, rest])
        one = grid.channels(torch.tensor([column]))
        codes[:, [column]] = one.codes(work[:, [column]].float())
        error = work[:, column] - one.values(codes[:, [column]])[:, 0].double()
        work[:, rest] -= error[:, None] * (inverse[0] / inverse[0, 0])[None]
    got = round_gptq(weight, grid, hessian, 0.01)
    assert (got != codes).float().mean() < 0.01  # ties and rounding of fp32


def test_gptq_in_blocks_is_gptq(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, grid, hessian = problem(WeightFormat(4), k=96)
    whole = round_gptq(weight, grid, hessian, 0.01)
    monkeypatch.setattr(rounding, "BLOCK", 7)
    assert (round_gptq(weight, grid, hessian, 0.01) != whole).float().mean() < 0.01


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_codes_stay_within_the_grid(fmt: WeightFormat) -> None:
    weight, grid, hessian = problem(fmt, k=128, tokens=9)
    for codes in (
        round_gptq(weight, grid, hessian, 1e-4),
        refine(weight * 9, grid.codes(weight), grid, hessian, 2),
    ):
        assert torch.equal(codes, codes.round())
        assert (codes >= grid.low).all()
        assert (codes <= grid._spread(grid.high)).all()


@pytest.mark.parametrize("fill", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["all", "one"])
def test_a_hessian_that_is_no_number_falls_back_to_nearest(fill: float, where: str) -> None:
    weight, grid, hessian = problem(WeightFormat(4, 32))
    if where == "all":
        hessian[:] = fill
    else:
        hessian[3, 3] = fill
    assert torch.equal(round_gptq(weight, grid, hessian, 0.01), grid.codes(weight))


def test_inputs_that_are_always_zero_are_rounded_to_nearest() -> None:
    weight, grid, hessian = problem(WeightFormat(4, 32))
    dead = torch.tensor([0, 31, 77, 159])
    hessian[dead] = 0
    hessian[:, dead] = 0
    codes = round_gptq(weight, grid, hessian, 0.01)
    assert torch.equal(codes[:, dead], grid.codes(weight)[:, dead])
    assert torch.equal(
        round_gptq(weight, grid, torch.zeros_like(hessian), 0.01), grid.codes(weight)
    )


def test_damping_is_doubled_until_the_hessian_can_be_factored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An indefinite matrix needs more than what is asked for."""
    tried: list[float] = []

    def watch(hessian: Tensor, fraction: float) -> Tensor:
        tried.append(fraction)
        return damped(hessian, fraction)

    monkeypatch.setattr(rounding, "damped", watch)
    hessian = torch.eye(8)
    hessian[0, 1] = hessian[1, 0] = 1.3  # least eigenvalue -0.3
    upper = inverse_cholesky(hessian, 0.01)
    assert tried == [0.01 * 2**i for i in range(len(tried))]
    assert len(tried) == 6  # 0.32 is the first beyond 0.3
    assert upper is not None
    wanted = torch.linalg.inv(damped(hessian, tried[-1]))
    torch.testing.assert_close(upper.T @ upper, wanted, rtol=1e-3, atol=1e-4)


def test_damping_gives_up_at_last() -> None:
    assert inverse_cholesky(-torch.eye(8) * 1e30, 0.01) is None


def test_damped_adds_to_the_diagonal_only_and_leaves_its_argument() -> None:
    hessian = torch.diag(torch.tensor([4.0, 0.0, 2.0]))
    copy = hessian.clone()
    assert torch.equal(damped(hessian, 0.5).diagonal(), torch.tensor([5.0, 2.0, 3.0]))
    assert torch.equal(hessian, copy)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("start", ["nearest", "gptq", "random"])
def test_refining_never_makes_it_worse(fmt: WeightFormat, start: str) -> None:
    weight, grid, hessian = problem(fmt, tokens=70)
    if start == "gptq":
        codes = round_gptq(weight, grid, hessian, 0.01)
    else:
        codes = grid.codes(weight if start == "nearest" else torch.randn_like(weight))
    kept = codes.clone()
    before = objective(weight, codes, grid, hessian)
    for _ in range(3):
        codes = refine(weight, codes, grid, hessian, 1)
        after = objective(weight, codes, grid, hessian)
        assert (after <= before * (1 + 1e-4)).all()
        before = after
    first = objective(weight, kept, grid, hessian)
    assert after.sum() <= first.sum()
    if start != "gptq":
        assert after.sum() < 0.9 * first.sum()


def test_refining_by_no_sweeps_changes_nothing_and_never_its_argument() -> None:
    weight, grid, hessian = problem(WeightFormat(4))
    codes = grid.codes(weight)
    kept = codes.clone()
    assert torch.equal(refine(weight, codes, grid, hessian, 0), kept)
    refine(weight, codes, grid, hessian, 1)
    assert torch.equal(codes, kept)


def test_many_sweeps_are_many_single_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, grid, hessian = problem(WeightFormat(4, 32), k=96)
    codes = grid.codes(weight)
    thrice = refine(weight, codes, grid, hessian, 3)
    once = codes
    for _ in range(3):
        once = refine(weight, once, grid, hessian, 1)
    assert (thrice != once).float().mean() < 0.01
    monkeypatch.setattr(rounding, "BLOCK", 11)
    assert (refine(weight, codes, grid, hessian, 3) != thrice).float().mean() < 0.01


def test_a_fixed_point_of_refining_is_optimal_in_every_single_code() -> None:
    weight, grid, hessian = problem(WeightFormat(4), n=3, k=24)
    codes = refine(weight, grid.codes(weight), grid, hessian, 60)
    best = objective(weight, codes, grid, hessian)
    for k in range(24):
        for step in (-1, 1):
            other = codes.clone()
            other[:, k] = (other[:, k] + step).clamp(0, 15)
            assert (objective(weight, other, grid, hessian) >= best * (1 - 1e-4)).all()
