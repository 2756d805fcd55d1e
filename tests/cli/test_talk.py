"""``qoq chat`` and ``qoq complete``, with a server and with a model, piped and at a terminal."""

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.openai_server import Echo, echo_server
from helpers.tiny import write_tiny_llama
from helpers.verbs import SOURCE, answer, hear_ctrl_c, refusal, run
from qoq import LLM, SamplingParams
from qoq.cli.speaker import Choices, Local, speaker


def test_a_server_is_asked_with_what_is_given() -> None:
    with echo_server(api_key="secret") as echo:
        base = ["--base-url", echo.base_url, "--api-key", "secret"]
        got = answer("chat", *base, "--message", "hello you", "--system", "be well")
        assert [m["role"] for m in got["messages"]] == ["system", "user", "assistant"]
        assert got["messages"][-1]["content"] == "hello you "
        assert (got["finish_reason"], got["prompt_tokens"], got["tokens"]) == ("stop", 2, 2)
        body = echo.bodies[-1]
        assert (body["model"], body["max_tokens"]) == ("echo", 512)
        assert "temperature" not in body  # the server's own default
        run("chat", "other", *base, "-q", "hi", "--temp", 0.5, "--top_p", 0.9, "--seed", 3)
        body = echo.bodies[-1]
        assert (body["model"], body["temperature"], body["top_p"]) == ("other", 0.5, 0.9)
        assert body["seed"] == 3
        got = answer("complete", *base, "--prompt", "one two", "--stop", "x", "--max-tokens", 1)
        assert (got["text"], got["tokens"]) == ("one ", 1)
        assert echo.bodies[-1]["stop"] == ["x"]
        assert run("complete", *base, "-q", "one two").stdout == "one twoone two \n"
        assert run("complete", *base, stdin="a b\n\nc\n").stdout == "a b \nc \n"
        assert "--api-key" in refusal("chat", "--base-url", echo.base_url)


def test_a_model_here_chooses_as_its_generation_config_says(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path)
    file = tmp_path / "generation_config.json"
    file.write_text('{"temperature": 0.7, "top_k": 5, "max_new_tokens": 9}', encoding="utf-8")
    given = Choices(max_tokens=3, top_k=2, seed=1)
    who = speaker(str(tmp_path), None, None, given)
    pieces = list(who.complete("hello w"))
    wanted = SamplingParams(max_tokens=3, temperature=0.7, top_k=2, seed=1)
    [output] = LLM(tmp_path).generate(["hello w"], wanted)
    assert "".join(piece.text for piece in pieces) == output.text
    assert isinstance(who, Local)
    assert who.params == wanted


def test_commands_of_a_conversation(tmp_path: Path) -> None:
    file = tmp_path / "saved.json"
    lines = [
        "one",
        "two",
        "/retry",
        f"/save {file}",
        "/system be well",
        "three",
        "/nonsense",
        "/reset",
        "/retry",
        "/save",
        "/help",
        "/usr/bin is a folder",
        "boom",
        "four",
    ]
    with echo_server() as echo:
        said = run("chat", "--base-url", echo.base_url, stdin="\n".join(lines) + "\n")
    roles = ["".join(m["role"][0] for m in body["messages"]) for body in echo.bodies]
    assert roles == ["u", "uau", "uau", "su", "su", "suau", "suau"]
    saved = json.loads(file.read_text(encoding="utf-8"))["messages"]
    assert [m["content"] for m in saved] == ["one", "one ", "two", "two "]
    for told in (
        "4 messages are in",
        "There is no /nonsense",
        "Nothing was said",
        "/save needs",
        "something broke",
    ):
        assert told in said.stderr
    assert said.stdout == "one \ntwo \ntwo \nthree \n/usr/bin is a folder \nfour \n"


def test_complete_and_retry_with_a_model(packed: Path) -> None:
    got = answer("complete", packed, "--prompt", "hello the", "--max-tokens", 9)
    assert got["tokens"] == 9
    assert (
        got["text"]
        == answer("generate", packed, "--prompt", "hello the", "--max-tokens", 9)["text"]
    )
    guessing = ["--speculative-config", '{"num_speculative_tokens": 3}']
    assert got == answer("complete", packed, *guessing, "-q", "hello the", "--max-tokens", 9)
    twice = run("chat", packed, *guessing, "--max-tokens", 5, stdin="hello\n/retry\n").stdout
    assert len(set(twice.splitlines())) <= 2
    lines = run("complete", packed, "--max-tokens", 3, stdin=f"{'long ' * 200}\nhello\n")
    assert "context" in lines.stderr
    assert lines.stdout.strip()


def test_refusals() -> None:
    assert "--base-url" in refusal("chat")
    assert "--prompt" in refusal("complete", "x", "--json")
    there = ["--base-url", "http://127.0.0.1:1", "--speculative-config", "{}"]
    assert "loaded here" in refusal("chat", *there)
    assert "is it running" in refusal("complete", "--base-url", "http://127.0.0.1:1")


def wait(what: Callable[[], bool]) -> None:
    for _ in range(1500):
        if what():
            return
        time.sleep(0.02)
    pytest.fail("it did not happen within 30 s")


def test_ctrl_c_stops_the_answer_and_ctrl_d_ends() -> None:
    with echo_server(delay=0.02) as echo:
        master, slave = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-m", "qoq", "chat", "--base-url", echo.base_url],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=hear_ctrl_c,
            env={**os.environ, "PYTHONPATH": str(SOURCE), "TERM": "dumb"},
        )
        os.close(slave)
        os.set_blocking(master, False)
        seen = b""

        def shows(text: bytes) -> bool:
            nonlocal seen
            with contextlib.suppress(OSError):
                seen += os.read(master, 65536)
            return text in seen

        try:
            talk(echo, process, master, shows)
        finally:
            process.kill()
            os.close(master)


def talk(
    echo: Echo, process: "subprocess.Popen[bytes]", master: int, shows: Callable[[bytes], bool]
) -> None:
    wait(lambda: shows(b"> "))
    os.write(master, b"word " * 80 + b"\n")
    wait(lambda: echo.generated > 3)
    process.send_signal(signal.SIGINT)  # what the terminal makes of Ctrl-C
    wait(lambda: echo.hung_up == 1)
    assert echo.generated < 80
    time.sleep(0.2)
    os.write(master, b"again\n")
    wait(lambda: len(echo.bodies) == 2)
    said = [m["role"] for m in echo.bodies[1]["messages"]]
    assert said == ["user", "assistant", "user"]  # what there was of the answer is kept
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)  # at the prompt
    wait(lambda: shows(b"\r\nCtrl-D leaves."))  # the line it is told after, not the first of all
    os.write(master, b"\x04")
    assert process.wait(20) == 0
