"""One float linear to its packed form: grid, rounding, refinement (QServe section 4.3).

Also the correction for errors made upstream: the linear will read the *quantized* model's inputs,
so its target is not its own weight but the weight that best turns those inputs into what the
full-precision model computes (the asymmetric calibration of GPTAQ, arXiv 2504.02692; QEP,
arXiv 2504.09629). Writers of the residual stream are also aimed at the stream's own drift.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qoq.formats.scheme import WeightFormat
from qoq.formats.weights import PackedWeight
from qoq.quantize.grids import make_grid, pack
from qoq.quantize.recipe import Recipe
from qoq.quantize.rounding import damped, refine, round_gptq

CORRECTION_DAMPING = 0.1  # of the mean diagonal: keeps the corrected weight near the original
NOISE = 50.0  # how much faster, per input channel and token
REPORT_ROWS = 512  # evenly spaced outputs whose error is reported


@dataclass
class Moments:
    """Running second moments of what a linear reads, over T tokens.

    hessian fp32 [K, K] = sum x^T x of the quantized stream's inputs x; cross [K, K] =
    sum (x_float - x)^T x; drift [H, K] = sum (r_float - r)^T x, r the residual stream the linear
    will write to. cross and drift stay None where no correction is wanted.
    """

    tokens: int = 0
    hessian: Tensor | None = None
    cross: Tensor | None = None
    drift: Tensor | None = None

    def add(self, x: Tensor, x_float: Tensor | None, drift: Tensor | None) -> None:
        """One chunk: x, x_float [T, K], drift [T, H]."""
        self.tokens += x.shape[0]
        self.hessian = _accumulate(self.hessian, x, x)
        if x_float is not None:
            self.cross = _accumulate(self.cross, x_float - x, x)
        if drift is not None:
            self.drift = _accumulate(self.drift, drift, x)

    def finite(self) -> bool:
        """Whether every input seen was a number; else nothing can be learned from them."""
        return self.hessian is None or bool(torch.isfinite(self.hessian).all())

    def mean_hessian(self) -> Tensor:
        if self.hessian is None:
            raise ValueError("no inputs were observed")
        return self.hessian / self.tokens


def _accumulate(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    return a.T @ b if total is None else total.addmm_(a.T, b)


def corrected(weight: Tensor, moments: Moments, strength: float) -> Tensor:
    """The float weight [N, K] that answers the quantized stream as the float model would.

    argmin over W' of ||X_f W^T + drift - X W'^T||^2 + damping ||W' - W||^2, a step of ``strength``.
    The damping grows with K/T, or the step would fit the noise of few tokens (on the bundled model
    and 4096 tokens: KL 7.65e-3 at a fixed 0.1, 6.53e-3 without any correction, 6.47e-3 like this).
    """
    if not strength or moments.cross is None or moments.hessian is None:
        return weight
    wanted = weight @ moments.cross
    if moments.drift is not None:
        wanted = wanted + moments.drift
    damping = CORRECTION_DAMPING * (1 + NOISE * weight.shape[1] / moments.tokens)
    factor, info = torch.linalg.cholesky_ex(damped(moments.hessian, damping))
    if int(info) != 0:
        return weight
    step = torch.cholesky_solve(wanted.T, factor).T
    return weight + strength * step if bool(torch.isfinite(step).all()) else weight


def quantize_linear(
    weight: Tensor, moments: Moments | None, fmt: WeightFormat, recipe: Recipe
) -> tuple[PackedWeight, dict[str, float]]:
    """Weight fp32 [N, K] -> packed, with its relative weight and output error (squared, 0..1).

    Without moments (a recipe that needs no data), or with moments that hold NaN or Inf, all inputs
    count alike and rounding is to nearest.
    """
    if moments is None or not moments.finite():
        grid = make_grid(weight, fmt, None, recipe.search_range)
        packed = pack(grid.codes(weight), grid, fmt)
        error = packed.dequantize() - weight
        return packed, {"weight_error": _ratio(_power(error), _power(weight))}
    hessian = moments.mean_hessian()
    target = corrected(weight, moments, recipe.compensate)
    grid = make_grid(target, fmt, hessian.diagonal(), recipe.search_range)
    if recipe.gptq:
        codes = round_gptq(target, grid, hessian, recipe.damping)
    else:
        codes = grid.codes(target)
    codes = refine(target, codes, grid, hessian, recipe.refine_sweeps)
    packed = pack(codes, grid, fmt)
    error = packed.dequantize() - weight
    some = slice(None, None, max(1, len(weight) // REPORT_ROWS))
    return packed, {
        "weight_error": _ratio(_power(error), _power(weight)),
        "output_error": _ratio(_power(error[some], hessian), _power(weight[some], hessian)),
    }


def _power(weight: Tensor, hessian: Tensor | None = None) -> float:
    """Squared norm of weight [n, K], or of its output on inputs with this second moment."""
    return float((weight * (weight if hessian is None else weight @ hessian)).sum())


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0
