"""``qoq generate``: text from a checkpoint, as it grows."""

import sys
import time
from typing import Annotated

import typer

from qoq.cli.options import (
    ANY_MODEL,
    DEVICE,
    JSON,
    MAX_TOKENS,
    SAMPLING_SEED,
    SPECULATIVE,
    TEMPERATURE,
    THREADS,
    TOP_K,
    TOP_P,
    use_threads,
)
from qoq.cli.terminal import emit, verb


@verb()
def generate(
    model: ANY_MODEL,
    prompt: Annotated[str, typer.Option(help="Text to continue; - reads it from stdin.")],
    max_tokens: MAX_TOKENS = 128,
    temperature: TEMPERATURE = 0.0,
    top_p: TOP_P = 1.0,
    top_k: TOP_K = 0,
    seed: SAMPLING_SEED = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this string (repeatable).")
    ] = None,
    speculative_config: SPECULATIVE = None,
    device: DEVICE = "auto",
    threads: THREADS = None,
    json: JSON = False,
) -> None:
    """Continue a prompt; text appears as it is made.

    Example:

        qoq generate OUT --prompt "It was a dark and" --max-tokens 64 --temperature 0.8 --seed 1

    --json prints: prompt, text, token_ids, logprobs (under the model, before temperature),
    finish_reason (stop or length), prompt_tokens, tokens, seconds.
    """
    from qoq.engine.request import SamplingParams
    from qoq.llm import LLM

    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop=tuple(stop or ()),
    )
    if prompt == "-":
        prompt = sys.stdin.read()
    use_threads(threads)
    llm = LLM(model, speculative_config=speculative_config, device=device)
    if not json:
        pieces = llm.stream(prompt, params)  # a prompt that cannot be run is refused here
        print(prompt, end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
        return
    start = time.monotonic()
    output = llm.generate(prompt, params, use_tqdm=False)[0]
    emit(
        {
            "prompt": prompt,
            "text": output.text,
            "token_ids": output.token_ids,
            "logprobs": output.logprobs,
            "finish_reason": output.finish_reason,
            "prompt_tokens": len(output.prompt_token_ids),
            "tokens": len(output.token_ids),
            "seconds": round(time.monotonic() - start, 3),
        }
    )
