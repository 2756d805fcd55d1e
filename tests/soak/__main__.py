"""Soak a server: ``PYTHONPATH=tests python -m soak MODEL``; what follows ``--`` goes to it.

    PYTHONPATH=tests python -m soak OUT --requests 10000 -- --kv-cache-memory-bytes 8M

Prints the figures as JSON; status 1 if something went wrong.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

from qoq.evaluate.provenance import provenance
from soak.soak import soak

ROOT = Path(__file__).parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="soak")
    parser.add_argument("model", type=Path)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, default=None, help="write the figures to this file")
    given = sys.argv[1:]
    end = given.index("--") if "--" in given else len(given)
    args = parser.parse_args(given[:end])
    words = (ROOT / "examples" / "books-llama" / "heldout.txt").read_text(encoding="utf-8")
    figures = soak(
        args.model,
        args.requests,
        words=words,
        concurrency=args.concurrency,
        seed=args.seed,
        options=tuple(given[end + 1 :]),
    )
    figures |= provenance([])
    figures["command"] = shlex.join(["python", "-m", "soak", *sys.argv[1:]])
    text = json.dumps(figures, indent=2)
    print(text)
    if args.save is not None:
        args.save.write_text(text + "\n", encoding="utf-8")
    gauges = figures["gauges_at_end"]
    quiet = not (gauges["num_requests_running"] + gauges["num_requests_waiting"])
    clean = quiet and gauges["kv_cache_usage_perc"] == 0 and not figures["log_errors"]
    return int(bool(figures["problems"]) or not clean or figures["rss_growth"] > 0.05)


if __name__ == "__main__":
    sys.exit(main())
