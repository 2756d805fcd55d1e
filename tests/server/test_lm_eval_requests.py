"""The requests that lm-evaluation-harness sends, and what it reads from the answers."""

import pytest

from helpers.harness import likelihood_request, read_likelihood
from helpers.serving import Client
from qoq import LLM, SamplingParams
from qoq.server.model import ServedModel

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_log_likelihoods_are_the_engine_s_own(app: Client, model: ServedModel) -> None:
    llm = LLM(model.path)
    cases = [("hello", " world"), ("the hat told ", "x"), ("t" * 90, "hello w")]
    for context, ending in cases:
        start = model.tokenizer.encode(context, special=False)
        ids = model.tokenizer.encode(context + ending, special=False)
        got = await app.post("/v1/completions", likelihood_request("tiny", ids))
        assert got.status_code == 200, got.text
        total, greedy = read_likelihood(got.json(), len(start))
        params = SamplingParams(max_tokens=1, prompt_logprobs=1)
        [own] = llm.generate([ids], params)
        assert own.prompt_logprobs is not None
        tail = list(zip(ids, own.prompt_logprobs, strict=True))[len(start) :]
        # A float model: torch's products may round otherwise in another thread.
        want = sum(top[i].logprob for i, top in tail if top is not None)
        assert total == pytest.approx(want, rel=1e-6)
        assert greedy == all(top[i].rank == 1 for i, top in tail if top is not None)


async def test_greedy_endings_are_known_as_such(app: Client, model: ServedModel) -> None:
    start = model.tokenizer.encode("hello w", special=False)
    [own] = LLM(model.path).generate([start], SamplingParams(max_tokens=5, ignore_eos=True))
    other = [*own.token_ids[:4], (own.token_ids[4] + 1) % model.config.vocab_size]
    for ending, wanted in ((own.token_ids, True), (other, False)):
        got = await app.post("/v1/completions", likelihood_request("tiny", start + ending))
        assert read_likelihood(got.json(), len(start))[1] is wanted


async def test_a_context_that_fills_the_model(app: Client, model: ServedModel) -> None:
    ids = [5 + i % 90 for i in range(model.max_model_len)]
    got = await app.post("/v1/completions", likelihood_request("tiny", ids[:-1]))
    assert got.status_code == 200
    assert len(got.json()["choices"][0]["logprobs"]["token_logprobs"]) == model.max_model_len
    assert (await app.post("/v1/completions", likelihood_request("tiny", ids))).status_code == 400


async def test_generation(app: Client, model: ServedModel) -> None:
    ids = model.tokenizer.encode("hello w", special=False)
    [own] = LLM(model.path).generate([ids], SamplingParams(max_tokens=12, temperature=0))
    stop = own.text[3:5]
    body = {
        "prompt": [ids],
        "model": "tiny",
        "max_tokens": 12,
        "temperature": 0,
        "stop": ["\n\n\n", stop, "Question:", "</s>", "<|im_end|>"],
        "seed": 1234,
    }
    got = await app.post("/v1/completions", body)
    assert got.status_code == 200, got.text
    assert got.json()["choices"][0]["text"] == own.text[: own.text.index(stop)]
    said = {"messages": [{"role": "user", "content": "hello", "type": "text"}]}
    rest = {name: value for name, value in body.items() if name != "prompt"}
    got = await app.post("/v1/chat/completions", {**said, **rest, "stop": body["stop"][:4]})
    assert got.status_code == 200, got.text
    assert isinstance(got.json()["choices"][0]["message"]["content"], str)


async def test_the_tokenizer_over_http(app: Client, model: ServedModel) -> None:
    info = (await app.get("/tokenizer_info")).json()
    assert (info["bos_token"], info["eos_token"]) == ("<|bos|>", "<|eos|>")
    for text in ("hello w", "  spaced ", "<|eos|>", ""):
        got = await app.post("/tokenize", {"prompt": text, "add_special_tokens": False})
        assert got.json()["tokens"] == model.tokenizer.encode(text, special=False)
        back = await app.post("/detokenize", {"tokens": got.json()["tokens"]})
        assert back.json()["prompt"] == text
