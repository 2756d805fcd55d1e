"""A request's rules for its text: penalties, bias, bans, and the form it must have."""

from collections.abc import Mapping
from typing import Any

from qoq.api.forms import requested_form
from qoq.errors import RequestError


def rules(body: object, defaults: Mapping[str, float]) -> dict[str, Any]:
    """Arguments of SamplingParams; fields that ``body`` lacks or leaves out keep their defaults.

    ``defaults``: the model's own. Raises RequestError naming the field.
    """
    found: dict[str, Any] = {}
    for name in (
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "min_tokens",
        "bad_words",
        "allowed_token_ids",
        "skip_special_tokens",
        "include_stop_str_in_output",
    ):
        value = getattr(body, name, None)
        if value is None:
            value = defaults.get(name)
        if value is not None and value != []:
            found[name] = value
    bias = getattr(body, "logit_bias", None)
    if bias:
        found["logit_bias"] = _bias(bias)
    form = requested_form(vars(body))
    if form is not None:
        found["structured_outputs"] = form
    return found


def _bias(bias: Mapping[str, float]) -> dict[int, float]:
    try:
        return {int(key): value for key, value in bias.items()}
    except ValueError:
        raise RequestError(
            "logit_bias must map token ids (whole numbers, as JSON keys) to numbers.",
            param="logit_bias",
        ) from None
