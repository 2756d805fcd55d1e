"""Benches of the engine: invariance holds on both backends, would be seen to fail, and overhead."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.packed import write_random_packed
from helpers.verbs import answer, refusal, run
from qoq.bench.engine import step_time
from qoq.bench.invariance import Invariance
from qoq.formats.kv import KVPages
from qoq.kernels.cpu import backend as cpu
from qoq.models.batch import Batch
from qoq.models.decoder import Decoder
from qoq.models.load import load_model

LENGTHS = (1, 35, 300)
needs_cpu = pytest.mark.skipif(cpu.missing() is not None, reason=str(cpu.missing()))


@pytest.fixture(scope="module", params=["w4a8kv4-g32", "w4a8k8v4", "w8a8kv8"])
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    return write_random_packed(folder, request.param, norm=0.01)


@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=needs_cpu), "oracle"])
def test_no_bit_depends_on_the_batch(packed: Path, backend: str) -> None:
    model = load_model(packed, backend=backend)
    tried = Invariance(
        model.decoder, model.scheme.kv, backend=backend, lengths=LENGTHS, new_tokens=6
    )
    trials = {trial.name: trial for trial in tried.trials([2, 64], [33, 100])}
    assert [trial for trial in trials.values() if trial.mismatches] == []
    logprobs = [value for request in tried._truth for value in request.logprobs]
    assert min(logprobs) < -0.1
    assert len(set(logprobs)) > len(logprobs) // 2, "numbers too smooth to differ"
    assert all(trial.comparisons == len(LENGTHS) for trial in trials.values())
    assert trials["warm prefix cache"].cached_tokens == 32 + 288
    assert trials["thrown out at random"].preemptions > 0
    guessed = trials["guesses, right and wrong"]
    assert 0 < guessed.accepted_tokens < guessed.draft_tokens


@pytest.fixture(autouse=True)
def _quiet_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Leaky(Decoder):
    """Logits that feel the size of the batch, by a ten-thousandth."""

    def __call__(
        self,
        batch: Batch,
        kv: Sequence[KVPages],
        rows: Tensor | None = None,
        *,
        backend: str = "auto",
    ) -> Tensor:
        logits = super().__call__(batch, kv, rows, backend=backend)
        return logits * 1.0001 if batch.num_tokens == 2 else logits


def test_a_leak_is_seen(packed: Path) -> None:
    decoder = load_model(packed, backend="oracle").decoder
    leaky = Leaky(**vars(decoder))
    kv = load_model(packed, backend="oracle").scheme.kv
    tried = Invariance(leaky, kv, backend="oracle", lengths=(5, 9), new_tokens=4)
    trials = {trial.name: trial for trial in tried.trials([2], [100])}
    assert trials["batches of 2"].mismatches > 0
    assert trials["prompts in chunks of 100"].mismatches == 0


def test_the_invariance_verb(packed: Path) -> None:
    options: list[Any] = ["--backend", "oracle", "--batches", "2", "--chunks", "100"]
    facts = answer("bench", "invariance", packed, *options)
    assert facts["trials"][-2]["preemptions"] > 0  # a cache too small
    assert facts["trials"][-1]["accepted_tokens"] > 0
    assert facts["mismatches"] == 0
    assert facts["comparisons"] == sum(t["comparisons"] for t in facts["trials"]) == 6 * 6


def test_the_engine_verb_and_its_rows() -> None:
    facts = answer("bench", "engine", "--running", "1,3", "--waiting", "20", "--steps", "5")
    assert [(r["running"], r["waiting"]) for r in facts["rows"]] == [
        (1, 0),
        (1, 20),
        (3, 0),
        (3, 20),
    ]
    assert all(0 < row["median_ms"] <= row["p99_ms"] for row in facts["rows"])
    assert "median" in run("bench", "engine", "--running", "1", "--steps", "2").stdout
    assert "--steps" in refusal("bench", "engine", "--steps", "0")


def test_a_step_is_lean_and_blind_to_the_line() -> None:
    """A generous bound: docs/performance.md has what was measured."""
    alone, crowded = (
        min(step_time(64, n, steps=40).median_ms for _ in range(2)) for n in (0, 5000)
    )
    assert alone < 5
    assert crowded < 3 * alone + 1
