"""How ``qoq serve`` reads its command line and its --config file."""

from pathlib import Path
from typing import Any

import pytest
import typer

from helpers.verbs import refusal, run
from qoq.cli import serve as module
from qoq.cli.serve_command import count, read_config, several, spread
from qoq.engine.speculative import SpeculativeConfig
from qoq.errors import RequestError
from qoq.server import model as served
from qoq.server import run as running

SEVERAL = {"--served-model-name", "--api-key"}


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("M --served-model-name A B", "M --served-model-name A --served-model-name B"),
        ("--api_key A M", "--api_key A M"),
        ("M --api-key=A B --port 1", "M --api-key=A --api-key B --port 1"),
        ("M --api-key A --api-key B C", "M --api-key A --api-key B --api-key C"),
        ("--port 1 M", "--port 1 M"),
        ("M --port 1 extra", "M --port 1 extra"),
    ],
)
def test_values_in_a_row(line: str, wanted: str) -> None:
    assert spread(line.split(), SEVERAL) == wanted.split()


@pytest.mark.parametrize(
    ("text", "value"), [("4096", 4096), ("8k", 8000), ("2G", 2 << 30), ("1.5M", 3 << 19)]
)
def test_counts(text: str, value: int) -> None:
    assert count(text) == value


@pytest.mark.parametrize("text", ["", "x", "4GB", "1e3", "-", "nang"])
def test_counts_that_are_none(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        count(text)


def test_lists() -> None:
    assert several(None, ("*",)) == ("*",)
    assert several(["a", '["b", "c"]'], ()) == ("a", "b", "c")
    with pytest.raises(RequestError, match="JSON list"):
        several(["[a"], ())


class _Stopped(Exception):
    """Raised in place of loading a model."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What serve was about to do: EngineOptions, and the address."""
    seen: dict[str, Any] = {}

    def load(path: str, options: served.EngineOptions) -> Any:
        seen.update(model=path, options=options)
        raise RequestError("stopped here")

    bind = running.bind

    def bound(host: str, port: int) -> Any:
        seen.update(host=host, port=port)
        return bind("127.0.0.1", 0)

    monkeypatch.setattr(served, "load_served_model", load)
    monkeypatch.setattr(running, "bind", bound)
    monkeypatch.setattr(running, "configure_logs", lambda *_: None)
    return seen


def test_dashes_and_underscores(asked: dict[str, Any]) -> None:
    for style in ("--max-model-len 4k --max-num-seqs=7", "--max_model_len 4k --max_num_seqs=7"):
        refusal("serve", "M", *style.split(), "--kv_cache-memory_bytes", "1G", "--port", 81)
        assert asked["model"] == "M"
        assert asked["port"] == 81
        assert asked["options"].max_model_len == 4000
        assert asked["options"].max_num_seqs == 7
        assert asked["options"].kv_memory_bytes == 1 << 30


def test_tools(asked: dict[str, Any], tmp_path: Path) -> None:
    def options(*line: str) -> tuple[str, bool | None]:
        refusal("serve", "M", *line)
        return asked["options"].tool_call_parser, asked["options"].enable_auto_tool_choice

    assert options() == ("auto", None)
    line = ("--tool-call-parser", "hermes", "--enable_auto_tool_choice")
    assert options(*line) == ("hermes", True)
    assert options("--no-enable-auto-tool-choice") == ("auto", False)
    file = tmp_path / "serve.yaml"
    file.write_text("tool-call-parser: mistral\nenable-auto-tool-choice: true\n")
    assert options("--config", str(file)) == ("mistral", True)


def test_config_file_and_the_line_that_wins(asked: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(
        "model: FROM_FILE\nmax-num-seqs: 5\nmax_num_batched_tokens: 99\nhost: 0.0.0.0\n"
        "max-model-len: 8k\nserved-model-name: [a, b]\nlog-format: json\n"
    )
    refusal("serve", "--config", file, "--max-num-seqs", 6)
    assert asked["model"] == "FROM_FILE"
    assert asked["host"] == "0.0.0.0"
    options = asked["options"]
    assert (options.max_num_seqs, options.max_num_batched_tokens) == (6, 99)
    assert options.max_model_len == 8000
    assert options.enable_prefix_caching is True
    assert options.seed is None
    refusal("serve", "M", f"--config={file}")
    assert asked["model"] == "M"
    file.write_text("enable-prefix-caching: false\nseed: -3\nengine-step-timeout: 7\n")
    refusal("serve", "M", "--config", file)
    assert asked["options"].enable_prefix_caching is False
    assert asked["options"].seed == -3
    refusal("serve", "M", "--config", file, "--enable_prefix_caching", "--seed", 4)
    assert asked["options"].enable_prefix_caching is True
    assert asked["options"].seed == 4
    refusal("serve", "M", "--no-enable-prefix-caching")
    assert asked["options"].enable_prefix_caching is False


def test_speculation_on_the_line_and_in_the_file(asked: dict[str, Any], tmp_path: Path) -> None:
    wanted = SpeculativeConfig(4, prompt_lookup_max=5, prompt_lookup_min=5)
    given = '{"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 5}'
    refusal("serve", "M", "--speculative_config", given)
    assert asked["options"].speculative == wanted
    file = tmp_path / "serve.yaml"
    file.write_text("speculative-config:\n  num_speculative_tokens: 4\n  prompt_lookup_max: 5\n")
    refusal("serve", "M", "--config", file)
    assert asked["options"].speculative == wanted
    refusal("serve", "M")
    assert asked["options"].speculative is None
    assert "no 'modle'" in refusal(
        "serve", "M", "--speculative-config", given[:-1] + ', "modle": 1}'
    )
    for bad in ("{", "3", "[4]"):
        assert "JSON" in run("serve", "M", "--speculative-config", bad, status=2).stderr


@pytest.mark.parametrize(
    ("text", "says"),
    [("max-nom-seqs: 5\n", "max-nom-seqs"), ("- a\n", "name: value"), ("a: [\n", "cannot be read")],
)
def test_config_files_that_are_refused(text: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    assert says in refusal("serve", "M", "--config", file)
    with pytest.raises(RequestError):
        read_config(file, set())


def test_options_of_other_engines_and_words_nearly_right() -> None:
    for line, says in (
        ("--dtype auto", "no --dtype here: the checkpoint says so"),
        ("--tensor_parallel_size=2", "no --tensor-parallel-size here: one process"),
        ("-tp 2", "no -tp here"),
        ("--no-enable-chunked-prefill", "no --no-enable-chunked-prefill here: prompts are always"),
    ):
        assert says in refusal("serve", "M", *line.split(), status=2)
    assert "--max-num-seqs" in run("serve", "M", "--max-num-seq", 3, status=2).stderr


def test_options_that_ask_for_what_is_always_so(asked: dict[str, Any]) -> None:
    given = "--enable-chunked-prefill --enable_prompt_tokens_details --max-num-seqs 3"
    refusal("serve", "M", *given.split())
    assert asked["options"].max_num_seqs == 3


def test_tls_files_are_looked_at_before_the_model(asked: dict[str, Any], tmp_path: Path) -> None:
    nowhere, nothing = tmp_path / "nowhere.pem", tmp_path / "nothing.pem"
    nothing.write_text("")
    assert "--ssl-certfile" in refusal("serve", "M", "--ssl-keyfile", nothing)
    assert str(nowhere) in refusal("serve", "M", "--ssl-certfile", nowhere)
    assert str(nothing) in refusal("serve", "M", "--ssl-certfile", nothing)
    assert "model" not in asked


def test_an_address_that_is_none() -> None:
    assert "999.0.0.1, port 81" in refusal("serve", "M", "--host", "999.0.0.1", "--port", 81)


def test_bad_values(asked: dict[str, Any], tmp_path: Path) -> None:
    assert run("serve", "M", "--log-format", "xml", status=2)
    assert run("serve", "M", "--max-model-len", "long", status=2)
    assert run("serve", "M", "--port", 65536, status=2)
    assert "--threads takes" in refusal("serve", "M", "--threads", 0)
    assert run("serve", status=2)
    (tmp_path / "keys").write_text("# none yet\n")
    assert "no key" in refusal("serve", "M", "--api-key-file", tmp_path / "keys")
    assert "empty" in refusal("serve", "M", "--api-key", "")
    assert "nowhere" in refusal("serve", "M", "--chat-template", tmp_path / "nowhere")


def test_keys_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\none\n\n  two  \n")
    monkeypatch.setenv(module.KEY_VARIABLE, "three, four")
    assert module._keys(["zero"], file) == ("zero", "three", "four", "one", "two")


def test_help_has_an_example() -> None:
    text = run("serve", "--help").stdout
    assert "qoq serve OUT" in text
    assert "--max-num-queued-reqs" in text
    assert "--no-enable-prefix-caching" in text
