"""Attention's bench: every format beside the others, and torch's answer to the same question."""

import time

import pytest
import torch

from qoq.bench import attention as bench
from qoq.bench.attention import COMPARED, decode_rows, in_turn, kv_name, prefill_cases, prefill_rows
from qoq.bench.roof import Roof
from qoq.formats.scheme import KVFormat
from qoq.kernels.cpu import backend
from qoq.models.config import ModelConfig

MISSING = backend.missing()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
ROOF = Roof(int8_peak_ops=1e12, read_bandwidth=1e10)


@pytest.fixture(autouse=True)
def _warm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "COLD_BYTES", 100_000)
    monkeypatch.setattr(bench, "ENOUGH_SECONDS", 0.001)


def test_decoding_over_every_format(small: ModelConfig) -> None:
    rows = list(decode_rows(small, COMPARED, [2], [70], ROOF))
    assert [row.shape.rsplit(", ", 1)[1] for row in rows] == ["kv4", "kv8", "bf16"]
    for row, vector_bytes in zip(rows, (32 + 4, 64 + 4, 2 * 64), strict=True):
        assert (row.op, row.M) == ("attention", 2)
        assert row.roof_seconds == pytest.approx(2 * 70 * 2 * vector_bytes / 1e10)
        assert row.fraction == pytest.approx(row.roof_seconds / row.seconds)


def test_prompts_beside_torch(small: ModelConfig) -> None:
    threads = torch.get_num_threads()
    rows = list(prefill_rows(small, COMPARED[:1], [30, 70, 200], [70, 40], ROOF))
    cases = [(row.shape.rsplit("context ", 1)[1], row.M) for row in rows]
    assert cases == [
        (f"{context}, {kind}", chunk)
        for context, chunk in ((70, 30), (70, 70), (40, 30))
        for kind in ("kv4", "torch SDPA bf16")
    ]
    assert len(rows) == 2 * prefill_cases([30, 70, 200], [70, 40])
    seen = 30 * 40 + 30 * 31 / 2
    small_roof = Roof(int8_peak_ops=1, read_bandwidth=1e10)
    row = next(prefill_rows(small, COMPARED[:1], [30], [70], small_roof))
    assert row.roof_seconds == pytest.approx(4 * 2 * 64 * seen)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(("chunk", "context"), [(9, 9), (5, 33)])
def test_torch_is_asked_the_same(
    small: ModelConfig, chunk: int, context: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draws = iter([torch.randn(1, 2, chunk, 64), torch.randn(2, 1, 1, context, 64)])
    q, (k, v) = kept = [next(draws), next(draws)]
    again = iter(kept)
    monkeypatch.setattr(torch, "randn", lambda *shape: next(again))
    got = bench._torch_prefill(small, chunk, context)()
    scores = (q @ k.mT) * small.sm_scale
    own = torch.arange(context - chunk, context)[:, None]
    want = scores.masked_fill(torch.arange(context) > own, -torch.inf).softmax(-1) @ v
    torch.testing.assert_close(got, want.bfloat16(), rtol=5e-2, atol=5e-2)


def test_runs_are_timed_in_turn() -> None:
    order: list[str] = []

    def run(name: str, seconds: float) -> None:
        order.append(name)
        time.sleep(seconds)

    slow, quick = in_turn([lambda: run("slow", 0.01), lambda: run("quick", 0.001)])
    assert slow > quick
    measured = order[4:]  # each ran twice to find out how long it takes
    assert measured == ["slow", "quick"] * (len(measured) // 2)
    assert len(measured) >= 2 * bench.MIN_RUNS


def test_names() -> None:
    formats = [KVFormat(4, 4), KVFormat(8, 4), KVFormat(16, 16)]
    assert [kv_name(kv) for kv in formats] == ["kv4", "k8v4", "bf16"]
