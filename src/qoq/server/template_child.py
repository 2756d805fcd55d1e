"""The process that renders chat templates: a line of JSON in, a line of JSON out."""

import json
import signal
import sys
from typing import Any

from qoq.errors import RequestError
from qoq.tokenizer import ChatTemplate

_MEMORY = 2 << 30  # bytes a template may make this process take
_GRACE_S = 1.0
_MAX_CHARACTERS = 64 << 20  # of a rendered prompt


def main() -> None:
    """The first line holds the seconds that a rendering may take; each further one a template and a
    conversation. Ends with its input.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's to handle
    hello = json.loads(sys.stdin.readline())
    # Import what renders, but not yet with the model's template: its constants are computed when it
    # is compiled, so that too must fall under the limits of a request.
    ChatTemplate("", {}).render([{}])
    _limit_memory()
    _write({"ready": True})
    for line in sys.stdin:
        # The server kills a rendering that takes too long; this one does where the server is gone.
        signal.setitimer(signal.ITIMER_REAL, hello["seconds"] + _GRACE_S)
        answer = _render(json.loads(line))
        signal.setitimer(signal.ITIMER_REAL, 0)
        _write(answer)


def _render(asked: dict[str, Any]) -> dict[str, str]:
    template = ChatTemplate.from_json(asked["template"])
    try:
        text = template.render(asked["messages"], **asked["options"])
    except RequestError as error:
        return {"error": str(error)[:2000]}
    if len(text) > _MAX_CHARACTERS:
        return {"error": f"The chat template made a prompt of {len(text)} characters."}
    return {"text": text}


def _write(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def _limit_memory() -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    except (ImportError, ValueError, OSError):
        return  # no such limit here; the time limit still holds


if __name__ == "__main__":
    main()
