"""``qoq chat``: a conversation in the terminal."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from qoq.cli.options import (
    ANY_MODEL,
    JSON,
    MAX_TOKENS,
    SAMPLING_SEED,
    TEMPERATURE,
    THREADS,
    TOP_K,
    TOP_P,
    use_threads,
)
from qoq.cli.terminal import emit, note, verb

if TYPE_CHECKING:
    from qoq.engine.request import SamplingParams
    from qoq.llm import LLM


@verb()
def chat(
    model: ANY_MODEL,
    message: Annotated[
        str | None, typer.Option(help="Say this, print the answer and leave.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: MAX_TOKENS = 512,
    temperature: TEMPERATURE = 0.0,
    top_p: TOP_P = 1.0,
    top_k: TOP_K = 0,
    seed: SAMPLING_SEED = None,
    threads: THREADS = None,
    json: JSON = False,
) -> None:
    """Talk with a model through its own chat template.

    Type a line and press Enter; /new starts over, Ctrl-D leaves, Ctrl-C stops an answer.

    Examples:

        qoq chat OUT

        qoq chat OUT --message "What is a hat?" --json

    --json (with --message) prints: messages (role, content; the answer last), finish_reason,
    prompt_tokens, tokens.
    """
    from qoq.engine.request import SamplingParams
    from qoq.errors import RequestError
    from qoq.llm import LLM

    if json and message is None:
        raise RequestError("--json answers one message: add --message TEXT.")
    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed
    )
    use_threads(threads)
    llm = LLM(model)
    first = [{"role": "system", "content": system}] if system else []
    if message is None:
        _converse(llm, params, first)
        return
    messages = [*first, {"role": "user", "content": message}]
    if not json:
        _answer(llm, params, messages)
        return
    output = llm.chat(messages, params)[0]
    emit(
        {
            "messages": [*messages, {"role": "assistant", "content": output.text}],
            "finish_reason": output.finish_reason,
            "prompt_tokens": len(output.prompt_token_ids),
            "tokens": len(output.token_ids),
        }
    )


def _converse(llm: "LLM", params: "SamplingParams", first: list[dict[str, str]]) -> None:
    """Line in, answer out, until the input ends."""
    from qoq.errors import RequestError

    llm.tokenizer.encode_chat([*first, {"role": "user", "content": "?"}])  # refuse before typing
    if sys.stdin.isatty():
        note("/new starts over, Ctrl-D leaves, Ctrl-C stops an answer.")
    messages = list(first)
    while True:
        try:
            said = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if not said:
            continue
        if said == "/new":
            messages = list(first)
            continue
        messages.append({"role": "user", "content": said})
        try:
            answer = _answer(llm, params, messages)
        except RequestError as error:  # most often: the conversation has outgrown the context
            messages.pop()
            note(f"{error} /new starts over.")
            continue
        messages.append({"role": "assistant", "content": answer})


def _answer(llm: "LLM", params: "SamplingParams", messages: list[dict[str, str]]) -> str:
    """Print an answer as it grows; an interrupt keeps what there is."""
    answer = ""
    try:
        for piece in llm.stream(llm.tokenizer.encode_chat(messages), params):
            print(piece, end="", flush=True)
            answer += piece
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
    print()
    return answer
