"""SamplingParams refuses nonsense; a Request knows when and how its text ends."""

import math
from typing import Any

import pytest

from helpers.tiny import EOS, write_byte_tokenizer
from qoq.engine.request import Request, SamplingParams
from qoq.errors import RequestError
from qoq.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(folder)
    return Tokenizer.load(folder)


def request(tokenizer: Tokenizer | None, prompt: list[int] | None = None, **params: Any) -> Request:
    return Request(
        prompt or [5],
        SamplingParams(**params),
        max_length=1 + params.get("max_tokens", 40),
        eos_ids=(EOS,),
        tokenizer=tokenizer,
    )


def feed(request: Request, ids: list[int]) -> str:
    """Accept ids until the request ends; the pieces joined."""
    pieces = []
    for i in ids:
        pieces.append(request.accept(i, -0.5))
        if request.finish_reason:
            break
    return "".join(pieces)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "1"),
        ("top_k", -1),
        ("top_k", 2.0),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("min_p", -0.01),
        ("min_p", 1.5),
        ("seed", -1),
        ("seed", 2**63),
        ("seed", 0.5),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", [1]),
        ("stop", b"a"),
        ("stop", None),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", ["a"]),
        ("stop_token_ids", 3),
        ("ignore_eos", 1),
        ("min_tokens", -1),
        ("min_tokens", 129),
        ("n", 0),
        ("n", 129),
        ("n", True),
        ("presence_penalty", 2.1),
        ("frequency_penalty", math.nan),
        ("repetition_penalty", 0),
        ("repetition_penalty", math.inf),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {1: 101}),
        ("logit_bias", {"1": 1}),
        ("logit_bias", [1]),
        ("allowed_token_ids", []),
        ("allowed_token_ids", [-1]),
        ("bad_words", "a"),
        ("bad_words", [" "]),
        ("logprobs", 21),
        ("logprobs", -1),
        ("logprobs", True),
        ("prompt_logprobs", 2.0),
        ("skip_special_tokens", 1),
        ("shown_special_ids", "a"),
        ("include_stop_str_in_output", 1),
        ("structured_outputs", {"regex": "a"}),
    ],
)
def test_bad_values_name_themselves(name: str, value: object) -> None:
    with pytest.raises(RequestError, match=f"^{name} must be") as caught:
        SamplingParams(**{name: value})
    assert repr(value) in str(caught.value)


def test_good_values_at_the_edges() -> None:
    SamplingParams(max_tokens=1, temperature=0, top_k=0, top_p=1, min_p=0, seed=0)
    SamplingParams(temperature=5.0, top_p=1e-9, min_p=1, seed=2**63 - 1, stop_token_ids=(1, 2))
    assert SamplingParams(stop="x").stop_strings == ("x",)
    assert SamplingParams(stop=["x", "yz"]).stop_strings == ("x", "yz")
    assert SamplingParams().stop_strings == ()


def test_ends_by_length(tokenizer: Tokenizer) -> None:
    r = request(tokenizer, max_tokens=5)
    ids = tokenizer.encode("abcdefgh", special=False)
    assert feed(r, ids) == "abcde"
    assert (r.finish_reason, r.token_ids, r.num_new) == ("length", ids[:5], 5)
    output = r.output()
    assert (output.text, output.token_ids, output.prompt_token_ids) == ("abcde", ids[:5], [5])
    assert output.logprobs == [-0.5] * 5


def test_ends_by_eos_which_counts_as_a_token_but_not_as_text(tokenizer: Tokenizer) -> None:
    r = request(tokenizer)
    ids = [*tokenizer.encode("ab", special=False), EOS, 9]
    assert feed(r, ids) == "ab"
    assert (r.finish_reason, r.token_ids) == ("stop", ids[:3])


def test_eos_as_the_last_allowed_token_is_a_stop(tokenizer: Tokenizer) -> None:
    r = request(tokenizer, max_tokens=1)
    feed(r, [EOS])
    assert r.finish_reason == "stop"


def test_ignore_eos(tokenizer: Tokenizer) -> None:
    r = request(tokenizer, max_tokens=3, ignore_eos=True)
    feed(r, [EOS] * 5)
    assert (r.finish_reason, r.token_ids, r.text) == ("length", [EOS] * 3, "")


def test_stop_token_ids_act_even_when_eos_does_not(tokenizer: Tokenizer) -> None:
    a, b = tokenizer.encode("ab", special=False)
    r = request(tokenizer, ignore_eos=True, stop_token_ids=[b])
    assert feed(r, [a, EOS, b, a]) == "a"
    assert (r.finish_reason, r.token_ids) == ("stop", [a, EOS, b])


def test_stop_string_is_left_out_and_seen_across_tokens(tokenizer: Tokenizer) -> None:
    r = request(tokenizer, stop=["\n\n", "cd"])
    ids = tokenizer.encode("ab\nc\n\nx", special=False)
    assert feed(r, ids) == "ab\nc"
    assert (r.finish_reason, r.token_ids) == ("stop", ids[:6])


def test_what_stopped_a_text_can_be_in_it(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("abcde", special=False)
    r = request(tokenizer, stop=["bc"], include_stop_str_in_output=True)
    assert (feed(r, ids), r.finish_reason, r.stop_reason) == ("abc", "stop", "bc")
    r = request(tokenizer, stop_token_ids=[ids[1]], include_stop_str_in_output=True)
    assert (feed(r, ids), r.stop_reason) == ("ab", ids[1])
    r = request(tokenizer, include_stop_str_in_output=True)
    assert feed(r, [ids[0], EOS]) == "a"  # a special token is not text
    r = request(tokenizer, include_stop_str_in_output=True, shown_special_ids=[EOS])
    assert feed(r, [ids[0], EOS]) == "a<|eos|>"


def test_text_held_back_for_a_stop_string_comes_at_the_end(tokenizer: Tokenizer) -> None:
    r = request(tokenizer, max_tokens=3, stop="cx")
    assert feed(r, tokenizer.encode("abc", special=False)) == "abc"
    assert r.finish_reason == "length"


def test_unfinished_code_point_at_the_end(tokenizer: Tokenizer) -> None:
    r = request(tokenizer, max_tokens=2)
    assert feed(r, tokenizer.encode("a😀", special=False)) == "a\ufffd"


def test_without_a_tokenizer_there_are_ids_but_no_text() -> None:
    r = request(None, max_tokens=2)
    assert feed(r, [7, 8]) == ""
    assert r.token_ids == [7, 8]
    with pytest.raises(RequestError, match="need a tokenizer"):
        request(None, stop="x")


def test_unfinished_request_counts_as_aborted(tokenizer: Tokenizer) -> None:
    assert request(tokenizer).output().finish_reason == "abort"


def test_seeds() -> None:
    assert request(None, seed=7).seed == 7
    drawn = {request(None).seed for _ in range(8)}
    assert len(drawn) == 8
    assert all(0 <= seed < 2**63 for seed in drawn)
