"""Float weights [N, K] to codes: round to nearest, GPTQ, and coordinate descent after it.

All three minimise ``|| (W - W') X^T ||^2 = tr((W - W') H (W - W')^T)`` with H [K, K] the second
moment of the inputs, over a fixed grid per element (GPTQ: arXiv 2210.17323, with act order and
static groups as in QServe's recipe; coordinate descent: the same objective, one column at a time,
started from GPTQ's answer, as in QuantEase, arXiv 2309.01885).
"""

import torch
from torch import Tensor

from qoq.quantize.grids import Grid

BLOCK = 128  # columns handled before the rest of the matrix is updated
MAX_DAMPING_TRIES = 12


def damped(hessian: Tensor, fraction: float) -> Tensor:
    """H plus ``fraction`` of its mean diagonal; dead inputs (zero diagonal) get that mean too."""
    diagonal = hessian.diagonal()
    mean = float(diagonal.mean()) or 1.0
    out = hessian.clone()
    out.diagonal().add_(fraction * mean)
    out.diagonal()[diagonal <= 0] = mean
    return out


def inverse_cholesky(hessian: Tensor, damping: float) -> Tensor | None:
    """Upper Cholesky factor of (H + damping)^-1, doubling the damping until it exists.

    None when even strong damping does not help (H holds NaN or Inf): the caller rounds to nearest.
    """
    for attempt in range(MAX_DAMPING_TRIES):
        factor, info = torch.linalg.cholesky_ex(damped(hessian, damping * 2**attempt))
        if int(info) == 0 and bool(torch.isfinite(factor).all()):
            upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
            if int(info) == 0 and bool(torch.isfinite(upper).all()):
                found: Tensor = upper
                return found
    return None


def round_gptq(weight: Tensor, grid: Grid, hessian: Tensor, damping: float) -> Tensor:
    """Codes fp32 [N, K] by GPTQ: columns by falling diagonal, each error spread over the rest.

    Falls back to round to nearest when the Hessian cannot be factored.
    """
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    upper = inverse_cholesky(hessian[order][:, order], damping)
    if upper is None:
        return grid.codes(weight)
    work, grid = weight[:, order].clone(), grid.channels(order)
    codes = torch.empty_like(work)
    for start in range(0, work.shape[1], BLOCK):
        stop = min(start + BLOCK, work.shape[1])
        errors = torch.empty_like(work[:, start:stop])
        for i in range(start, stop):
            one = grid.column(i)
            column = work[:, i : i + 1]
            codes[:, i : i + 1] = one.codes(column)
            error = (column - one.values(codes[:, i : i + 1])) / upper[i, i]
            work[:, i:stop] -= error * upper[i : i + 1, i:stop]
            errors[:, i - start : i - start + 1] = error
        work[:, stop:] -= errors @ upper[start:stop, stop:]
    return codes[:, torch.argsort(order)]


def refine(weight: Tensor, codes: Tensor, grid: Grid, hessian: Tensor, sweeps: int) -> Tensor:
    """Coordinate descent on the same objective: no sweep can make it worse."""
    codes, diagonal = codes.clone(), hessian.diagonal()
    for _ in range(sweeps):
        values = grid.values(codes)
        gradient = (values - weight) @ hessian
        for start in range(0, weight.shape[1], BLOCK):
            stop = min(start + BLOCK, weight.shape[1])
            steps = torch.zeros_like(codes[:, start:stop])
            for i in range(start, stop):
                if diagonal[i] <= 0:
                    continue
                one = grid.column(i)
                old = values[:, i : i + 1]
                new = one.codes(old - gradient[:, i : i + 1] / diagonal[i])
                step = one.values(new) - old
                codes[:, i : i + 1] = new
                steps[:, i - start : i - start + 1] = step
                gradient[:, i:stop] += step * hessian[i : i + 1, i:stop]
            gradient[:, stop:] += steps @ hessian[start:stop, stop:]
    return codes
