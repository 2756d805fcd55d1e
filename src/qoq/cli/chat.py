"""``qoq chat``: a conversation in the terminal."""

import json as jsonlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from qoq.cli.options import (
    API_KEY,
    DEVICE,
    JSON,
    MAX_TOKENS,
    MAYBE_MODEL,
    MAYBE_TEMPERATURE,
    MAYBE_TOP_K,
    MAYBE_TOP_P,
    SAMPLING_SEED,
    SERVER,
    SPECULATIVE,
    THREADS,
    use_threads,
)
from qoq.cli.speaker import Choices, Speaker, speaker
from qoq.cli.talk import say, typed
from qoq.cli.terminal import emit, note, verb

HELP = """\
/new or /reset   start over
/system TEXT     start over with this system message (none without TEXT)
/retry           another answer to what you said last
/save FILE       write the conversation as JSON
/help            this
Ctrl-C stops an answer, Ctrl-D leaves."""


@verb()
def chat(
    model: MAYBE_MODEL = None,
    base_url: SERVER = None,
    api_key: API_KEY = None,
    message: Annotated[
        str | None,
        typer.Option("--message", "--quick", "-q", help="Say this, print the answer and leave."),
    ] = None,
    system: Annotated[
        str | None, typer.Option("--system", "--system-prompt", help="System message.")
    ] = None,
    max_tokens: MAX_TOKENS = 512,
    temperature: MAYBE_TEMPERATURE = None,
    top_p: MAYBE_TOP_P = None,
    top_k: MAYBE_TOP_K = None,
    seed: SAMPLING_SEED = None,
    speculative_config: SPECULATIVE = None,
    threads: THREADS = None,
    device: DEVICE = "auto",
    json: JSON = False,
) -> None:
    """Talk with a model through its own chat template, or with a server.

    Type a line and press Enter; /help shows what else there is.

    Examples:

        qoq chat OUT

        qoq chat OUT --message "What is a hat?" --json

        qoq chat --base-url http://127.0.0.1:8000

    --json (with --message) prints: messages (role, content; the answer last), finish_reason,
    prompt_tokens, tokens.
    """
    from qoq.errors import RequestError

    if json and message is None:
        raise RequestError("--json answers one message: add --message TEXT.")
    use_threads(threads)
    choices = Choices(max_tokens, temperature, top_p, top_k, seed)
    who = speaker(model, base_url, api_key, choices, speculative_config, device=device, quiet=json)
    if message is None:
        Conversation(who, system).run()
        return
    messages = [*_first(system), {"role": "user", "content": message}]
    said = say(who.chat(messages), quiet=json)
    if json:
        emit(
            {
                "messages": [*messages, {"role": "assistant", "content": said.text}],
                "finish_reason": said.finish_reason,
                "prompt_tokens": said.prompt_tokens,
                "tokens": said.tokens,
            }
        )


class Conversation:
    """Line in, answer out, until the input ends."""

    def __init__(self, who: Speaker, system: str | None) -> None:
        self._who = who
        self._first = _first(system)
        self._messages = list(self._first)

    def run(self) -> None:
        """Ends with the input."""
        self._who.check_chat()  # refuse before anything is typed
        if sys.stdin.isatty():
            note("/help shows what there is; Ctrl-C stops an answer, Ctrl-D leaves.")
        while (said := typed()) is not None:
            text = said.strip()
            word = text.split(" ")[0]
            if not text:
                continue
            if word.startswith("/") and word[1:].isalpha():
                self._command(word, text[len(word) :].strip())
            else:
                self._messages.append({"role": "user", "content": text})
                self._answer()

    def _command(self, word: str, rest: str) -> None:
        if word in ("/new", "/reset"):
            self._messages = list(self._first)
        elif word == "/system":
            self._first = _first(rest)
            self._messages = list(self._first)
        elif word == "/retry":
            if self._messages[-1:] and self._messages[-1]["role"] == "assistant":
                self._messages.pop()
            if self._messages[-1:] and self._messages[-1]["role"] == "user":
                self._answer()
            else:
                note("Nothing was said yet.")
        elif word == "/save":
            self._save(rest)
        elif word == "/help":
            note(HELP)
        else:
            note(f"There is no {word}; /help shows what there is.")

    def _answer(self) -> None:
        from qoq.errors import RequestError, ServerError

        try:
            said = say(self._who.chat(self._messages))
        except (RequestError, ServerError) as error:
            # Most often the conversation has outgrown the context, or the server is away.
            self._messages.pop()
            note(f"{error} /new starts over.")
            return
        self._messages.append({"role": "assistant", "content": said.text})

    def _save(self, name: str) -> None:
        if not name:
            note("/save needs the name of a file.")
            return
        text = jsonlib.dumps({"messages": self._messages}, indent=2, ensure_ascii=False)
        try:
            Path(name).expanduser().write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            note(f"{name} cannot be written: {error.strerror or error}.")
            return
        note(f"{len(self._messages)} messages are in {name}.")


def _first(system: str | None) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}] if system else []
