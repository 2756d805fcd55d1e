"""One part of the check in a process of its own: a fault, or a GPU that hangs, ends this part only.

python -m qoq.bench.gpu.worker PART FILE CEILINGS SECONDS    rows, a JSON line each, as they come
python -m qoq.bench.gpu.worker PART --warm SHARE OF          compile what the part will run
"""

import dataclasses
import faulthandler
import json
import signal
import sys
from pathlib import Path

from qoq.bench.gpu.bench import Bench, Ceilings
from qoq.bench.gpu.clock import GraphClock
from qoq.bench.gpu.parts import PARTS
from qoq.kernels.device import choose_device


def main(arguments: list[str]) -> None:
    """See the module."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)  # what it is doing, before it is stopped
    part = PARTS[arguments[0]]
    bench = Bench(choose_device("cuda").device, GraphClock())
    if arguments[1] == "--warm":
        if part.warm is not None:
            part.warm(bench, int(arguments[2]), int(arguments[3]))
        return
    known = json.loads(arguments[2])
    bench = dataclasses.replace(
        bench,
        ceilings=None if known is None else Ceilings(**known),
        seconds=float(arguments[3]),
    )
    with Path(arguments[1]).open("w", encoding="utf-8") as file:
        for row in part.rows(bench):
            print(json.dumps(row), file=file, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
