"""The form that a request wants its text to have, in whichever of many ways it says so."""

from collections.abc import Mapping
from typing import Any

from qoq.engine.structured_params import StructuredOutputsParams
from qoq.errors import RequestError

# Older names for one way each of ``structured_outputs``.
_GUIDED = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}


def requested_form(fields: Mapping[str, Any]) -> StructuredOutputsParams | None:
    """The form that the fields of a request ask for, if any.

    Raises RequestError naming the field for a form that is none, and where two ask for one.
    """
    ways: dict[str, Any] = {}
    for name, kind in _GUIDED.items():
        if fields.get(name) is not None:
            ways[name] = {kind: fields[name]}
    if fields.get("structured_outputs"):
        ways["structured_outputs"] = fields["structured_outputs"]
    text = fields.get("text")
    of_response = text.get("format") if isinstance(text, Mapping) else None  # of /v1/responses
    response = _response_form(fields.get("response_format") or of_response)
    if response is not None:
        ways["response_format"] = response
    if len(ways) > 1:
        name = list(ways)[-1]
        raise RequestError(f"{' and '.join(ways)} both ask for a form; give one.", param=name)
    for name, given in ways.items():
        try:
            return StructuredOutputsParams(**given)
        except RequestError as error:
            raise RequestError(f"{name}: {error}", param=name) from error
        except TypeError:
            known = ", ".join(StructuredOutputsParams.__dataclass_fields__)
            raise RequestError(f"{name} must name one of {known}.", param=name) from None
    return None


def _response_form(form: object) -> dict[str, Any] | None:
    """OpenAI's ``response_format`` (or ``text.format``, where the schema lies one level higher)."""
    kind = form.get("type") if isinstance(form, Mapping) else form
    if form is None or kind == "text":
        return None
    if kind == "json_object":
        return {"json_object": True}
    if isinstance(form, Mapping) and kind == "structural_tag":
        return {"structural_tag": {key: form[key] for key in form if key != "type"}}
    if isinstance(form, Mapping) and kind == "json_schema":
        holder = form.get("json_schema", form)
        schema = holder.get("schema") if isinstance(holder, Mapping) else None
        if schema is not None:
            return {"json": schema}
        raise RequestError(
            "response_format of type json_schema needs json_schema.schema.", param="response_format"
        )
    raise RequestError(
        "response_format.type must be text, json_object, json_schema or structural_tag, not "
        f"{str(kind)[:40]!r}.",
        param="response_format",
    )
