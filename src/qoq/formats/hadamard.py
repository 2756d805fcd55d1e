"""Orthogonal Hadamard matrices for any size that is a power of two times a known base.

Sylvester's doubling for powers of two; otherwise Kronecker with a base built by Paley's first
construction (q = 3 mod 4: size q + 1) or second construction (q = 1 mod 4: size 2(q + 1)).
Used to rotate the residual stream, attention heads and (optionally) keys (QServe section 4.2).
"""

import functools
import math

import torch
from torch import Tensor

from qoq.errors import UnsupportedModelError


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


def _jacobsthal(q: int) -> Tensor:
    """Quadratic-residue matrix [q, q] over the prime field: +1 residue, -1 non-residue, 0 diagonal."""
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
        conference = torch.cat([torch.cat([0 * one, row], 1), torch.cat([row.T, _jacobsthal(q)], 1)])
        eye = torch.eye(q + 1, dtype=torch.float64)
        plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(conference, plus) + torch.kron(eye, minus)
    return None


@functools.cache
def _base(n: int) -> Tensor | None:
    """+-1 Hadamard matrix of size n: Paley directly, else Sylvester doubling of a smaller one."""
    if n == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    paley = _paley(n) if n % 4 == 0 and n & (n - 1) else None
    if paley is not None:
        return paley
    half = _base(n // 2) if n % 2 == 0 else None
    if half is None:
        return None
    return torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), half)


def has_hadamard(n: int) -> bool:
    """Whether hadamard_matrix(n) exists here."""
    return _base(n) is not None


def hadamard_matrix(n: int) -> Tensor:
    """Orthogonal matrix fp64 [n, n] with entries +-1/sqrt(n); powers of two give Sylvester's.

    Raises UnsupportedModelError for sizes without a construction (n not a multiple of 4, ...).
    """
    base = _base(n)
    if base is None:
        raise UnsupportedModelError(
            f"No Hadamard matrix of size {n} can be built; switch the rotation off for this model."
        )
    return base / math.sqrt(n)
