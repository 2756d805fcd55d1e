"""What a load test found: latencies, throughput, goodput and failures, under vLLM's names."""

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qoq.bench.load import Sample
from qoq.errors import RequestError

METRICS = ("ttft", "tpot", "itl", "e2el")
TITLES = {
    "ttft": "Time to first token",
    "tpot": "Time per output token after the first",
    "itl": "Inter-token latency",
    "e2el": "End-to-end latency",
}


def seconds_of(samples: Sequence[Sample], metric: str) -> list[float]:
    """Every measurement of ``metric`` in the requests that did not fail, in seconds."""
    good = [sample for sample in samples if sample.failure is None]
    pick: dict[str, Callable[[Sample], Sequence[float | None]]] = {
        "ttft": lambda sample: (sample.ttft,),
        "tpot": lambda sample: (sample.tpot,),
        "itl": lambda sample: sample.gaps,
        "e2el": lambda sample: (sample.e2el,),
    }
    return [value for sample in good for value in pick[metric](sample) if value is not None]


def summarize(
    samples: Sequence[Sample], goals: Mapping[str, float] | None = None, p: Sequence[float] = (99,)
) -> dict[str, Any]:
    """All figures of a run; times in milliseconds, rates per second.

    ``goals`` bound metrics in milliseconds: ``request_goodput`` counts the requests that meet all
    of them. ``p`` are the percentiles to give beside mean, median and deviation.
    """
    good = [sample for sample in samples if sample.failure is None]
    # From the first request to the last answer, whatever became of either.
    seconds = max((sample.start + sample.e2el for sample in samples), default=0.0)
    rate = 1 / seconds if seconds else 0.0
    inputs = sum(sample.input_tokens for sample in good)
    outputs = sum(sample.output_tokens for sample in good)
    facts: dict[str, Any] = {
        "duration": seconds,
        "completed": len(good),
        "failed": len(samples) - len(good),
        "failures": dict(Counter(sample.failure for sample in samples if sample.failure)),
        "errors": list(dict.fromkeys(s.message for s in samples if s.failure))[:5],
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(good) * rate,
        "output_throughput": outputs * rate,
        "total_token_throughput": (inputs + outputs) * rate,
        "max_concurrent_requests": _most_at_once(samples),
        "max_late_ms": 1e3 * max((sample.late for sample in samples), default=0.0),
    }
    if goals:
        facts["request_goodput"] = sum(_meets(sample, goals) for sample in good) * rate
    for metric in METRICS:
        for name, value in _statistics(seconds_of(samples, metric), p).items():
            facts[f"{name}_{metric}_ms"] = None if value is None else 1e3 * value
    return facts


def percentile(values: Sequence[float], p: float) -> float:
    """The ``p``-th percentile (0 to 100), between neighbours by their distance."""
    ordered = sorted(values)
    at = (len(ordered) - 1) * p / 100
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def parse_goals(words: Sequence[str]) -> dict[str, float]:
    """``ttft:200`` and the like: a metric and the most milliseconds it may take."""
    goals = {}
    for word in (part for text in words for part in text.replace(",", " ").split()):
        name, _, bound = word.partition(":")
        try:
            goals[name] = float(bound)
        except ValueError:
            name = ""
        if name not in ("ttft", "tpot", "e2el") or not goals[name] > 0:
            raise RequestError(
                f"--goodput takes ttft, tpot or e2el with milliseconds, such as ttft:200, not "
                f"{word!r}."
            )
    return goals


def _meets(sample: Sample, goals: Mapping[str, float]) -> bool:
    reached = {"ttft": sample.ttft, "tpot": sample.tpot or 0.0, "e2el": sample.e2el}
    return all(1e3 * reached[name] <= bound for name, bound in goals.items())


def _statistics(values: Sequence[float], p: Sequence[float]) -> dict[str, float | None]:
    names = ["mean", "median", "std", *(f"p{q:g}" for q in p)]
    if not values:
        return dict.fromkeys(names)
    return {
        "mean": statistics.fmean(values),
        "median": statistics.median(values),
        "std": statistics.pstdev(values),
        **{f"p{q:g}": percentile(values, q) for q in p},
    }


def _most_at_once(samples: Sequence[Sample]) -> int:
    """The most requests that were in flight together."""
    changes = [(s.start, 1) for s in samples] + [(s.start + s.e2el, -1) for s in samples]
    now = most = 0
    for _, change in sorted(changes):
        now += change
        most = max(most, now)
    return most
