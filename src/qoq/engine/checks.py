"""Values a request may bring, checked one by one; errors name the field and what it must be."""

import math
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from qoq.engine.structured_params import StructuredOutputsParams
from qoq.errors import RequestError

_SHORT = reprlib.Repr()  # values may have a million parts
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 200
MAX_LOGPROBS = 20
MAX_CHOICES = 128
MAX_BIAS = 100.0


def require(good: bool, params: object, name: str, wanted: str) -> None:
    """Raise RequestError "NAME must be WANTED, not VALUE." unless ``good``."""
    if not good:
        raise RequestError(f"{name} must be {wanted}, not {_SHORT.repr(getattr(params, name))}.")


def is_int(value: object) -> bool:
    """A whole number that is no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def within(value: object, low: float, high: float) -> bool:
    """A finite number (no bool) in low..high."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and low <= value <= high  # type: ignore[arg-type,operator]


def is_sequence(value: object) -> bool:
    """A list or the like; text does not count."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def is_ids(value: object) -> bool:
    """A sequence of token ids."""
    return is_sequence(value) and all(is_int(i) and i >= 0 for i in value)  # type: ignore[attr-defined]


def check_rules(params: Any) -> None:
    """What SamplingParams says about logits, logprobs and choices; RequestError where it is bad."""
    for name in ("presence_penalty", "frequency_penalty"):
        require(within(getattr(params, name), -2, 2), params, name, "from -2 to 2")
    repetition = within(params.repetition_penalty, 1e-3, 1e3)
    require(repetition, params, "repetition_penalty", "from 0.001 to 1000 (1 is off)")
    least = is_int(params.min_tokens) and 0 <= params.min_tokens <= params.max_tokens
    require(least, params, "min_tokens", f"from 0 to max_tokens ({params.max_tokens})")
    many = is_int(params.n) and 1 <= params.n <= MAX_CHOICES
    require(many, params, "n", f"from 1 to {MAX_CHOICES}")
    for name in ("logprobs", "prompt_logprobs"):
        count = getattr(params, name)
        good = count is None or (is_int(count) and 0 <= count <= MAX_LOGPROBS)
        require(good, params, name, f"None (off) or from 0 to {MAX_LOGPROBS}")
    bias = params.logit_bias
    biased = bias is None or (
        isinstance(bias, Mapping)
        and all(is_int(i) and i >= 0 and within(b, -MAX_BIAS, MAX_BIAS) for i, b in bias.items())
    )
    require(biased, params, "logit_bias", "a mapping of token ids to numbers from -100 to 100")
    allowed = params.allowed_token_ids
    good = allowed is None or (is_ids(allowed) and len(allowed) > 0)
    require(good, params, "allowed_token_ids", "None (all) or a list of token ids, not empty")
    words = is_sequence(params.bad_words) and all(
        isinstance(word, str) and word.strip() for word in params.bad_words
    )
    require(words, params, "bad_words", "a list of strings, none of them empty")
    for name in ("skip_special_tokens", "include_stop_str_in_output"):
        require(isinstance(getattr(params, name), bool), params, name, "True or False")
    require(is_ids(params.shown_special_ids), params, "shown_special_ids", "a list of token ids")
    structure = params.structured_outputs
    good = structure is None or isinstance(structure, StructuredOutputsParams)
    require(good, params, "structured_outputs", "None or StructuredOutputsParams")
    if structure is not None and allowed is not None:
        raise RequestError(
            "allowed_token_ids and structured_outputs cannot be combined: the structure says which "
            "ids are allowed. Leave one of them out."
        )


def check_vocabulary(params: Any, vocab_size: int) -> None:
    """Raise RequestError where ids that ``params`` names are not in a vocabulary of that size."""
    named = {
        "logit_bias": params.logit_bias or (),
        "allowed_token_ids": params.allowed_token_ids or (),
    }
    for name, ids in named.items():
        strange = next((i for i in ids if i >= vocab_size), None)
        if strange is not None:
            raise RequestError(
                f"{name} names token id {strange}; this model's vocabulary has {vocab_size}."
            )
