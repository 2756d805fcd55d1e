"""Benches: what they count, when they stop growing, and what they print."""

from pathlib import Path

import pytest

from helpers.tiny import write_tiny_llama
from helpers.verbs import answer, refusal, run
from qoq.bench import attention as bench_attention
from qoq.bench import kernels as bench
from qoq.bench import roof as roof_module
from qoq.bench.kernels import linear_rows, row_rows
from qoq.bench.random_weights import random_decoder
from qoq.bench.roof import Roof, measure_roof
from qoq.bench.shapes import SHAPES, config_of
from qoq.bench.throughput import Throughput, grow
from qoq.bench.throughput import run as run_throughput
from qoq.errors import RequestError
from qoq.formats.scheme import QuantScheme, WeightFormat
from qoq.kernels.cpu import backend
from qoq.models.config import ModelConfig

MISSING = backend.missing()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_are_read_as_the_models_are(shape: str) -> None:
    config = config_of(shape)
    assert config.num_heads % config.num_kv_heads == 0
    assert config.qkv_bias == ("qwen" in shape)
    assert config.hidden_size % 128 == config.intermediate_size % 128 == 0
    assert config_of(shape, 1).num_layers == 1


def test_an_unknown_shape_is_refused_with_those_there_are() -> None:
    with pytest.raises(RequestError, match=r"llama-3\.2-1b"):
        config_of("llama-9")


@pytest.mark.parametrize(
    "scheme", ["w4a8kv4-g128", "w4a8kv4", "w8a8kv8", "w4a8k8v4-g32", "w4a8-g64"]
)
def test_throughput_counts_every_token_once(small: ModelConfig, scheme: str) -> None:
    parsed = QuantScheme.parse(scheme)
    seen = []
    result = run_throughput(
        random_decoder(small, parsed),
        parsed.kv,
        batch=3,
        prompt_len=20,
        output_len=6,
        step=lambda done, total: seen.append((done, total)),
    )
    assert seen[-1] == (18, 18)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert result.output_tok_s == pytest.approx(18 / result.seconds)
    assert result.total_tok_s == pytest.approx(3 * 26 / result.seconds)
    read = 3 * 20 / result.prefill_tok_s
    assert result.decode_tok_s == pytest.approx((18 - 3) / (result.seconds - read))


def test_random_weights_are_those_of_their_seed(small: ModelConfig) -> None:
    scheme = QuantScheme.parse("w4a8kv4-g64")
    one, same, other = (
        random_decoder(small, scheme, backend="oracle", seed=seed).layers[1].down.weight
        for seed in (1, 1, 2)
    )
    assert one.codes.equal(same.codes)
    assert not one.codes.equal(other.codes)
    assert int(one.int8().max()) <= 127  # nothing wrapped
    assert one.dequantize().std() == pytest.approx(0.037, rel=0.3)


def fake(batch: int, speed: float) -> Throughput:
    return Throughput(batch, 1, 2, 1.0, 1.0, 1.0, speed, 1.0, 0)


def test_batches_grow_until_no_more_is_gained() -> None:
    speeds = {1: 10.0, 2: 19.0, 4: 18.0, 8: 25.0, 16: 24.0, 32: 24.0, 64: 99.0}
    tried = [result.batch for result in grow(lambda n: fake(n, speeds[n]), 64)]
    assert tried == [1, 2, 4, 8, 16, 32]
    assert [r.batch for r in grow(lambda n: fake(n, n), 5)] == [1, 2, 4]


def test_rows_are_measured_against_the_roof(
    small: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "COLD_BYTES", 100_000)
    roof = Roof(int8_peak_ops=1e12, read_bandwidth=1e10)
    assert roof.seconds(2e12, 1) == 2
    assert roof.seconds(1, 5e10) == 5
    rows = [
        *linear_rows(small, WeightFormat(4, 128), [1, 9], roof),
        *row_rows(small, [3], roof),
    ]
    assert [row.op for row in rows] == ["linear"] * 8 + ["rms_norm_quant", "silu_mul_quant"]
    for row in rows:
        assert row.fraction == pytest.approx(row.roof_seconds / row.seconds)
    down = next(row for row in rows if row.shape.startswith("down_proj") and row.M == 9)
    weight = 128 * 256 // 2 + 2 * 128 * 2 + 4 * 128
    assert down.roof_seconds == pytest.approx(
        max(2 * 9 * 128 * 256 / 1e12, (weight + 9 * 256) / 1e10)
    )


def test_the_roof_of_this_machine() -> None:
    roof = measure_roof(repeats=1)
    assert 1e9 < roof.int8_peak_ops < 1e15
    assert 1e8 < roof.read_bandwidth < 1e13


def test_verbs_print_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (bench, bench_attention):
        monkeypatch.setattr(module, "COLD_BYTES", 100_000)
        monkeypatch.setattr(module, "ENOUGH_SECONDS", 0.01)
    monkeypatch.setattr(roof_module, "_BUFFER", 16 << 20)
    monkeypatch.setenv("QOQ_NUM_THREADS", "1")  # --threads stays in the environment
    shape = ["--shape", "qwen2.5-0.5b"]
    few = ["--rows", "1", "--contexts", "64", "--batches", "2", "--chunks", "32,128"]
    facts = answer("bench", "kernels", *shape, *few)
    assert {"int8_peak_ops", "read_bandwidth", "isa", "threads", "commit"} <= set(facts)
    assert set(facts["rows"][0]) == {"op", "shape", "M", "seconds", "roof_seconds", "fraction"}
    assert [row["op"] for row in facts["rows"]].count("attention_prefill") == 4
    sizes = ["--layers", 1, "--prompt-len", 8, "--output-len", 2, "--batch", 2]
    facts = answer("bench", "throughput", *shape, *sizes)
    for key in ("prefill_tok_s", "decode_tok_s", "output_tok_s", "total_tok_s"):
        assert facts[key] > 0
    assert (facts["batch"], len(facts["runs"])) == (2, 1)
    assert facts["peak_rss_bytes"] > 1e8
    assert facts["ablate"] is None
    less = answer("bench", "throughput", *shape, *sizes, "--ablate", "linear", "--threads", 1)
    assert (less["ablate"], less["threads"]) == ("linear", 1)
    assert (
        "random weights of qwen2.5-0.5b, 1 layer,"
        in run("bench", "throughput", *shape, *sizes).stdout
    )


def test_a_checkpoint_instead_of_random_weights(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path)
    sizes = ["--prompt-len", 8, "--output-len", 2, "--batch", 2]
    facts = answer("bench", "throughput", "--model", tmp_path, *sizes)
    assert (facts["model"], facts["scheme"], facts["layers"]) == (str(tmp_path), "w16a16", 2)
    assert "shape" not in facts
    assert facts["decode_tok_s"] > 0
    base = ("bench", "throughput", "--model", tmp_path)
    assert "--layers is for random weights" in refusal(*base, "--layers", 1)
    assert "context of 128" in refusal(*base, "--prompt-len", 127)


def test_what_cannot_be_measured_is_refused() -> None:
    assert "--rows takes" in refusal("bench", "kernels", "--rows", "1,x")
    assert "no shape" in refusal("bench", "throughput", "--shape", "none")
    assert "--ablate takes" in refusal("bench", "throughput", "--ablate", "attention")
    assert "--threads takes" in refusal("bench", "throughput", "--threads", "0")
    assert "2 or more" in refusal("bench", "throughput", "--output-len", "1")
