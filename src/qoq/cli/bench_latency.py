"""``qoq bench latency``: how long one batch waits for its tokens, without a server."""

from typing import Annotated

import typer

from qoq.cli.bench import (
    LAYERS,
    MODEL,
    SCHEME,
    SHAPE,
    check_context,
    headline,
    measured,
    origin,
    what_runs,
)
from qoq.cli.options import DEVICE, JSON, THREADS, use_threads
from qoq.cli.terminal import bar, emit, verb


@verb()
def latency(
    model: MODEL = None,
    shape: SHAPE = "llama-3.2-1b",
    scheme: SCHEME = "w4a8kv4-g128",
    layers: LAYERS = None,
    prompt_len: Annotated[
        int, typer.Option("--prompt-len", "--input-len", help="Prompt tokens of each request.")
    ] = 32,
    output_len: Annotated[int, typer.Option(help="New tokens of each request.")] = 128,
    batch: Annotated[int, typer.Option("--batch", "--batch-size", help="Requests at once.")] = 1,
    num_iters: Annotated[int, typer.Option(help="Runs to time.")] = 5,
    num_iters_warmup: Annotated[int, typer.Option(help="Runs ahead of those.")] = 1,
    device: DEVICE = "auto",
    threads: THREADS = None,
    json: JSON = False,
) -> None:
    """Time to first token and of every step after it, for one batch through the engine.

    Weights are random with the shapes of a real model, or those of --model.

        qoq bench latency --shape llama-3.2-1b --prompt-len 512 --output-len 64 --batch 8

    --json prints: batch, prompt_len, output_len, iterations, ttft_ms, step_ms and e2el_ms (each
    with mean, p50, p90, p99, max), model or shape, scheme, layers, device, isa, threads, command,
    commit, hardware.
    """
    from qoq.bench.latency import run
    from qoq.errors import RequestError
    from qoq.kernels.device import choose_device

    if min(prompt_len, batch, num_iters) < 1 or output_len < 2 or num_iters_warmup < 0:
        raise RequestError("prompt-len, batch and num-iters must be 1 or more, output-len 2.")
    use_threads(threads)
    where = choose_device(device)
    decoder, parsed, what = measured(model, shape, scheme, layers, where, quiet=json)
    check_context(decoder, prompt_len, output_len)
    with bar("runs", quiet=json) as progress:
        result = run(
            decoder,
            parsed.kv,
            batch=batch,
            prompt_len=prompt_len,
            output_len=output_len,
            iterations=num_iters,
            warmups=num_iters_warmup,
            done=progress,
        )
    facts = {
        **what,
        "scheme": parsed.name,
        "layers": decoder.config.num_layers,
        **result.to_dict(),
        **what_runs(where),
        **origin(),
    }
    if json:
        emit(facts)
        return
    print(f"{headline(facts)}: {batch} x ({prompt_len} in, {output_len} out)")
    print(f"{'ms':14}{'mean':>10}{'p50':>10}{'p90':>10}{'p99':>10}{'max':>10}")
    for name, key in (("first token", "ttft_ms"), ("step", "step_ms"), ("whole", "e2el_ms")):
        print(f"{name:14}" + "".join(f"{value:10.2f}" for value in facts[key].values()))
