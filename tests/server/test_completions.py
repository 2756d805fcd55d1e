"""/v1/completions: every shape of prompt, streams, usage, logprobs, refusals."""

import asyncio
from typing import Any

import pytest

from helpers.serving import Client
from qoq import LLM, SamplingParams
from qoq.engine.choices import choices
from qoq.server.model import ServedModel

pytestmark = pytest.mark.asyncio(loop_scope="module")
PATH = "/v1/completions"
GREEDY = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}


async def answer(app: Client, **body: Any) -> dict[str, Any]:
    got = await app.post(PATH, {**GREEDY, **body})
    assert got.status_code == 200, got.text
    value = got.json()
    assert isinstance(value, dict)
    return value


async def test_text_is_what_the_offline_door_gives(app: Client, model: ServedModel) -> None:
    wanted = LLM(model.path).generate("hello w", SamplingParams(max_tokens=8, ignore_eos=True))[0]
    got = await answer(app, prompt="hello w", model="tiny", return_token_ids=True)
    [choice] = got["choices"]
    assert choice["text"] == wanted.text
    assert choice["token_ids"] == wanted.token_ids
    assert choice["prompt_token_ids"] == wanted.prompt_token_ids
    assert choice["finish_reason"] == "length"
    assert got["object"] == "text_completion"
    assert got["model"] == "tiny"
    assert got["id"].startswith("cmpl-")
    count = len(wanted.prompt_token_ids)
    assert got["usage"] == {
        "prompt_tokens": count,
        "completion_tokens": 8,
        "total_tokens": count + 8,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


async def test_every_shape_of_prompt(app: Client, model: ServedModel) -> None:
    ids = model.tokenizer.encode("hello w"), model.tokenizer.encode("tell")
    one = await answer(app, prompt="hello w")
    assert (await answer(app, prompt=ids[0]))["choices"] == one["choices"]
    assert (await answer(app, prompt=["hello w"]))["choices"] == one["choices"]
    several = await answer(app, prompt=["hello w", "tell"])
    assert (await answer(app, prompt=list(ids)))["choices"] == several["choices"]
    assert [c["index"] for c in several["choices"]] == [0, 1]
    assert several["choices"][0] == one["choices"][0]
    assert several["usage"]["completion_tokens"] == 16


async def test_n_texts_of_each_prompt_have_seeds_of_their_own(app: Client) -> None:
    body = {"prompt": ["hello", "t"], "temperature": 1.5, "max_tokens": 6}
    got = await answer(app, **body, n=3, seed=40)
    assert len(got["choices"]) == 6
    texts = [c["text"] for c in got["choices"]]
    assert len(set(texts)) > 2
    third = choices(SamplingParams(n=3, seed=40))[2].seed
    single = await answer(app, **{**body, "prompt": "t"}, seed=third)
    assert texts[5] == single["choices"][0]["text"]
    assert got["usage"]["prompt_tokens"] == 2
    assert got["usage"]["completion_tokens"] == 36


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**63 - 1])
async def test_any_int64_seed_repeats(app: Client, seed: int) -> None:
    body = {"prompt": "hello", "temperature": 2.0, "seed": seed}
    assert (await answer(app, **body))["choices"] == (await answer(app, **body))["choices"]


async def test_stream_joined_is_the_whole(app: Client) -> None:
    body = {**GREEDY, "prompt": ["hello w", "tell", "a"], "max_tokens": 20}
    whole = await answer(app, **body)
    chunks = await app.events(PATH, body)
    texts = ["", "", ""]
    reasons: list[Any] = [None] * 3
    for chunk in chunks:
        [choice] = chunk["choices"]
        texts[choice["index"]] += choice["text"]
        assert reasons[choice["index"]] is None, "text after its end"
        reasons[choice["index"]] = choice["finish_reason"]
        assert "usage" not in chunk
    assert texts == [c["text"] for c in whole["choices"]]
    assert reasons == ["length"] * 3


async def test_usage_in_streams(app: Client) -> None:
    body = {**GREEDY, "prompt": "hello", "stream_options": {"include_usage": True}}
    *chunks, last = await app.events(PATH, body)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 8
    assert all(chunk["usage"] is None for chunk in chunks)
    body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = await app.events(PATH, body)
    assert chunks[-1]["usage"] == last["usage"]


async def test_logprobs_of_the_chosen_tokens(app: Client, model: ServedModel) -> None:
    wanted = LLM(model.path).generate("hello w", SamplingParams(max_tokens=8, ignore_eos=True))[0]
    [choice] = (await answer(app, prompt="hello w", logprobs=0))["choices"]
    logprobs = choice["logprobs"]
    assert logprobs["token_logprobs"] == pytest.approx(wanted.logprobs, abs=1e-5)
    assert len(logprobs["tokens"]) == len(logprobs["text_offset"]) == 8
    assert logprobs["text_offset"][0] == 0
    chunks = await app.events(PATH, {**GREEDY, "prompt": "hello w", "logprobs": 0})
    joined = [p for c in chunks for p in c["choices"][0]["logprobs"]["token_logprobs"]]
    assert joined == pytest.approx(wanted.logprobs, abs=1e-5)


async def test_echo(app: Client, model: ServedModel) -> None:
    plain = (await answer(app, prompt="hello w"))["choices"][0]["text"]
    assert (await answer(app, prompt="hello w", echo=True))["choices"][0]["text"] == (
        "hello w" + plain
    )
    ids = model.tokenizer.encode("hello w")
    assert (await answer(app, prompt=ids, echo=True))["choices"][0]["text"] == "hello w" + plain
    chunks = await app.events(PATH, {**GREEDY, "prompt": "hello w", "echo": True})
    assert "".join(c["choices"][0]["text"] for c in chunks) == "hello w" + plain


async def test_stop_strings_and_ids(app: Client) -> None:
    whole = (await answer(app, prompt="hello w", max_tokens=30, return_token_ids=True))["choices"][
        0
    ]
    cut = whole["text"][4:6]
    [choice] = (await answer(app, prompt="hello w", max_tokens=30, stop=cut))["choices"]
    assert choice["text"] == whole["text"][: whole["text"].index(cut)]
    assert choice["finish_reason"] == "stop"
    end = whole["token_ids"][3]
    got = await answer(app, prompt="hello w", stop_token_ids=[end], return_token_ids=True)
    assert got["choices"][0]["token_ids"][-1] == end
    assert got["choices"][0]["finish_reason"] == "stop"


async def test_default_length_is_16_and_unknown_fields_are_accepted(app: Client) -> None:
    body = {"prompt": "hello", "ignore_eos": True, "some_field_of_tomorrow": {"a": [1]}}
    got = await app.post(PATH, {**body, "user": "me", "logit_bias": {}, "presence_penalty": 0})
    assert got.status_code == 200
    assert got.json()["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"prompt": "a", "model": "nope"}, 404, "nope"),
        ({"prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
        ({"prompt": "a", "max_tokens": 10**40}, 400, "max_tokens"),
        ({"prompt": "a", "seed": 2**63}, 400, "seed"),
        ({"prompt": "a", "seed": -(2**63) - 1}, 400, "seed"),
        ({"prompt": "a", "temperature": -1}, 400, "temperature"),
        ({"prompt": "a", "temperature": "warm"}, 400, "temperature"),
        ({"prompt": "a", "top_p": 0}, 400, "top_p"),
        ({"prompt": "a", "top_p": 1.5}, 400, "top_p"),
        ({"prompt": "a", "top_k": -2}, 400, "top_k"),
        ({"prompt": "a", "min_p": 2}, 400, "min_p"),
        ({"prompt": "a", "n": 0}, 400, "n"),
        ({"prompt": "a", "stop": ""}, 200, ""),
        ({"prompt": "a", "stop": [""]}, 400, "stop"),
        ({"prompt": "a", "stop_token_ids": [10**9]}, 400, "stop_token_ids"),
        ({"prompt": "a", "logprobs": 21}, 400, "logprobs"),
        ({"prompt": "a", "logprobs": -1}, 400, "logprobs"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, 400, "stream"),
        ({"prompt": ""}, 400, "empty"),
        ({"prompt": []}, 400, "empty"),
        ({"prompt": [[]]}, 400, "empty"),
        ({"prompt": [5, 10**6]}, 400, "vocabulary"),
        ({"prompt": [5, -1]}, 400, "vocabulary"),
        ({"prompt": [5, 2**80]}, 400, "vocabulary"),
        ({"prompt": [5, True]}, 400, "prompt"),
        ({"prompt": {"a": 1}}, 400, "prompt"),
        ({}, 400, "prompt"),
        ({"prompt": "a", "top_k": 10**30}, 200, ""),
        ({"prompt": "a", "temperature": 1e308}, 200, ""),
        ({"prompt": "a", "temperature": 1e-320}, 200, ""),
    ],
)
async def test_refusals(app: Client, body: dict[str, Any], status: int, says: str) -> None:
    got = await app.post(PATH, {"max_tokens": 2, **body})
    assert got.status_code == status, got.text
    if status != 200:
        error = got.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert says in error["message"]


async def test_too_long_names_both_lengths(app: Client) -> None:
    got = await app.post(PATH, {"prompt": [5] * 100, "max_tokens": 29})
    error = got.json()["error"]
    assert got.status_code == 400
    assert error["code"] == "context_length_exceeded"
    assert "128" in error["message"]
    assert "100" in error["message"]
    got = await app.post(PATH, {"prompt": [5] * 400, "max_tokens": 1})
    assert "400 tokens" in got.json()["error"]["message"]
    assert (await app.post(PATH, {"prompt": [5] * 127, "max_tokens": 1})).status_code == 200


async def test_megabytes_of_prompt_are_refused_quickly(app: Client) -> None:
    start = asyncio.get_running_loop().time()
    got = await app.post(PATH, {"prompt": "hello " * 1_300_000})
    assert got.status_code == 400
    assert "context is 128" in got.json()["error"]["message"]
    assert asyncio.get_running_loop().time() - start < 10


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("suffix", "end"),
        ("best_of", 2),
        ("use_beam_search", True),
    ],
)
async def test_what_is_not_supported_is_refused_by_name(app: Client, name: str, value: Any) -> None:
    got = await app.post(PATH, {"prompt": "a", name: value})
    assert got.status_code == 400
    assert got.json()["error"]["param"] == name
    assert got.json()["error"]["code"] == "unsupported_parameter"
    assert (await app.post(PATH, {"prompt": "a", name: None})).status_code in (200, 400)


async def test_rules_are_honoured(app: Client) -> None:
    plain = {"prompt": "hello", "temperature": 0, "max_tokens": 6, "return_token_ids": True}
    ids = (await app.post(PATH, plain)).json()["choices"][0]["token_ids"]
    banned = {"logit_bias": {str(ids[0]): -100}, "min_tokens": 6, "ignore_eos": True}
    other = (await app.post(PATH, {**plain, **banned})).json()["choices"][0]["token_ids"]
    assert ids[0] not in other
    assert len(other) == 6
    allowed = {**plain, "allowed_token_ids": [5], "min_tokens": 6}
    assert (await app.post(PATH, allowed)).json()["choices"][0]["token_ids"] == [5] * 6
    for name in ("presence_penalty", "frequency_penalty"):
        assert (await app.post(PATH, {**plain, name: 1.5})).status_code == 200
        got = await app.post(PATH, {**plain, name: 3})
        assert got.status_code == 400
        assert got.json()["error"]["param"] == name


@pytest.mark.parametrize(
    "form",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": ["ab"]}}}},
        {"guided_regex": '"ab"'},
        {"guided_choice": ['"ab"']},
        {"structured_outputs": {"regex": '"ab"'}},
    ],
)
async def test_the_text_has_the_form_that_was_asked(app: Client, form: dict[str, Any]) -> None:
    got = await app.post(PATH, {"prompt": "hello", "max_tokens": 30, "seed": 3, **form})
    choice = got.json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ('"ab"', "stop")


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("response_format", {"response_format": {"type": "xml"}}),
        ("response_format", {"response_format": {"type": "json_schema"}}),
        ("structured_outputs", {"structured_outputs": {"shape": "round"}}),
        ("structured_outputs", {"guided_regex": "a", "structured_outputs": {"regex": "a"}}),
        ("guided_regex", {"guided_regex": ""}),
        ("logit_bias", {"logit_bias": {"x": 1}}),
    ],
)
async def test_a_bad_form_is_refused_by_name(app: Client, name: str, form: dict[str, Any]) -> None:
    got = await app.post(PATH, {"prompt": "a", **form})
    assert got.status_code == 400
    assert got.json()["error"]["param"] == name


async def test_forms_that_cannot_be_compiled_are_refused(app: Client) -> None:
    for form in ({"guided_regex": "("}, {"guided_grammar": "x"}, {"guided_json": {"type": "?"}}):
        got = await app.post(PATH, {"prompt": "a", **form})
        assert got.status_code == 400, form


async def test_echo_with_logprobs_tells_of_the_prompt_as_evaluations_ask(app: Client) -> None:
    body = {"prompt": "hello world", "temperature": 0, "max_tokens": 2, "return_token_ids": True}
    got = await app.post(PATH, {**body, "echo": True, "logprobs": 2})
    choice = got.json()["choices"][0]
    told, ids = choice["logprobs"], choice["prompt_token_ids"] + choice["token_ids"]
    assert choice["text"].startswith("hello world")
    assert len(told["tokens"]) == len(told["token_logprobs"]) == len(ids)
    assert told["token_logprobs"][0] is None
    assert told["top_logprobs"][0] is None
    assert all(value < 0 for value in told["token_logprobs"][1:])
    assert all(1 <= len(top) <= 3 for top in told["top_logprobs"][1:])  # some read the same
    # Continuing the first part of the prompt by one token knows the same of what comes next.
    cut = len(choice["prompt_token_ids"]) - 1
    again = {"prompt": choice["prompt_token_ids"][:cut], "logprobs": 5, "max_tokens": 1}
    tops = (await app.post(PATH, {**body, **again})).json()["choices"][0]["logprobs"]
    best = max(told["top_logprobs"][cut].values())
    assert best == pytest.approx(max(tops["top_logprobs"][0].values()), abs=1e-5)


async def test_prompt_logprobs_have_ranks(app: Client) -> None:
    body = {"prompt": "hello world", "max_tokens": 1, "prompt_logprobs": 1}
    told = (await app.post(PATH, body)).json()["choices"][0]["prompt_logprobs"]
    assert told[0] is None
    assert all(1 in {entry["rank"] for entry in top.values()} for top in told[1:])


async def test_the_prompt_alone(app: Client) -> None:
    asked = {"prompt": ["hello world", "tell"], "echo": True, "logprobs": 1}
    longer = await answer(app, **asked, max_tokens=1)
    got = await answer(app, **asked, max_tokens=0)
    chunks = await app.events(PATH, {**GREEDY, **asked, "max_tokens": 0})
    for index, text in enumerate(asked["prompt"]):
        choice = got["choices"][index]
        assert (choice["text"], choice["finish_reason"]) == (text, "length")
        assert choice["logprobs"] == {
            name: values[:-1] for name, values in longer["choices"][index]["logprobs"].items()
        }
        [same] = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert same == choice
    assert got["usage"]["completion_tokens"] == 0
    assert got["usage"]["prompt_tokens"] == longer["usage"]["prompt_tokens"]


async def test_streams_tell_the_prompts_ids_once(app: Client, model: ServedModel) -> None:
    body = {**GREEDY, "prompt": ["hello", "tell"], "return_token_ids": True}
    told: list[list[Any]] = [[], []]
    for chunk in await app.events(PATH, body):
        choice = chunk["choices"][0]
        told[choice["index"]].append(choice["prompt_token_ids"])
    for text, (first, *rest) in zip(body["prompt"], told, strict=True):
        assert first == model.tokenizer.encode(text)
        assert rest
        assert not any(rest)
