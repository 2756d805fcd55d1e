"""A request's rules for its text: penalties, bias, bans, and the form it must have."""

from collections.abc import Mapping
from typing import Any

from qoq.engine.structured_params import StructuredOutputsParams
from qoq.errors import RequestError
from qoq.server.errors import bad_request

# Older names for one way each of ``structured_outputs``.
_GUIDED = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}


def rules(body: object, defaults: Mapping[str, float]) -> dict[str, Any]:
    """Arguments of SamplingParams; fields that ``body`` lacks or leaves out keep their defaults.

    ``defaults``: the model's own. Raises APIError 400 naming the field.
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
    ):
        value = getattr(body, name, None)
        if value is None:
            value = defaults.get(name)
        if value is not None and value != []:
            found[name] = value
    bias = getattr(body, "logit_bias", None)
    if bias:
        found["logit_bias"] = _bias(bias)
    form = _form(body)
    if form is not None:
        found["structured_outputs"] = form
    return found


def _bias(bias: Mapping[str, float]) -> dict[int, float]:
    try:
        return {int(key): value for key, value in bias.items()}
    except ValueError:
        raise bad_request(
            "logit_bias must map token ids (whole numbers, as JSON keys) to numbers.",
            param="logit_bias",
        ) from None


def _form(body: object) -> StructuredOutputsParams | None:
    """What the text must look like, in whichever of the ways it was asked."""
    ways: dict[str, dict[str, Any]] = {}
    for name, kind in _GUIDED.items():
        if getattr(body, name, None) is not None:
            ways[name] = {kind: getattr(body, name)}
    if getattr(body, "structured_outputs", None):
        ways["structured_outputs"] = body.structured_outputs  # type: ignore[attr-defined]
    of_response = (getattr(body, "text", None) or {}).get("format")  # as /v1/responses spells it
    response = response_form(getattr(body, "response_format", None) or of_response)
    if response is not None:
        ways["response_format"] = response
    if len(ways) > 1:
        name = list(ways)[-1]
        raise bad_request(f"{' and '.join(ways)} both ask for a form; give one.", param=name)
    for name, given in ways.items():
        try:
            return StructuredOutputsParams(**given)
        except RequestError as error:
            raise bad_request(f"{name}: {error}", param=name) from error
        except TypeError:
            known = ", ".join(StructuredOutputsParams.__dataclass_fields__)
            raise bad_request(f"{name} must name one of {known}.", param=name) from None
    return None


def response_form(form: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """OpenAI's ``response_format`` (or ``text.format``, where the schema lies one level higher)."""
    kind = None if form is None else form.get("type")
    if form is None or kind == "text":
        return None
    if kind == "json_object":
        return {"json_object": True}
    if kind == "json_schema":
        holder = form.get("json_schema", form)
        schema = holder.get("schema") if isinstance(holder, Mapping) else None
        if schema is not None:
            return {"json": schema}
        raise bad_request(
            "response_format of type json_schema needs json_schema.schema.", param="response_format"
        )
    raise bad_request(
        f"response_format.type must be text, json_object or json_schema, not {kind!r}.",
        param="response_format",
    )
