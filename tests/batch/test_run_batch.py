"""``qoq run-batch``: answers as the model gives them alone, whatever happened in between."""

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import serving
from helpers.calling import tool
from helpers.tiny import write_byte_tokenizer, write_tiny_llama
from helpers.verbs import answer, refusal, run, spawn
from qoq.engine.request import SamplingParams
from qoq.llm import LLM

FORM = {"type": "json_schema", "json_schema": {"schema": {"enum": ["ab"]}}}
DAY = {
    "type": "object",
    "properties": {"day": {"enum": ["today"]}},
    "required": ["day"],
    "additionalProperties": False,
}
TOOLS = [tool("f", DAY)]
BAD = [tool("f", {"type": "foo"})]
NAMED = {"tool_choice": {"type": "function", "function": {"name": "f"}}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    write_tiny_llama(folder)
    return folder


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiny products on many threads of a busy machine take minutes."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # for processes of their own
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def request(name: str, url: str = "/v1/completions", **body: Any) -> str:
    body = {"model": "tiny", "temperature": 0, **body}
    return json.dumps({"custom_id": name, "method": "POST", "url": url, "body": body})


def read(file: Path) -> dict[str, dict[str, Any]]:
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert len({line["id"] for line in lines}) == len(lines)
    return {line["custom_id"]: line for line in lines}


def test_a_batch(model: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    said = [{"role": "user", "content": "hello"}]
    lines = [
        request("text", prompt="hello well", max_tokens=9),
        request("chat", "/v1/chat/completions", messages=said, max_tokens=7),
        request("long", prompt=[5] * 500),
        request("many", prompt="hello w", n=3, seed=4, temperature=1.5, max_tokens=5),
        request("form", prompt="a", response_format=FORM, max_tokens=40),
        request("call", "/v1/chat/completions", messages=said, tools=TOOLS, **NAMED),
        request("bad form", prompt="a", n=3, structured_outputs={"json": {"type": "foo"}}),
        request("bad tool", "/v1/chat/completions", messages=said, tools=BAD, **NAMED),
        request("auto", "/v1/chat/completions", messages=said, tools=TOOLS),
        "not json",
        "",
        request("text", prompt="twice"),
    ]
    source.write_text("\n".join(lines), encoding="utf-8")
    command = ["run-batch", "-i", source, "-o", out, "--model", model]
    got = answer(*command)
    assert (got["total"], got["done"], got["resumed"]) == (11, 11, 0)
    assert got["failed"] == 6
    all_lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert len(all_lines) == 11
    good = {x["custom_id"]: x["response"] for x in all_lines if x["response"] is not None}
    llm = LLM(model)
    text = llm.generate("hello well", SamplingParams(max_tokens=9))[0]
    body = good["text"]["body"]
    assert body["choices"][0]["text"] == text.text
    assert body["object"] == "text_completion"
    assert body["usage"]["completion_tokens"] == len(text.token_ids)
    chat = llm.chat(said, SamplingParams(max_tokens=7))[0]
    assert good["chat"]["body"]["choices"][0]["message"]["content"] == chat.text
    assert "500 tokens" in good["long"]["body"]["error"]["message"]
    params = SamplingParams(max_tokens=5, n=3, seed=4, temperature=1.5)
    many = [text.text for text in llm.generate("hello w", params)]
    assert [choice["text"] for choice in good["many"]["body"]["choices"]] == many
    assert json.loads(good["form"]["body"]["choices"][0]["text"]) == "ab"
    [call] = good["call"]["body"]["choices"][0]["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"day": "today"}
    assert good["bad form"]["body"]["error"]["message"].startswith("structured_outputs: ")
    assert good["bad tool"]["body"]["error"]["param"] == "tools"
    assert "--tool-call-parser" in good["auto"]["body"]["error"]["message"]
    errors = [line for line in all_lines if line["error"] is not None]
    assert sorted(line["custom_id"] or "" for line in errors) == ["", "text"]
    again = answer(*command)  # everything is there: nothing is done twice
    assert (again["resumed"], again["tokens"]) == (11, 0)
    assert [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] == all_lines
    with source.open("a", encoding="utf-8") as file:
        file.write("\n" + request("new", prompt="more", max_tokens=2))
    assert answer(*command)["tokens"] <= 2
    assert "errors" in run(*command, "--overwrite").stdout


@pytest.mark.asyncio
async def test_it_says_what_the_server_says(model: Path, tmp_path: Path) -> None:
    said = [{"role": "user", "content": "hello"}]
    warm = {"temperature": 1.5, "seed": 3, "max_tokens": 9}
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("/v1/completions", {"prompt": "hello w", "n": 3, "logprobs": 2, **warm}),
        ("/v1/completions", {"prompt": [5, 6, 7], "prompt_logprobs": 1, "logprobs": 0, **warm}),
        ("/v1/completions", {"prompt": "a", "guided_regex": "[ab]{3}c", "stop": "c", **warm}),
        ("/v1/chat/completions", {"messages": said, "logprobs": True, "top_logprobs": 2, **warm}),
        ("/v1/chat/completions", {"messages": said, "tools": TOOLS, **NAMED}),
        ("/v1/chat/completions", {"messages": said, "tools": TOOLS, "tool_choice": "required"}),
        ("/v1/chat/completions", {"messages": said, "prompt_logprobs": 0, **warm}),
        ("/v1/chat/completions", {"messages": said, "tools": BAD, **NAMED}),
        ("/v1/chat/completions", {"messages": said, "n": 0}),
        ("/v1/completions", {"prompt": "a", "logit_bias": {"99999": 1}}),
        ("/v1/completions", {"prompt": "hello", "n": 2, "return_token_ids": True, **warm}),
        ("/v1/chat/completions", {"messages": said, "return_token_ids": True, **warm}),
        ("/v1/completions", {"prompt": "hello", "max_tokens": 10_000}),
        ("/v1/chat/completions", {"messages": said, "max_completion_tokens": 10_000}),
        ("/v1/completions", {"prompt": [5] * 10_000}),
        ("/v1/completions", {"prompt": ""}),
    ]
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [request(str(at), url, **body) for at, (url, body) in enumerate(bodies)]
    source.write_text("\n".join(lines), encoding="utf-8")
    answer("run-batch", "-i", source, "-o", out, "--model", model)
    batch = read(out)
    async with serving.client(serving.load(model)) as app:
        for at, (url, body) in enumerate(bodies):
            got = (await app.post(url, {"temperature": 0, **body})).json()
            ours = batch[str(at)]["response"]["body"]
            assert set(ours) == set(got)
            assert texts_of(ours) == texts_of(got), body
            assert numbers_of(ours) == pytest.approx(numbers_of(got), abs=1e-4), body


def texts_of(body: dict[str, Any]) -> str:
    """All but the numbers, and what no two answers share."""
    if "error" in body:
        return json.dumps(body, sort_keys=True)
    for choice in body["choices"]:
        for call in choice.get("message", {}).get("tool_calls", ()):
            assert call.pop("id")
    del body["id"], body["created"]
    body["usage"].pop("prompt_tokens_details", None)
    return json.dumps(json.loads(json.dumps(body), parse_float=lambda _: 0.0), sort_keys=True)


def numbers_of(body: dict[str, Any]) -> list[float]:
    """In order; float weights are multiplied by torch, whose last bits hang on the batch."""
    found: list[float] = []
    json.loads(json.dumps(body, sort_keys=True), parse_float=lambda text: found.append(float(text)))
    return found


def test_no_template_is_told_line_by_line(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    write_tiny_llama(folder)
    write_byte_tokenizer(folder, template=None)
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    said = [{"role": "user", "content": "hello"}]
    source.write_text(request("a", "/v1/chat/completions", messages=said), encoding="utf-8")
    assert answer("run-batch", "-i", source, "-o", out, "--model", folder)["failed"] == 1
    assert "no chat template" in str(read(out)["a"])


def test_refusals(model: Path, tmp_path: Path) -> None:
    line = ("run-batch", "-i", "a", "-o", "b", "--model", model)
    assert "hermes" in refusal(*line, "--tool-call-parser", "nonsense")
    out = tmp_path / "out.jsonl"
    source = tmp_path / "in.jsonl"
    assert "no file" in refusal("run-batch", "-i", source, "-o", out, "--model", model)
    source.write_text(request("a", prompt="a"), encoding="utf-8")
    assert "same file" in refusal("run-batch", "-i", source, "-o", source, "--model", model)


def test_ctrl_c_loses_nothing(model: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    count = 40
    prompts = [f"hello {i}" for i in range(count)]
    lines = [
        request(f"r{i}", prompt=p, max_tokens=12, ignore_eos=True) for i, p in enumerate(prompts)
    ]
    source.write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = ("run-batch", "-i", source, "-o", out, "--model", model, "--max-num-seqs", 2)
    process = spawn(*command)
    partial = tmp_path / "out.jsonl.partial"
    while not partial.exists() or partial.stat().st_size < 2000:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130, told
    assert "goes on from there" in told
    assert not out.exists()
    before = partial.read_bytes()
    kept = before.count(b"\n")
    assert 0 < kept < count
    partial.write_bytes(before + b'{"id": "batch_req_half')  # as a power cut may leave it
    got = answer(*command)
    assert (got["resumed"], got["done"]) == (kept, count)
    assert out.read_bytes().startswith(before)
    answers = read(out)
    assert len(answers) == count
    texts = LLM(model).generate(prompts, SamplingParams(max_tokens=12, ignore_eos=True))
    for i, text in enumerate(texts):
        assert answers[f"r{i}"]["response"]["body"]["choices"][0]["text"] == text.text
