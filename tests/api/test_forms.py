"""The form a request asks for, in each way of saying so."""

from typing import Any

import pytest

from qoq.api.forms import requested_form
from qoq.engine.structured_params import StructuredOutputsParams
from qoq.errors import RequestError

SCHEMA = {"type": "object"}
TAG = {"triggers": ["a"], "structures": [{"begin": "a", "schema": {}, "end": ""}]}


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}, "text": "a text"}, None),
        ({"response_format": {"type": "json_object"}}, {"json_object": True}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
            {"json": SCHEMA},
        ),
        ({"text": {"format": {"type": "json_schema", "schema": SCHEMA}}}, {"json": SCHEMA}),
        ({"response_format": {"type": "structural_tag", **TAG}}, {"structural_tag": TAG}),
        ({"structured_outputs": {"regex": "a+"}}, {"regex": "a+"}),
        ({"guided_json": SCHEMA}, {"json": SCHEMA}),
        ({"guided_choice": ["a"]}, {"choice": ["a"]}),
    ],
)
def test_forms(fields: dict[str, Any], wanted: dict[str, Any] | None) -> None:
    made = requested_form(fields)
    assert made == (None if wanted is None else StructuredOutputsParams(**wanted))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": 3}}, "response_format"),
        ({"response_format": {"type": "structural_tag", "format": {}}}, "response_format"),
        ({"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs"),
        ({"structured_outputs": {"what": 1}}, "structured_outputs"),
        ({"guided_regex": ""}, "guided_regex"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "response_format"),
    ],
)
def test_forms_that_are_none(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        requested_form(fields)
    assert caught.value.param == param
