"""Typed readers of config.json values: a wrong type is refused with the key's name."""

from collections.abc import Mapping
from typing import Any

from qoq.errors import UnsupportedModelError


def read_integer(raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """An integer >= 0; absent or null gives the default, or an error where there is none."""
    value = raw.get(key)
    value = default if value is None else value
    if value is None:
        raise UnsupportedModelError(f"config.json lacks {key}.")
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise UnsupportedModelError(f"{key} must be an integer, not {value!r}.")
    return value


def read_positive(raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = read_integer(raw, key, default)
    if value == 0:
        raise UnsupportedModelError(f"{key} must be positive.")
    return value


def read_optional_number(raw: Mapping[str, Any], key: str) -> float | None:
    value = raw.get(key)
    if value is None:
        return None
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value < 1e15:  # refuses NaN, infinities and overflowing integers too
        raise UnsupportedModelError(f"{key} must be a number >= 0, not {value!r}.")
    return float(value)


def read_number(raw: Mapping[str, Any], key: str, default: float) -> float:
    """A positive finite number."""
    value = read_optional_number(raw, key)
    value = default if value is None else value
    if value == 0:
        raise UnsupportedModelError(f"{key} must be positive.")
    return value


def read_flag(raw: Mapping[str, Any], key: str) -> bool:
    value = raw.get(key)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise UnsupportedModelError(f"{key} must be true or false, not {value!r}.")
    return value


def read_mapping(raw: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A JSON object; absent or null is an empty one."""
    value = raw.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise UnsupportedModelError(f"{key} must be an object, not {value!r}.")
    return dict(value or {})


def read_names(raw: Mapping[str, Any], key: str) -> list[str] | None:
    """A list of strings, or None where absent or null."""
    value = raw.get(key)
    if value is None:
        return None
    if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
        raise UnsupportedModelError(f"{key} must be a list of names, not {value!r}.")
    return list(value)


def read_token_ids(raw: Mapping[str, Any], key: str, default: int | None) -> tuple[int, ...]:
    """One id or a list of them; null means none, an absent key the class's own default."""
    value = raw.get(key, default)
    ids = value if isinstance(value, (list, tuple)) else [value]
    return tuple(read_integer({key: i}, key) for i in ids if i is not None)


def read_token_id(raw: Mapping[str, Any], key: str, default: int | None) -> int | None:
    ids = read_token_ids(raw, key, default)
    return ids[0] if ids else None
