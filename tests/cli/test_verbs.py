"""The other verbs: what they print, what --json prints, what they refuse."""

from pathlib import Path

import pytest

from helpers.verbs import answer, refusal, run
from qoq import __version__
from qoq.kernels.cpu import backend


def test_inspect(packed: Path) -> None:
    facts = answer("inspect", packed)
    assert facts["scheme"] == "w4a8kv4-g128"
    assert facts["bits_per_weight"] == pytest.approx(4 + 16 / 128 + 32 * 2 / 128 / 2, abs=0.5)
    assert sum(facts["parts"].values()) == facts["bytes"]
    layers = 2
    assert len(facts["layers"]) == layers
    hidden, inner, queries, keys = 128, 256, 128, 128
    each = hidden * (queries + 2 * keys) + queries * hidden + 3 * hidden * inner
    assert facts["weights"] == layers * each
    assert facts["kv_bytes_per_token"] == layers * 2 * 2 * (64 // 2 + 4)
    assert facts["layers"][0]["weight_error"] > 0
    assert facts["layers"][0]["output_error"] is None  # rtn looks at no data
    shown = run("inspect", packed).stdout
    assert "w4a8kv4-g128, lm_head 8 bits" in shown
    assert "rtn (no passes)" in shown
    (packed / "quantization_report.json").rename(packed / "elsewhere.json")
    assert answer("inspect", packed)["layers"][0]["weight_error"] is None
    (packed / "elsewhere.json").rename(packed / "quantization_report.json")


def test_inspect_refuses_what_is_not_packed(tiny: Path, tmp_path: Path) -> None:
    assert "no packed checkpoint" in refusal("inspect", tiny)
    assert "no checkpoint folder" in refusal("inspect", tmp_path / "none")


def test_generate_streams_what_json_says(packed: Path) -> None:
    options = ["generate", packed, "--prompt", "hello the", "--max-tokens", 9, "--seed", 4]
    options += ["--temperature", 1.5, "--top-k", 50, "--top-p", 0.95]
    got = answer(*options)
    assert got["tokens"] == len(got["token_ids"]) == len(got["logprobs"])
    assert got["finish_reason"] in ("length", "stop")
    assert run(*options).stdout == f"hello the{got['text']}\n"
    guessing = answer(*options, "--speculative-config", '{"num_speculative_tokens": 2}')
    assert {**guessing, "seconds": 0} == {**got, "seconds": 0}
    piped = run("generate", packed, "--prompt", "-", "--max-tokens", 2, stdin="hello")
    assert piped.stdout.startswith("hello")


@pytest.mark.parametrize("verb", ["generate", "chat", "complete", "eval"])
def test_threads_are_those_asked_for(
    verb: str, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QOQ_NUM_THREADS", "1")  # put back afterwards
    text = tmp_path / "text.txt"
    text.write_text("hello the " * 40)
    words = {
        "generate": ["generate", packed, "--prompt", "hello", "--max-tokens", 1],
        "chat": ["chat", packed, "--message", "hello", "--max-tokens", 1],
        "complete": ["complete", packed, "--prompt", "hello", "--max-tokens", 1],
        "eval": ["eval", "ppl", packed, "--text", text, "--seq-len", 16],
    }[verb]
    run(*words, "--threads", 2)
    assert backend.thread_count() == 2
    assert "--threads takes" in refusal(*words, "--threads", 0)


def test_generate_refuses(packed: Path) -> None:
    hello = ["generate", packed, "--prompt", "hello"]
    assert "max_tokens must be" in refusal(*hello, "--max-tokens", 0)
    assert "top_p must be" in refusal(*hello, "--top-p", 2)
    refusal("generate", packed, "--prompt", "hello " * 500)
    assert "num_speculative_tokens" in refusal(*hello, "--speculative-config", "{}")


def test_chat_answers_one_message_or_many(packed: Path) -> None:
    one = ["chat", packed, "--max-tokens", 5, "--message", "hello"]
    got = answer(*one, "--system", "be well")
    assert [m["role"] for m in got["messages"]] == ["system", "user", "assistant"]
    alone = answer(*one)["messages"][-1]["content"]
    assert run(*one).stdout == f"{alone}\n"
    twice = run("chat", packed, "--max-tokens", 5, stdin="hello\n\n/new\nhello\n").stdout
    assert twice == f"{alone}\n{alone}\n"
    assert "--message" in refusal("chat", packed, "--json")


def test_a_conversation_that_outgrows_the_context_goes_on(packed: Path) -> None:
    long = "hello " * 100
    result = run("chat", packed, "--max-tokens", 3, stdin=f"{long}\nhello\n")
    assert "/new starts over" in result.stderr
    assert result.stdout.count("\n") >= 1


def test_qserve_there_and_back(tiny: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "folded.json"
    recipe.write_text('{"rotate": true, "lm_head_bits": 16}', encoding="utf-8")
    ours, theirs, back = tmp_path / "ours", tmp_path / "theirs", tmp_path / "back"
    run("quantize", tiny, "-o", ours, "--recipe", recipe, "--no-eval")
    exported = answer("export-qserve", ours, "-o", theirs)
    assert (exported["out"], exported["group_size"]) == (str(theirs), 128)
    imported = answer("import-qserve", theirs, "-o", back)
    assert imported["scheme"] == "w4a8kv4-g128"
    shown = run("export-qserve", ours, "-o", tmp_path / "bin", "--format", "bin")
    assert "--group-size 128" in shown.stdout
    assert "exists already" in refusal("import-qserve", theirs, "-o", back)
    assert "no folder" in refusal("import-qserve", tmp_path / "none", "-o", tmp_path / "x")
    assert "KV bits" in refusal("import-qserve", theirs, "-o", tmp_path / "x", "--kv", 3)


def test_check_env() -> None:
    facts = answer("check-env")
    assert facts["qoq_version"] == __version__
    assert facts["ops"]["linear"]
    assert "linear" in run("check-env").stdout
    assert "'tpu9'" in refusal("check-env", "--device", "tpu9")
