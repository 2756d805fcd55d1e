"""Events on the wire."""

import json

from hypothesis import given
from hypothesis import strategies as st

from qoq.server.sse import event


@given(st.text(), st.sampled_from([None, "response.created"]))
def test_an_event_is_one_line_of_data_for_every_reader(text: str, name: str | None) -> None:
    for odd in ("", "\u0085", "\u2028", "\u2029", "\n\x1c\x0b"):
        value = {"text": text + odd}
        *head, data, end = event(value, name).splitlines()
        assert head == ([] if name is None else [f"event: {name}"])
        assert json.loads(data.removeprefix("data: ")) == value
        assert end == ""
