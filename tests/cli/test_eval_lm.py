"""``qoq eval lm``: what it refuses, and lm-evaluation-harness on a model served here."""

import importlib.util
import json
import math
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from helpers import serving
from helpers.harness import DOCUMENTS, ENDINGS, STARTS, likelihood_request, write_tasks
from helpers.openai_server import echo_server
from helpers.verbs import answer, refusal, run, spawn
from qoq import LLM, SamplingParams
from qoq.evaluate import harness

needs_lm_eval = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("lm_eval", "aiohttp", "tenacity")),
    reason="lm_eval is not installed: pip install 'lm_eval[api]'",
)
BOS = 0
pytestmark = pytest.mark.timeout(600)  # lm_eval alone takes long to import on a busy machine


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def test_without_lm_eval_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda name: None if name == "tenacity" else 1)
    told = refusal("eval", "lm", "OUT", "--tasks", "hellaswag")
    assert "tenacity is missing" in told
    assert "pip install 'lm_eval[api]" in told
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ((), "--tasks hellaswag,arc_easy"),
        (("--tasks", " , "), "--tasks hellaswag,arc_easy"),
        (("--tasks", "a", "--backend", "vllm"), "openai-chat"),
        (("--tasks", "a", "--limit", 0), "--limit"),
        (("--tasks", "a", "--limit", "nan"), "--limit"),
        (("--tasks", "a", "--num-concurrent", 0), "--num-concurrent"),
    ],
)
def test_bad_options(options: tuple[object, ...], says: str) -> None:
    assert says in refusal("eval", "lm", "OUT", *options)


def test_neither_model_nor_server() -> None:
    assert "--base-url" in refusal("eval", "lm", "--tasks", "a")


def test_help_has_an_example() -> None:
    assert "qoq eval lm OUT --tasks hellaswag" in run("eval", "lm", "--help").stdout


@needs_lm_eval
def test_every_kind_of_task_gives_the_engine_s_own_numbers(
    packed: Path, tasks: Path, tmp_path: Path
) -> None:
    saved, log = tmp_path / "out.json", tmp_path / "items.jsonl"
    names = "tiny_endings,tiny_starts,tiny_documents,tiny_starts"
    got = answer(
        *("eval", "lm", packed, "--tasks", names, "--include-path", tasks),
        *("--save", saved, "--log-samples", log),
    )
    assert got == json.loads(saved.read_text(encoding="utf-8"))
    assert (got["model"], got["scheme"]) == (str(packed), "w4a8kv4-g128")
    assert got["n-samples"]["tiny_endings"] == {"original": 4, "effective": 4}
    items = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    llm = LLM(packed)

    def log_likelihood(ids: list[int], start: int) -> float:
        [output] = llm.generate([ids], SamplingParams(max_tokens=1, prompt_logprobs=1))
        assert output.prompt_logprobs is not None
        tops = list(zip(ids, output.prompt_logprobs, strict=True))[start:]
        return sum(top[i].logprob for i, top in tops if top is not None)

    def ids_of(text: str) -> list[int]:
        return llm.tokenizer.encode(text, special=False)

    right = 0
    choices = [item for item in items if item["task"] == "tiny_endings"]
    for row, item in zip(ENDINGS, choices, strict=True):
        values = []
        for ending, (value, _) in zip(row["endings"], item["filtered_resps"], strict=True):
            context = str(row["ctx"]).rstrip()
            whole = ids_of(str(row["ctx"]) + ending)
            start = len(ids_of(context)) if context else 1
            assert value == log_likelihood(whole if context else [BOS, *whole], start)
            values.append(value)
        right += values.index(max(values)) == row["label"]
    assert got["results"]["tiny_endings"]["acc,none"] == right / len(ENDINGS)

    starts = [item for item in items if item["task"] == "tiny_starts"]
    params = SamplingParams(max_tokens=9, temperature=0, stop=["ll", "zz"])
    outputs = llm.generate([ids_of(row["text"]) for row in STARTS], params)
    assert [item["filtered_resps"][0] for item in starts] == [output.text for output in outputs]

    total = words = 0.0
    length = llm.config.max_positions - 2  # windows of lm_eval, one token after another
    for row in DOCUMENTS:
        ids, before = ids_of(row["text"]), BOS
        for at in range(0, len(ids), length):
            part = ids[at : at + length]
            rolled = [before, *part] if len(part) == length or at == 0 else None
            if rolled is None:  # the last window reaches back for context of its own length
                rolled = ids[len(ids) - length - 1 :]
            total += log_likelihood(rolled, len(rolled) - len(part))
            before = part[-1]
        words += len(re.split(r"\s+", row["text"]))  # as lm_eval counts them
    perplexity = got["results"]["tiny_documents"]["word_perplexity,none"]
    assert perplexity == pytest.approx(math.exp(-total / words), rel=1e-9)


@needs_lm_eval
def test_perplexity_agrees_with_eval_ppl(packed: Path, tasks: Path, tmp_path: Path) -> None:
    log = tmp_path / "items.jsonl"
    answer(
        *("eval", "lm", packed, "--tasks", tasks / "tiny_documents.yaml"),
        *("--log-samples", log),
    )
    items = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    text = tmp_path / "text.txt"
    for item in items:
        row = item["arguments"][0][0]
        text.write_text("<|bos|>" + row, encoding="utf-8")
        tokens = len(LLM(packed).tokenizer.encode(row, special=False))
        if tokens > 100:
            continue  # more than one window
        own = answer("eval", "ppl", packed, "--text", text, "--seq-len", tokens + 1)
        assert own["tokens"] == tokens
        wanted = math.exp(-item["filtered_resps"][0] / tokens)
        assert own["perplexity"] == pytest.approx(wanted, rel=1e-5)


@needs_lm_eval
def test_contexts_begin_with_one_bos(packed: Path, tasks: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Fast
    from tokenizers.processors import TemplateProcessing

    plain = ("eval", "lm", packed, "--include-path", tasks, "--tasks")
    assert "no BOS" in refusal(*plain, "tiny_starts", "--add-bos-token").splitlines()[-1]
    model = tmp_path / "model"
    shutil.copytree(packed, model)
    fast = Fast.from_file(str(model / "tokenizer.json"))
    fast.post_processor = TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", BOS)])
    fast.save(str(model / "tokenizer.json"))
    told: dict[str, Any] = {}
    for name, options in (("yes", ()), ("no", ("--no-add-bos-token",))):
        log = tmp_path / f"{name}.jsonl"
        got = answer(
            *("eval", "lm", model, "--include-path", tasks, "--log-samples", log),
            *("--tasks", "tiny_endings,tiny_documents", *options),
        )
        assert got["settings"]["add_bos_token"] is (name == "yes")
        told[name] = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    llm = LLM(packed)
    whole = [BOS, *llm.tokenizer.encode("hello well", special=False)]
    [own] = llm.generate([whole], SamplingParams(max_tokens=1, prompt_logprobs=1))
    assert own.prompt_logprobs is not None
    found = {
        name: [item["filtered_resps"] for item in items if item["task"] == "tiny_endings"][1][0][0]
        for name, items in told.items()
    }
    assert found["yes"] != found["no"]
    context = len(llm.tokenizer.encode("hello w", special=False))
    tops = list(zip(whole, own.prompt_logprobs, strict=True))[1 + context :]
    assert found["yes"] == sum(top[i].logprob for i, top in tops if top is not None)
    # lm_eval's own prefix is the BOS of rolled texts; a second one would change them
    rolled = [
        [item["filtered_resps"] for item in items if item["task"] == "tiny_documents"]
        for items in told.values()
    ]
    assert rolled[0] == rolled[1]


@needs_lm_eval
def test_a_server_that_runs_already(packed: Path, tasks: Path, tmp_path: Path) -> None:
    logs = [tmp_path / "local.jsonl", tmp_path / "remote.jsonl"]
    wanted = ("--include-path", tasks, "--tasks", "tiny_endings,tiny_starts", "--log-samples")
    with serving.live(serving.load(packed), api_keys=("secret",)) as server:
        there = ("eval", "lm", "--base-url", server.url, "--api-key", "secret")
        got = answer(*there, "--tokenizer", packed, *wanted, logs[0])
        assert got["settings"]["max_model_len"] == 128  # as /v1/models says
        assert got["model"] == serving.NAME
        answer(*there, *wanted, logs[1], "--num-concurrent", 1)
        assert logs[0].read_bytes() == logs[1].read_bytes()
        chat = (*there, "--include-path", tasks, "--backend", "openai-chat", "--tasks")
        assert answer(*chat, "tiny_starts")["settings"]["apply_chat_template"] is True
        assert "log-likelihoods" in refusal(*chat, "tiny_starts,tiny_endings")
        templated = (*there, *wanted, logs[1], "--apply-chat-template")
        assert "--tokenizer" in refusal(*templated).splitlines()[-1]
        answer(*templated, "--tokenizer", packed)
        [first, *_] = (json.loads(line) for line in logs[1].read_text().splitlines())
        assert first["arguments"][0][0].startswith("<|bos|>[user] the hat told")
        long = (*there, "--include-path", tasks, "--tasks", "tiny_documents", "--tokenizer", packed)
        said = run(*long, "--max-model-len", 300, status=1).stderr.splitlines()[-1]
        assert "context is 128" in said
        server.until_idle()


@needs_lm_eval
def test_a_server_that_fails(tasks: Path) -> None:
    with echo_server() as echo:
        asked = ("eval", "lm", "--base-url", echo.base_url, "--include-path", tasks)
        said = run(*asked, "--tasks", "tiny_starts", status=1).stderr
        assert "/tokenizer_info" in said.splitlines()[-1]
        assert "--tokenizer" in said.splitlines()[-1]


@needs_lm_eval
def test_tasks_that_cannot_be_had(packed: Path, tasks: Path, tmp_path: Path) -> None:
    asked = ("eval", "lm", packed, "--include-path", tasks, "--tasks")
    said = run(*asked, "tiny_ending", status=1).stderr.splitlines()[-1]
    assert "no task 'tiny_ending'. Did you mean tiny_endings" in said
    assert "no folder" in refusal("eval", "lm", packed, "--tasks", "a", "--include-path", "none")
    broken = write_tasks(tmp_path)
    (broken / "tiny_starts.jsonl").unlink()
    said = run("eval", "lm", packed, "--tasks", broken / "tiny_starts.yaml", status=1).stderr
    assert "tiny_starts.yaml cannot be read" in said
    assert "HF_HOME" in said


@needs_lm_eval
def test_ctrl_c_ends_the_server_too(packed: Path, tasks: Path) -> None:
    child = spawn("eval", "lm", packed, "--tasks", tasks / "tiny_documents.yaml")
    assert child.stderr is not None
    url = ""
    for line in child.stderr:
        if " at http://" in line:
            url = line.split(" at ")[1].split(",")[0]
            break
    child.send_signal(signal.SIGINT)
    rest = child.stderr.read()
    assert child.wait(60) == 130, rest
    assert rest.rstrip().endswith("qoq: interrupted.")
    assert url.startswith("http://127.0.0.1:")


@needs_lm_eval
def test_the_requests_of_the_protocol_s_tests_are_lm_eval_s_own() -> None:
    from qoq.client.api import Endpoint
    from qoq.evaluate.harness_client import make_client

    asked = harness.Asked(Endpoint("http://127.0.0.1:1"), "m", 99, chat=True)
    client = make_client(asked.client_arguments(), chat=False)
    assert client._create_payload([[1, 2]], generate=False) == likelihood_request("m", [1, 2])
