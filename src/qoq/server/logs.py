"""Logs as text for people or as one JSON object per line for machines; never a prompt or a key."""

import json
import logging
import sys
import time
from typing import Any, Literal

LogFormat = Literal["text", "json"]


class JsonFormatter(logging.Formatter):
    """time (UTC), level, logger, message, then the record's ``facts``, then a traceback if any."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": _utc(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_facts(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """The same on a line to read: facts as key=value."""

    def format(self, record: logging.LogRecord) -> str:
        skip = ("method", "path", "status", "message")
        facts = " ".join(f"{k}={v}" for k, v in _facts(record).items() if k not in skip)
        line = f"{_utc(record.created)} {record.levelname:7} {record.getMessage()}"
        line = f"{line} {facts}" if facts else line
        if record.exc_info:
            line = f"{line}\n{self.formatException(record.exc_info)}"
        return line


def log_config(form: LogFormat, level: str) -> dict[str, Any]:
    """A ``logging.config`` dictionary: everything to stderr; our access lines replace uvicorn's."""
    names = ("qoq.server", "qoq.access", "uvicorn", "uvicorn.error")
    formatter = JsonFormatter if form == "json" else TextFormatter
    quiet = {"handlers": ["stderr"], "level": level.upper(), "propagate": False}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": {"()": formatter}},
        "handlers": {
            "stderr": {
                "class": "logging.StreamHandler",
                "formatter": "line",
                "stream": sys.stderr,
            }
        },
        "loggers": {name: dict(quiet) for name in names},
    }


def _facts(record: logging.LogRecord) -> dict[str, Any]:
    facts = getattr(record, "facts", {})
    return facts if isinstance(facts, dict) else {}


def _utc(seconds: float) -> str:
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{whole}.{int(seconds % 1 * 1000):03d}Z"
