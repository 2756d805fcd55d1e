"""The process that tries grammars out: a line of JSON in, a line of JSON out.

Each structure is compiled in a fork that has so much processor time and memory, and no more. Its
verdict hangs on the structure alone, not on how busy the machine is.
"""

import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

from qoq.engine.grammar import Compiler, Vocabulary
from qoq.errors import RequestError

SECONDS = 3.0  # of processor time for one structure
MEMORY = 512 << 20  # bytes it may take beside what is there
STACK = 4 << 20  # bytes for its recursions: less than a thread has that compiles it afterwards
_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes


def main() -> None:
    """The first line holds the vocabulary; each further one a structure. Ends with its input."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is our parent's to handle
    compiler = Compiler(Vocabulary.from_json(json.loads(sys.stdin.readline())))
    compiler.compile("json_object", "{}")  # what is set up at first use is not a structure's doing
    _say({"ready": True})
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _try(compiler, **json.loads(line))
        _, status = os.waitpid(child, 0)
        if status != 0:
            _say({"cut_off": True})


def _try(compiler: Compiler, kind: str, text: str) -> None:
    """In the fork: says {"bytes"}, what the compiled structure takes, or {"error"}; and exits."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stderr.fileno())  # where memory ends, so does the process, and not silently
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _limit_memory()
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # its default is to kill
    try:
        kept = compiler.compile(kind, text)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        answer: dict[str, Any] = {"bytes": grown * _UNIT}
        del kept
    except RequestError as error:
        answer = {"error": str(error)}
    except MemoryError:
        os._exit(1)
    _say(answer)
    os._exit(0)


def _limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_STACK, (STACK, resource.getrlimit(resource.RLIMIT_STACK)[1]))
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        return  # no such limit on this system; that of time still holds
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
