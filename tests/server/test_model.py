"""Laying out the engine, sampling defaults, the start report, log lines."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers import serving
from qoq.api.sampling import Ends, sampling_defaults, sampling_params
from qoq.engine.choices import choices
from qoq.engine.speculative import SpeculativeConfig
from qoq.errors import RequestError, ResourceError, SourceError
from qoq.server.logs import JsonFormatter, TextFormatter
from qoq.server.model import ServedModel
from qoq.server.report import report_lines, start_report
from qoq.server.settings import ServerSettings


def test_cache_is_what_was_asked_for(folder: Path, model: ServedModel) -> None:
    page = model.pool.nbytes // model.pool.num_pages
    assert model.pool.num_pages == 64 * 2  # 64 requests of 128 tokens in pages of 64
    small = serving.load(folder, kv_memory_bytes=5 * page + 1, max_model_len=100)
    assert small.pool.num_pages == 5
    assert small.max_concurrency == pytest.approx(3.2)
    with pytest.raises(ResourceError, match="holds 64 tokens, one request may need 128"):
        serving.load(folder, kv_memory_bytes=page)
    with pytest.raises(RequestError, match="context of 128"):
        serving.load(folder, max_model_len=129)
    bad: list[dict[str, Any]] = [
        {"max_num_seqs": 0},
        {"max_model_len": -1},
        {"kv_memory_fraction": 0.0},
        {"kv_memory_bytes": 0},
        {"tool_call_parser": "nonsense"},
        {"enable_auto_tool_choice": True},  # this template shows no calls
        {"seed": 2**63},
    ]
    for options in bad:
        with pytest.raises(RequestError):
            serving.load(folder, **options)


def test_sampling_defaults(tmp_path: Path) -> None:
    assert sampling_defaults(tmp_path, "auto") == {}
    with pytest.raises(SourceError, match="generation_config"):
        sampling_defaults(tmp_path, str(tmp_path))
    file = tmp_path / "generation_config.json"
    file.write_text('{"temperature": 0.7, "top_k": 20, "do_sample": true, "eos_token_id": 1}')
    found = {"temperature": 0.7, "top_k": 20}
    assert sampling_defaults(tmp_path, "auto") == found
    assert sampling_defaults(tmp_path / "other", str(tmp_path)) == found
    assert sampling_defaults(tmp_path, "vllm") == {}
    for text in ('{"top_p": "high"}', "[]", "{"):
        file.write_text(text)
        with pytest.raises(SourceError):
            sampling_defaults(tmp_path, "auto")


def test_requests_win_over_defaults() -> None:
    class Body:
        temperature: float | None = None
        top_p: float | None = None
        top_k: int | None = None
        min_p: float | None = None
        seed: int | None = 7
        n: int | None = 2

    defaults = {"temperature": 0.7, "top_k": 20, "top_p": 0.9}
    two = sampling_params(Body(), Ends(stop="a"), defaults, max_tokens=3, vocab=10)
    assert two == choices(replace(two[0], n=2))
    assert two[0].seed == 7
    assert (two[0].temperature, two[0].top_k, two[0].top_p) == (0.7, 10, 0.9)
    body = Body()
    body.temperature, body.top_k, body.n = 0, -1, None
    [one] = sampling_params(body, Ends(), defaults, max_tokens=3, vocab=10)
    assert (one.temperature, one.top_k) == (0, 0)
    for own, default, wanted in ((None, -3, 2**63 - 3), (5, -3, 5), (0, 9, 0), (None, 0, 0)):
        body.seed = own
        [seeded] = sampling_params(body, Ends(), {"seed": default}, max_tokens=3, vocab=10)
        assert seeded.seed == wanted
    body.seed = body.temperature = None
    [neutral] = sampling_params(body, Ends(), {}, max_tokens=3, vocab=10)
    assert (neutral.temperature, neutral.top_p, neutral.seed) == (1.0, 1.0, None)


def test_options_reach_the_engine(folder: Path) -> None:
    engine = serving.load(folder, max_model_len=99, enable_prefix_caching=False).engine
    assert (engine.max_model_len, engine.enable_prefix_caching) == (99, False)
    model = serving.load(folder, seed=2**63 - 1)
    assert model.sampling == {"seed": 2**63 - 1}
    assert model.engine.enable_prefix_caching


@pytest.mark.parametrize(
    "wrong",
    [
        {"served_model_names": ()},
        {"served_model_names": ("",)},
        {"max_queued": -1},
        {"max_request_bytes": 0},
        {"request_timeout": 0.0},
        {"template_timeout": float("nan")},
        {"shutdown_timeout": -1.0},
        {"step_timeout": -1.0},
    ],
)
def test_settings_that_let_nothing_through(wrong: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        ServerSettings(**{"served_model_names": ("a",), **wrong})


def test_start_report(model: ServedModel, caller: ServedModel) -> None:
    report = start_report(model)
    assert json.loads(json.dumps(report)) == report
    assert {"act_quant", "linear", "attention", "sample"} <= set(report["ops"])
    text = "\n".join(report_lines(report))
    assert "KV cache: 8,192 tokens" in text
    assert "maximum concurrency for 128 tokens per request: 64.00x" in text
    assert "w16a16" in text
    assert "CPU kernels: " in text
    assert "speculative decoding: off" in text
    report = start_report(replace(model, speculative=SpeculativeConfig(4)))
    assert json.loads(json.dumps(report)) == report
    assert report["speculative_config"]["num_speculative_tokens"] == 4
    assert "speculative decoding: up to 4 tokens" in "\n".join(report_lines(report))
    assert "tool calls: parser none, automatic tool choice off" in text
    report = start_report(caller)
    assert (report["tool_call_parser"], report["auto_tool_choice"]) == ("hermes", True)


def test_log_lines() -> None:
    record = logging.LogRecord("qoq.access", logging.INFO, "", 0, "GET %s 200", ("/x",), None)
    record.facts = {"request_id": "r", "status": 200}
    line = json.loads(JsonFormatter().format(record))
    assert (line["message"], line["request_id"], line["level"]) == ("GET /x 200", "r", "info")
    assert line["time"].endswith("Z")
    assert TextFormatter().format(record).endswith("INFO    GET /x 200 request_id=r")
    try:
        raise ValueError("why\nand how")
    except ValueError as error:
        record.exc_info = (ValueError, error, error.__traceback__)
    assert "why" in json.loads(JsonFormatter().format(record))["exception"]
    assert "why" in TextFormatter().format(record)
