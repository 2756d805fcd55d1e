"""Requests made up from our own OpenAPI description never cause a server error."""

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error

from helpers import serving
from qoq.server.model import ServedModel

TEXTS = {"/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize", "/detokenize"}
FACTS = {"/v1/models", "/v1/models/{name}", "/tokenizer_info"}
STATE = {"/health", "/ping", "/load", "/version", "/metrics"}


@pytest.mark.timeout(600)
def test_no_server_errors(model: ServedModel) -> None:
    """On any route, by what the description allows and by what it does not."""
    with serving.live(model) as server:
        schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
        called = set()
        for result in schema.get_all_operations():
            operation = result.ok()
            called.add(operation.path)
            for mode in GenerationMode:
                try:
                    _call(operation, mode, examples=25 if operation.body else 5)
                except Unsatisfiable:  # nothing contradicts the description of what takes nothing
                    assert mode is GenerationMode.NEGATIVE
                    assert operation.path not in TEXTS
        assert called == TEXTS | FACTS | STATE
        server.until_idle()
        assert server.context.engine.alive


def _call(operation: schemathesis.APIOperation, mode: GenerationMode, examples: int) -> None:
    @settings(
        max_examples=examples,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
        database=None,
        derandomize=True,
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: schemathesis.Case) -> None:
        response = case.call(timeout=30)
        case.validate_response(response, checks=[not_a_server_error])

    check()
