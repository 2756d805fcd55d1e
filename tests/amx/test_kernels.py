"""How many tile instructions the amx kernels carry out, and that they give their tiles back."""

import os
from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch

from helpers.amx import counts
from kernels.test_linear import KINDS, random_rows, random_weight
from qoq.kernels.cpu import backend
from qoq.kernels.cpu.linear import prepare
from qoq.kernels.linear import linear, linear_oracle


@pytest.fixture(params=[1, 3], autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    with patch.dict(os.environ, {"QOQ_ISA": "amx", "QOQ_NUM_THREADS": str(request.param)}):
        backend.forget()
        assert backend.backend().isa == "amx"
        yield request.param
    backend.forget()


def new(before: dict[str, int]) -> dict[str, int]:
    return {name: count - before[name] for name, count in counts().items()}


def up(x: int, unit: int) -> int:
    return -(-x // unit)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("m", "groups", "n"), [(12, 3, 1), (33, 17, 65), (64, 16, 64), (600, 1, 130)]
)
def test_a_linear_in_tiles(kind: str, m: int, groups: int, n: int) -> None:
    k = groups * (int(kind.removeprefix("group")) if "group" in kind else 32)
    weight, x = random_weight(kind, n, k), random_rows(m, k)
    prepared, before = prepare(weight), counts()
    got = linear(x, prepared)
    done = new(before)
    assert torch.equal(got, linear_oracle(x, weight))
    # 32 rows times 32 channels are 4 registers of sums; they wait in memory between chunks of 512.
    squares, chunks, steps = up(m, 32) * up(n, 64) * 2, up(k, 512), up(k, 64)
    tasks = up(n, 64) * up(up(m, 32), 16)
    assert done == {
        "loadconfig": tasks,
        "release": tasks,
        "in_use": 0,
        "storeconfig": 0,
        "multiply": squares * steps * 4,
        "zero": squares * 4,
        "load": squares * (steps + chunks - 1) * 4,
        "store": squares * chunks * 4,
    }


@pytest.mark.parametrize("kind", KINDS)
def test_few_rows_need_no_tiles(kind: str) -> None:
    weight, before = random_weight(kind, 67, 384), counts()
    prepared = prepare(weight)
    for m in range(1, 12):
        x = random_rows(m, 384)
        assert torch.equal(linear(x, prepared), linear_oracle(x, weight))
    assert counts() == before


def test_the_roof_is_measured_in_tiles(threads: int) -> None:
    before = counts()
    products = backend.extension().spin_products(backend.backend(), 640)
    done = new(before)
    assert done["multiply"] == threads * 10 * 4
    assert products == done["multiply"] * 16 * 16 * 64
    assert done["loadconfig"] == done["release"] == threads
    assert done["in_use"] == 0


def test_amx_is_chosen_where_there_is_amx() -> None:
    assert backend.extension().usable_isas()[-1] == "amx"
    os.environ["QOQ_ISA"] = ""
    backend.forget()
    assert backend.backend().isa == "amx"
