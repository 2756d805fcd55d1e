"""A load test as a picture: how latencies are spread, and what happened when."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from qoq.bench.load import Sample
from qoq.bench.serving import METRICS, TITLES, percentile, seconds_of

BARS = 60  # of the timeline


def picture(samples: Sequence[Sample], title: str, path: Path) -> None:
    """Cumulative shares of each latency, and requests in flight over time with tokens a second.

    SVG or PNG by the name of ``path``.
    """
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    grid = figure.add_gridspec(2, 4, height_ratios=(1, 1))
    for column, metric in enumerate(METRICS):
        _spread(figure.add_subplot(grid[0, column]), metric, seconds_of(samples, metric))
    _timeline(figure.add_subplot(grid[1, :]), samples)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _spread(axes: Any, metric: str, seconds: Sequence[float]) -> None:
    axes.set_title(TITLES[metric].replace(" after", "\nafter"), fontsize=9)
    axes.set_xlabel("ms", fontsize=8)
    axes.set_ylim(0, 1.02)
    axes.set_yticks([0, 0.5, 0.9, 0.99], ["0", "50 %", "90 %", "99 %"])
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    if not seconds:
        axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center", color="grey")
        return
    values = sorted(1e3 * value for value in seconds)
    axes.plot(values, [(i + 1) / len(values) for i in range(len(values))], drawstyle="steps-post")
    axes.set_xlim(left=0)
    marks = f"median {percentile(values, 50):.3g}\np99 {percentile(values, 99):.3g}"
    axes.text(0.96, 0.06, marks, transform=axes.transAxes, ha="right", fontsize=8)


def _timeline(axes: Any, samples: Sequence[Sample]) -> None:
    end = max((sample.start + sample.e2el for sample in samples), default=0.0) or 1.0
    width = end / BARS
    tokens = [0.0] * BARS
    for sample in samples:
        at = sample.start + sample.ttft
        for gap in (0.0, *sample.gaps) if sample.output_tokens else ():
            at += gap
            # A piece of text may hold several tokens; each counts its share.
            tokens[min(int(at / width), BARS - 1)] += sample.output_tokens / (len(sample.gaps) + 1)
    axes.bar(
        [width * (i + 0.5) for i in range(BARS)],
        [count / width for count in tokens],
        width=width,
        color="tab:blue",
        alpha=0.35,
    )
    axes.set_xlabel("seconds")
    axes.set_ylabel("output tokens per second", color="tab:blue")
    axes.set_xlim(0, end)
    flight = axes.twinx()
    changes = sorted([(s.start, 1) for s in samples] + [(s.start + s.e2el, -1) for s in samples])
    times, count, counts = [0.0], 0, [0]
    for at, change in changes:
        count += change
        times.append(at)
        counts.append(count)
    flight.step(times, counts, where="post", color="tab:orange")
    flight.set_ylabel("requests in flight", color="tab:orange")
    flight.set_ylim(bottom=0)
    failed = [s.start + s.e2el for s in samples if s.failure is not None]
    if failed:
        flight.plot(failed, [0] * len(failed), "x", color="tab:red", label="failed", clip_on=False)
        flight.legend(loc="upper right", fontsize=8)
