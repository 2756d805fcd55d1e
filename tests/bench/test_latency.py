"""Latency of one batch: every step is timed once, warm-ups are not."""

from dataclasses import replace
from pathlib import Path

import pytest

from helpers.tiny_texts import write_model_with_texts
from helpers.verbs import answer, refusal, run
from qoq.bench.latency import run as run_latency
from qoq.bench.random_weights import random_decoder
from qoq.bench.shapes import config_of
from qoq.formats.scheme import QuantScheme
from qoq.kernels.cpu import backend

MISSING = backend.missing()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


def test_every_step_is_timed_once() -> None:
    config = replace(
        config_of("llama-3.2-1b", 2),
        hidden_size=128,
        intermediate_size=256,
        vocab_size=300,
        num_heads=2,
        num_kv_heads=1,
    )
    scheme = QuantScheme.parse("w4a8kv4-g128")
    seen = []
    result = run_latency(
        random_decoder(config, scheme),
        scheme.kv,
        batch=3,
        prompt_len=20,
        output_len=6,
        iterations=4,
        warmups=1,
        done=lambda count, total: seen.append((count, total)),
    )
    assert seen == [(i, 5) for i in range(1, 6)]
    assert (len(result.first), len(result.steps), len(result.whole)) == (4, 4 * 5, 4)
    assert sum(result.first) + sum(result.steps) == pytest.approx(sum(result.whole))
    facts = result.to_dict()
    assert facts["iterations"] == 4
    step = facts["step_ms"]
    assert 0 < step["p50"] <= step["p90"] <= step["p99"] <= step["max"]


def test_the_verb(tmp_path: Path) -> None:
    model = write_model_with_texts(tmp_path / "tiny")
    base = ["bench", "latency", "--model", model, "--num-iters", 2, "--output-len", 5]
    got = answer(*base, "--batch-size", 2, "--input-len", 9)
    assert (got["batch"], got["prompt_len"], got["output_len"]) == (2, 9, 5)
    assert got["model"] == str(model)
    assert got["ttft_ms"]["mean"] > 0
    assert "first token" in run(*base).stdout
    assert "context" in refusal(*base, "--prompt-len", 200)
    assert "output-len" in refusal("bench", "latency", "--output-len", 1)
