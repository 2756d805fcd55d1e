"""Requests made up from our own OpenAPI description never cause a server error."""

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error

from helpers import serving
from qoq.server.model import ServedModel


def test_no_server_errors(model: ServedModel) -> None:
    with serving.live(model) as server:
        schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
        called = set()
        for result in schema.get_all_operations():
            operation = result.ok()
            called.add(operation.path)

            @settings(
                max_examples=12,
                phases=[Phase.explicit, Phase.generate],
                suppress_health_check=list(HealthCheck),
                database=None,
                derandomize=True,
            )
            @given(case=operation.as_strategy())
            def check(case: schemathesis.Case) -> None:
                response = case.call(timeout=30)
                case.validate_response(response, checks=[not_a_server_error])

            check()
        assert {"/v1/completions", "/v1/chat/completions", "/v1/responses"} <= called
        server.until_idle()
        assert server.context.engine.alive
