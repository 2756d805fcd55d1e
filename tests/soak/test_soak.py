"""A short soak: 300 requests, some hang up, some are malformed, and nothing is left of them."""

from pathlib import Path

import pytest

from helpers.tiny import write_tiny_llama
from soak.soak import soak

WORDS = "it was the hello of times, it was the hill of hats, and he told the hollow well so. " * 30


@pytest.mark.timeout(900)
def test_three_hundred_requests(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path, seed=5, max_position_embeddings=512)
    # As few pages as one request may need, so that some are thrown out whatever the timing.
    options = ("--kv-cache-memory-bytes", "1M", "--max-num-batched-tokens", 96)
    figures = soak(tmp_path, 300, words=WORDS, concurrency=24, seed=1, options=options)
    assert figures["problems"] == []
    assert figures["log_errors"] == []
    assert figures["server_errors"] == 0
    gauges = figures["gauges_at_end"]
    idle = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    assert [gauges[name] for name in idle] == [0, 0, 0]
    assert gauges["num_preemptions_total"] > 0
    assert figures["hung_up"] > 60
    assert figures["malformed"] > 15
    assert figures["compared_with_alone"] > 20
    held = figures["held_when_warm"], figures["held_at_end"]
    assert held[1]["files"] <= held[0]["files"] + 2
    assert held[1]["children"] <= 2
