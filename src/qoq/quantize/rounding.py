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
    rows = _Rows(grid.channels(order))
    work = weight.T[order].contiguous()  # [K, N]: a column of the weight is a contiguous row here
    codes = torch.empty_like(work)
    pivots = upper.diagonal().tolist()
    for start in range(0, len(work), BLOCK):
        stop = min(start + BLOCK, len(work))
        errors = torch.empty_like(work[start:stop])
        for k in range(start, stop):
            codes[k], value = rows.nearest(k, work[k])
            error = torch.sub(work[k], value, out=errors[k - start]).div_(pivots[k])
            work[k + 1 : stop].addr_(upper[k, k + 1 : stop], error, alpha=-1)
        work[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    return codes[torch.argsort(order)].T.contiguous()


def refine(weight: Tensor, codes: Tensor, grid: Grid, hessian: Tensor, sweeps: int) -> Tensor:
    """Coordinate descent on the same objective: no sweep can make it worse."""
    rows, diagonal = _Rows(grid), hessian.diagonal().tolist()
    turned = codes.T.contiguous()  # [K, N], as above
    for _ in range(sweeps):
        values = grid.values(turned.T).T.contiguous()
        gradient = hessian @ (values - weight.T)
        for start in range(0, len(turned), BLOCK):
            stop = min(start + BLOCK, len(turned))
            steps = torch.zeros_like(turned[start:stop])
            for k in range(start, stop):
                if diagonal[k] <= 0:
                    continue
                turned[k], value = rows.nearest(k, values[k] - gradient[k] / diagonal[k])
                step = torch.sub(value, values[k], out=steps[k - start])
                gradient[k + 1 : stop].addr_(hessian[k, k + 1 : stop], step)
            gradient[stop:].addmm_(hessian[stop:, start:stop], steps)
    return turned.T.contiguous()


class _Rows:
    """A grid turned round: for channel k, codes and values of its N elements as one row."""

    def __init__(self, grid: Grid) -> None:
        self._share: list[int] = grid.share.tolist()
        self._scale, self._offset, self._high = (
            t.T.contiguous() for t in (grid.scale, grid.offset, grid.high)
        )
        self._low = grid.low

    def nearest(self, k: int, row: Tensor) -> tuple[Tensor, Tensor]:
        """(codes, values) [N] nearest to row [N]."""
        s = self._share[k]
        scale, offset = self._scale[s], self._offset[s]
        codes = torch.sub(row, offset).div_(scale).round_()
        codes = torch.minimum(codes, self._high[s], out=codes).clamp_(min=self._low)
        return codes, codes * scale + offset
