"""Sampling parameters that a model comes with: those of its generation_config.json."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qoq.engine.request import SamplingParams
from qoq.errors import RequestError, SourceError

GENERATION_CONFIG = "generation_config.json"
# Its names and ours.
_NAMES = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


def sampling_defaults(folder: str | Path) -> dict[str, Any]:
    """Fields of SamplingParams that the model in ``folder`` wants; {} where it says nothing.

    ``do_sample: false`` means temperature 0. Raises SourceError for a file that cannot be read or
    holds values that cannot be.
    """
    file = Path(folder) / GENERATION_CONFIG
    if not file.is_file():
        return {}
    raw = read_generation_config(file)
    found = {ours: raw[theirs] for theirs, ours in _NAMES.items() if raw.get(theirs) is not None}
    if raw.get("do_sample") is False:
        found["temperature"] = 0.0
    try:
        SamplingParams(**found)
    except RequestError as error:
        raise SourceError(f"{file}: {error} Correct or remove the entry.") from error
    return found


def read_generation_config(file: Path) -> dict[str, Any]:
    """The whole file. Raises SourceError where it is no JSON object."""
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"{file} is not a readable JSON object: {error}") from error
    if not isinstance(raw, dict):
        raise SourceError(f"{file} is not a JSON object.")
    return raw


def with_defaults(defaults: Mapping[str, Any], **given: Any) -> SamplingParams:
    """SamplingParams of what is given, else of ``defaults``; given values of None count as not.

    Raises RequestError for bad values.
    """
    fields = {**defaults, **{name: value for name, value in given.items() if value is not None}}
    return SamplingParams(**fields)
