"""``qoq complete``: texts continued in the terminal."""

import sys
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


@verb()
def complete(
    model: MAYBE_MODEL = None,
    base_url: SERVER = None,
    api_key: API_KEY = None,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "--quick", "-q", help="Continue this and leave."),
    ] = None,
    max_tokens: MAX_TOKENS = 128,
    temperature: MAYBE_TEMPERATURE = None,
    top_p: MAYBE_TOP_P = None,
    top_k: MAYBE_TOP_K = None,
    seed: SAMPLING_SEED = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this string (repeatable).")
    ] = None,
    speculative_config: SPECULATIVE = None,
    threads: THREADS = None,
    device: DEVICE = "auto",
    json: JSON = False,
) -> None:
    """Continue texts, each line on its own, by a model or a server.

    Ctrl-C stops a text, Ctrl-D leaves.

    Examples:

        qoq complete OUT

        qoq complete --base-url http://127.0.0.1:8000 --prompt "It was a dark and"

    --json (with --prompt) prints: prompt, text, finish_reason, prompt_tokens, tokens.
    """
    from qoq.errors import RequestError

    if json and prompt is None:
        raise RequestError("--json continues one text: add --prompt TEXT.")
    use_threads(threads)
    choices = Choices(max_tokens, temperature, top_p, top_k, seed, tuple(stop or ()))
    who = speaker(model, base_url, api_key, choices, speculative_config, device=device, quiet=json)
    if prompt is None:
        _converse(who)
        return
    pieces = who.complete(prompt)
    if not json:
        print(prompt, end="", flush=True)
    said = say(pieces, quiet=json)
    if json:
        emit(
            {
                "prompt": prompt,
                "text": said.text,
                "finish_reason": said.finish_reason,
                "prompt_tokens": said.prompt_tokens,
                "tokens": said.tokens,
            }
        )


def _converse(who: Speaker) -> None:
    """Line in, the rest of it out, until the input ends."""
    from qoq.errors import RequestError, ServerError

    if sys.stdin.isatty():
        note("Type the beginning of a text; Ctrl-C stops an answer, Ctrl-D leaves.")
    while (said := typed()) is not None:
        if not said.strip():
            continue
        try:
            say(who.complete(said))
        except (RequestError, ServerError) as error:
            note(str(error))
