"""JSON as it leaves the server."""

import json
from typing import Any

from fastapi.responses import JSONResponse


def dumps(value: Any) -> str:
    """Compact JSON in UTF-8's characters, or in ASCII where a client's text holds lone surrogates.

    Those are valid in JSON's escapes, and what clients send is at times sent back to them.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        text.encode("utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text


class JSONAnswer(JSONResponse):
    """A response of ``dumps``."""

    def render(self, content: Any) -> bytes:
        return dumps(content).encode("utf-8")
