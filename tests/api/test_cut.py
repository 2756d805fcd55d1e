"""Prompts cut short: which ids stay, and what cannot be asked."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qoq.api.cut import Cut
from qoq.api.protocol import CompletionRequest
from qoq.errors import RequestError


@example(ids=[3, 1, 4, 1, 5], count=3, right=False, bos=3)
@example(ids=[3, 1, 4, 1, 5], count=1, right=False, bos=3)
@given(
    ids=st.lists(st.integers(0, 9), max_size=20),
    count=st.integers(1, 20),
    right=st.booleans(),
    bos=st.none() | st.integers(0, 9),
)
def test_cut(ids: list[int], count: int, right: bool, bos: int | None) -> None:
    kept = Cut(count, "right" if right else "left").ids(ids, bos)
    assert len(kept) == min(count, len(ids))
    if right:
        assert kept == ids[: len(kept)]
    elif len(ids) > count > 1 and ids[0] == bos:
        assert kept == [bos, *ids[1 - count :]]
    else:
        assert kept == ids[len(ids) - len(kept) :]


def test_cut_without_room() -> None:
    def asked(count: int | None, max_tokens: int | None) -> Cut | None:
        body = CompletionRequest(prompt="a", truncate_prompt_tokens=count)
        return Cut.asked(body, max_model_len=10, max_tokens=max_tokens)

    assert asked(None, 3) is None
    assert asked(-1, None) == Cut(9)
    assert asked(-1, 4) == asked(6, 4) == Cut(6)
    assert asked(-1, 10) is None  # new tokens that leave no room have an error of their own
    with pytest.raises(RequestError, match="from 1 to 6"):
        asked(7, 4)
