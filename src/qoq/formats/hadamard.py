"""Orthogonal Hadamard matrices for any size that is a power of two times a known base.

Sylvester's doubling for powers of two; otherwise Kronecker with a base built by Paley's first
construction (q = 3 mod 4: size q + 1) or second construction (q = 1 mod 4: size 2(q + 1)).
Used to rotate the residual stream, attention heads and (optionally) keys (QServe section 4.2).
"""

import math

import torch
from torch import Tensor

from qoq.errors import UnsupportedModelError


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


def _jacobsthal(q: int) -> Tensor:
    """Quadratic-residue matrix [q, q] over the prime field: +1 residue, -1 not, 0 diagonal."""
    residues = {(i * i) % q for i in range(1, q)}
    chi = torch.tensor([0.0] + [1.0 if i in residues else -1.0 for i in range(1, q)])
    index = (torch.arange(q)[:, None] - torch.arange(q)[None, :]) % q
    return chi.to(torch.float64)[index]


def _paley(n: int) -> Tensor | None:
    """+-1 Hadamard matrix [n, n] by Paley's constructions over prime fields, None if n has none."""
    one = torch.ones(1, 1, dtype=torch.float64)
    if _is_prime(n - 1) and (n - 1) % 4 == 3:
        q = n - 1
        row = torch.ones(1, q, dtype=torch.float64)
        skew = torch.cat([torch.cat([0 * one, row], 1), torch.cat([-row.T, _jacobsthal(q)], 1)])
        return skew + torch.eye(n, dtype=torch.float64)
    if n % 2 == 0 and _is_prime(n // 2 - 1) and (n // 2 - 1) % 4 == 1:
        q = n // 2 - 1
        row = torch.ones(1, q, dtype=torch.float64)
        conference = torch.cat(
            [torch.cat([0 * one, row], 1), torch.cat([row.T, _jacobsthal(q)], 1)]
        )
        eye = torch.eye(q + 1, dtype=torch.float64)
        plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(conference, plus) + torch.kron(eye, minus)
    return None


def _is_paley(n: int) -> bool:
    q, r = n - 1, n // 2 - 1
    return n % 4 == 0 and ((_is_prime(q) and q % 4 == 3) or (_is_prime(r) and r % 4 == 1))


def _split(n: int) -> tuple[int, int] | None:
    """n = 2**k * base with the smallest base that exists: (2**k, base), or None."""
    base, power = n, 1
    while base % 2 == 0:
        base, power = base // 2, power * 2
    while base <= n:
        if base == 1 or _is_paley(base):
            return power, base
        base, power = base * 2, power // 2
    return None


def has_hadamard(n: int) -> bool:
    """Whether a Hadamard matrix of size n can be built here (nothing is built to answer)."""
    return n > 0 and _split(n) is not None


def rotate_last(x: Tensor, *, inverse: bool = False) -> Tensor:
    """``x @ H`` (``x @ H.T`` if inverse), x [..., n], H Hadamard's matrix of size n; in x's dtype.

    Takes n log n instead of n * n steps: butterflies for the power of two, one small product for
    the base. Raises UnsupportedModelError for sizes without a construction (n odd, ...).
    """
    n = x.shape[-1]
    split = _split(n) if n else None
    if split is None:
        raise UnsupportedModelError(
            f"No Hadamard matrix of size {n} can be built; switch the rotation off for this model."
        )
    power, base = split
    y = x.reshape(-1, power, base)  # H = Sylvester(power) (x) Paley(base)
    if base > 1:
        paley = _paley(base)
        assert paley is not None
        y = y @ (paley.T if inverse else paley).to(y)
    half = 1
    while half < power:
        pairs = y.reshape(-1, power // (2 * half), 2, half, base)
        y = torch.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), dim=2)
        half *= 2
    return (y.reshape(x.shape)) / math.sqrt(n)


def hadamard_matrix(n: int) -> Tensor:
    """The orthogonal matrix itself, fp64 [n, n], entries +-1/sqrt(n); Sylvester's for 2**k."""
    return rotate_last(torch.eye(n, dtype=torch.float64))
