"""StartReport: what fits and what runs."""

from qoq.engine.report import start_report
from qoq.formats.scheme import KVFormat
from qoq.kvcache.pool import KVPool


def test_what_fits_and_what_runs() -> None:
    pool = KVPool(KVFormat(4, 4), 2, 10, 1, 16, 8)
    report = start_report(pool, max_model_len=64, max_requests=8)
    assert (report.kv_cache_tokens, report.kv_cache_bytes) == (160, pool.nbytes)
    assert report.max_concurrency == 2.5
    assert {"linear", "attention", "sample"} <= set(report.ops)
    assert (report.isa is not None) == any(op.startswith("cpu") for op in report.ops.values())
    text = "\n".join(report.lines())
    assert "160 tokens in pages of 16" in text
    assert "2.5 requests" in text
    assert all(op in text for op in report.ops)


def test_the_oracle_by_name_and_float_pages() -> None:
    quantized = KVPool(KVFormat(4, 4), 1, 2, 1, 16, 8)
    report = start_report(quantized, max_model_len=32, max_requests=1, backend="oracle")
    assert set(report.ops.values()) == {"oracle"}
    assert report.isa is None
    floats = start_report(
        KVPool(KVFormat(16, 16), 1, 2, 1, 16, 8), max_model_len=32, max_requests=1
    )
    assert floats.ops["attention"].startswith("oracle")
