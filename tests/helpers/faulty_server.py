"""``qoq`` with an engine that fails: ``python faulty_server.py FAULT AT serve ...``.

From its step number AT on the engine raises, hangs without or with use of the processor, or just
takes a while.
"""

import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

from qoq.engine.engine import Engine


def raises(engine: Engine) -> NoReturn:
    raise RuntimeError("a cable was pulled")


def hangs(engine: Engine) -> NoReturn:
    while True:
        time.sleep(3600)


def spins(engine: Engine) -> NoReturn:
    while True:
        pass


def slow(engine: Engine) -> Any:
    time.sleep(0.05)
    return step(engine)


step = Engine.step
FAULTS: dict[str, Callable[[Engine], Any]] = {
    fault.__name__: fault for fault in (raises, hangs, spins, slow)
}


def main() -> None:
    fault, at = FAULTS[sys.argv[1]], int(sys.argv[2])
    count = 0

    def failing(engine: Engine) -> Any:
        nonlocal count
        count += 1
        return fault(engine) if count >= at else step(engine)

    Engine.step = failing  # type: ignore[method-assign]
    from qoq.cli import main as qoq

    sys.argv[1:] = sys.argv[3:]
    qoq()


if __name__ == "__main__":
    main()
