"""One linear: running moments, the correction for upstream errors, and the whole way to codes."""

import pytest
import torch
from torch import Tensor

from helpers.quantizing import correlated
from qoq.formats.scheme import WeightFormat
from qoq.quantize.linears import (
    CORRECTION_DAMPING,
    NOISE,
    Moments,
    corrected,
    quantize_linear,
)
from qoq.quantize.recipe import PUBLISHED_G128, PUBLISHED_PER_CHANNEL, QOQ, RTN, Recipe

FORMATS = [WeightFormat(4, 32), WeightFormat(4), WeightFormat(8)]


def moments_of(x: Tensor, x_float: Tensor | None = None, drift: Tensor | None = None) -> Moments:
    moments = Moments()
    moments.add(x, x_float, drift)
    return moments


def output_error(weight: Tensor, other: Tensor, x: Tensor) -> float:
    return float(((weight - other) @ x.T).square().sum() / (weight @ x.T).square().sum())


def test_moments_do_not_depend_on_how_rows_are_cut() -> None:
    x, x_float, drift = torch.randn(103, 24), torch.randn(103, 24), torch.randn(103, 9)
    whole, parts = moments_of(x, x_float, drift), Moments()
    for start, stop in ((0, 1), (1, 50), (50, 50), (50, 102), (102, 103)):
        cut = slice(start, stop)
        parts.add(x[cut], x_float[cut], drift[cut])
    assert parts.tokens == whole.tokens == 103
    for name in ("hessian", "cross", "drift"):
        got, wanted = getattr(parts, name), getattr(whole, name)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(whole.mean_hessian(), x.T @ x / 103, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole.cross, (x_float - x).T @ x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(whole.drift, drift.T @ x, rtol=1e-4, atol=1e-4)


def test_moments_without_a_reference() -> None:
    moments = moments_of(torch.randn(5, 4))
    assert moments.cross is None
    assert moments.drift is None
    with pytest.raises(ValueError, match="observed"):
        Moments().mean_hessian()


@pytest.mark.parametrize("drifts", [False, True])
def test_the_corrected_weight_solves_its_least_squares_problem(drifts: bool) -> None:
    """Against a general solver on the stacked, damped system."""
    tokens, k, n = 300, 20, 7
    weight, x = torch.randn(n, k), correlated(tokens, k, noise=0.5)
    x_float = x + 0.3 * torch.randn(tokens, k) @ torch.randn(k, k)
    drift = torch.randn(tokens, n) if drifts else None
    got = corrected(weight, moments_of(x, x_float, drift), 1.0)
    target = (x_float @ weight.T + (0 if drift is None else drift)).double()
    damping = CORRECTION_DAMPING * (1 + NOISE * k / tokens)
    ridge = (damping * (x.T @ x).diagonal().mean()).sqrt().double()
    rows = torch.cat([x.double(), ridge * torch.eye(k, dtype=torch.float64)])
    wanted = torch.linalg.lstsq(rows, torch.cat([target, ridge * weight.double().T])).solution.T
    torch.testing.assert_close(got.double(), wanted, rtol=1e-3, atol=1e-4)
    before = (x @ weight.T - target).square().sum()
    assert (x @ got.T - target).square().sum() < before


def test_half_the_strength_goes_half_the_way() -> None:
    weight, x = torch.randn(5, 16), correlated(80, 16)
    moments = moments_of(x, x + 0.1 * torch.randn(80, 16), torch.randn(80, 5))
    full = corrected(weight, moments, 1.0) - weight
    torch.testing.assert_close(corrected(weight, moments, 0.5) - weight, full / 2)
    assert full.abs().max() > 1e-3
    assert corrected(weight, moments, 0.0) is weight


def test_nothing_to_correct_or_nothing_to_correct_by() -> None:
    weight, x = torch.randn(5, 16), correlated(80, 16)
    same = corrected(weight, moments_of(x, x, torch.zeros(80, 5)), 1.0)
    torch.testing.assert_close(same, weight, rtol=1e-5, atol=1e-5)
    assert corrected(weight, moments_of(x), 1.0) is weight
    bad = moments_of(x, x + 1)
    assert bad.hessian is not None
    bad.hessian[2, 2] = torch.nan
    assert corrected(weight, bad, 1.0) is weight


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("recipe", [RTN, PUBLISHED_G128, PUBLISHED_PER_CHANNEL, QOQ], ids=str)
def test_reported_errors_are_those_of_the_packed_weight(fmt: WeightFormat, recipe: Recipe) -> None:
    weight, x = torch.randn(12, 64), correlated(200, 64, noise=1.0)
    packed, errors = quantize_linear(weight, moments_of(x), fmt, recipe)
    got = packed.dequantize()
    wanted = float((got - weight).square().sum() / weight.square().sum())
    assert errors["weight_error"] == pytest.approx(wanted, rel=1e-3)
    assert errors["output_error"] == pytest.approx(output_error(weight, got, x), rel=1e-2)
    assert packed.format == fmt


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_our_recipe_beats_the_published_and_that_beats_nearest(fmt: WeightFormat) -> None:
    weight, x = torch.randn(48, 128), correlated(400, 128)
    x[:, 7] *= 10
    errors = [
        quantize_linear(weight, moments_of(x), fmt, recipe)[1]["output_error"]
        for recipe in (QOQ, PUBLISHED_G128, RTN)
    ]
    # At 8 bits GPTQ leaves coordinate descent little to find.
    assert errors[0] < (1.0 if fmt.bits == 8 else 0.95) * errors[1]
    assert errors[1] < 0.8 * errors[2]


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_compensation_lowers_what_upstream_errors_cost(fmt: WeightFormat) -> None:
    """Inputs of the quantized stream are off in a way that depends on the inputs themselves."""
    weight, x_float = torch.randn(32, 64), correlated(500, 64, noise=1.0)
    x = x_float + 0.1 * x_float @ torch.randn(64, 64) / 8
    target = x_float @ weight.T

    def off(recipe: Recipe) -> float:
        packed, _ = quantize_linear(weight, moments_of(x, x_float), fmt, recipe)
        return float((x @ packed.dequantize().T - target).square().sum())

    assert off(QOQ) < 0.9 * off(QOQ.without("compensate"))


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_without_data_weights_are_rounded_to_nearest(fmt: WeightFormat) -> None:
    weight = torch.randn(9, 64)
    packed, errors = quantize_linear(weight, None, fmt, RTN)
    assert set(errors) == {"weight_error"}
    step = (weight.amax(1) - weight.amin(1)).max() / (15 if fmt.bits == 4 else 200)
    # Two-level groups round their offsets and scales too, and may clip where that costs less.
    slack = 1.5 if fmt.group_size else 1.0
    assert (packed.dequantize() - weight).abs().max() <= slack * step


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_an_all_zero_linear(fmt: WeightFormat) -> None:
    weight = torch.zeros(4, 64)
    packed, errors = quantize_linear(weight, moments_of(torch.zeros(10, 64)), fmt, QOQ)
    assert torch.equal(packed.dequantize(), weight)
    assert errors == {"weight_error": 0.0, "output_error": 0.0}


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_inputs_that_are_no_numbers_mean_rounding_to_nearest(bad: float, fmt: WeightFormat) -> None:
    weight, x = torch.randn(6, 64), torch.randn(50, 64)
    x[3, 3] = bad
    packed, errors = quantize_linear(weight, moments_of(x, x, torch.randn(50, 6)), fmt, QOQ)
    nearest, _ = quantize_linear(weight, None, fmt, QOQ)
    assert set(errors) == {"weight_error"}
    for name, tensor in nearest.tensors().items():
        assert torch.equal(packed.tensors()[name], tensor)
