"""Hadamard matrices: orthogonal, flat, and the fast product equals the dense one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qoq.errors import UnsupportedModelError
from qoq.formats.hadamard import hadamard_matrix, has_hadamard, rotate_last

PALEY = [12, 20, 28, 36, 40, 60, 108, 140]
SIZES = [1, 2, 4, 8, 64, 128, *PALEY, 24, 80, 96, 192, 104, 448, 576]


@pytest.mark.parametrize("n", SIZES)
def test_orthogonal_and_flat(n: int) -> None:
    h = hadamard_matrix(n)
    assert h.dtype == torch.float64
    assert h.shape == (n, n)
    torch.testing.assert_close(h @ h.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)
    flat = torch.full_like(h, n**-0.5)
    torch.testing.assert_close(h.abs(), flat, rtol=0, atol=1e-12)


def test_powers_of_two_are_sylvesters() -> None:
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    want = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(4):
        want = torch.kron(two, want)
    torch.testing.assert_close(hadamard_matrix(16), want / 4)


@given(n=st.sampled_from(SIZES), lead=st.sampled_from([(), (3,), (2, 1, 4), (0, 2)]))
def test_fast_product_equals_dense(n: int, lead: tuple[int, ...]) -> None:
    x = torch.randn(*lead, n, dtype=torch.float64)
    torch.testing.assert_close(rotate_last(x), x @ hadamard_matrix(n), rtol=0, atol=1e-10)


def test_dtype_is_kept() -> None:
    assert rotate_last(torch.randn(2, 24)).dtype == torch.float32


@pytest.mark.parametrize("n", [0, 3, 5, 6, 14, 15, 92])
def test_sizes_without_a_construction(n: int) -> None:
    assert not has_hadamard(n)
    with pytest.raises(UnsupportedModelError):
        hadamard_matrix(n)


def test_hidden_sizes_of_real_models() -> None:
    sizes = [384, 896, 1024, 1536, 2048, 2560, 3072, 3584, 4096, 5120, 8192]
    assert all(has_hadamard(n) for n in sizes)
    assert has_hadamard(11008)  # 172 * 64: Llama 1 and 2's intermediate size
    assert not has_hadamard(-4)
