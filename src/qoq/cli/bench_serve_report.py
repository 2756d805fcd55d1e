"""What ``qoq bench serve`` prints: the figures of a load test as lines and a table."""

from typing import Any

from qoq.cli.terminal import note

METRIC_ROWS = ("ttft", "tpot", "itl", "e2el")


def title(facts: dict[str, Any]) -> str:
    """A line above a picture."""
    held = facts["max_concurrency"]
    rate = f"{facts['request_rate']} requests/s"
    if "ramp_up_strategy" in facts:
        rate = f"{facts['ramp_up_start_rps']:g} to {facts['ramp_up_end_rps']:g} requests/s"
    pace = rate if held is None else f"{held} at a time"
    return (
        f"{facts['model']}: {facts['completed']} requests, {pace}, "
        f"{facts['output_throughput']:.1f} output tokens/s"
    )


def show(facts: dict[str, Any], percentiles: list[int]) -> None:
    """Print them; ``percentiles`` are those in ``facts``."""
    print(f"{facts['model']} at {facts['base_url']}, {facts['dataset_name']}")
    print(f"requests              {facts['completed']} completed, {facts['failed']} failed")
    for kind, count in facts["failures"].items():
        print(f"  {kind:19} {count}")
    print(f"duration              {facts['duration']:.2f} s")
    print(
        f"tokens                {facts['total_input_tokens']} in, "
        f"{facts['total_output_tokens']} out"
    )
    print(f"requests/s            {facts['request_throughput']:.2f}")
    if "request_goodput" in facts:
        print(f"good requests/s       {facts['request_goodput']:.2f}")
    print(f"output tokens/s       {facts['output_throughput']:.1f}")
    print(f"total tokens/s        {facts['total_token_throughput']:.1f}")
    print(f"most at once          {facts['max_concurrent_requests']}")
    columns = ["mean", "median", *(f"p{p}" for p in percentiles)]
    print("ms        " + "".join(f"{name:>11}" for name in columns))
    for metric in METRIC_ROWS:
        cells = [facts[f"{name}_{metric}_ms"] for name in columns]
        shown = ("-" if cell is None else f"{cell:.2f}" for cell in cells)
        print(f"{metric.upper():10}" + "".join(f"{cell:>11}" for cell in shown))
    if facts["request_rate"] != "inf" and facts["max_late_ms"] > 100:
        note(f"Some requests left {facts['max_late_ms']:.0f} ms late: held back, or a slow client.")
