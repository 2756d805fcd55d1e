"""``qoq bench throughput``: whole models in tokens per second, without a server."""

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
    need_kernels,
    origin,
    what_runs,
)
from qoq.cli.options import DEVICE, JSON, THREADS, use_threads
from qoq.cli.terminal import bar, emit, verb


@verb()
def throughput(
    model: MODEL = None,
    shape: SHAPE = "llama-3.2-1b",
    scheme: SCHEME = "w4a8kv4-g128",
    layers: LAYERS = None,
    prompt_len: Annotated[int, typer.Option(help="Prompt tokens of each request.")] = 1024,
    output_len: Annotated[int, typer.Option(help="New tokens of each request.")] = 512,
    batch: Annotated[
        int | None,
        typer.Option(help="Requests at once. Default: 1, 2, 4, ... until throughput peaks."),
    ] = None,
    most: Annotated[int, typer.Option(help="Largest batch to try.")] = 256,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Accepted for clarity: weights are random.")
    ] = True,
    ablate: Annotated[
        str | None,
        typer.Option(
            help="Measure without a part of the system. linear: every linear, lm_head too, takes "
            "float rows, dequantizes its packed weight to bf16 in each call and leaves the product "
            "to torch in bf16. (The other half is the KV cache: w4a8-g128 has one of bf16.)"
        ),
    ] = None,
    device: DEVICE = "auto",
    threads: THREADS = None,
    json: JSON = False,
) -> None:
    """Tokens per second of a whole model through the engine, without a server.

    Weights are random with the shapes of a real model, or those of --model. The paper's protocol by
    default: 1024 tokens in, 512 out, the batch grown until throughput peaks ("maximum achievable
    throughput").

        qoq bench throughput --model OUT --prompt-len 256 --output-len 64

        qoq bench throughput --shape llama-3.2-1b --prompt-len 256 --output-len 32 --batch 32

        qoq bench throughput --prompt-len 256 --output-len 32 --batch 32 --ablate linear

    --json prints the best run: prefill_tok_s, decode_tok_s, output_tok_s, total_tok_s, batch,
    prompt_len, output_len, seconds, kv_cache_bytes, and device, isa, threads (of the CPU kernels),
    peak_rss_bytes, model or shape, scheme, layers, ablate, runs (every batch), command, commit,
    hardware.
    """
    import torch

    from qoq.bench.ablation import dequantize_linears
    from qoq.bench.throughput import Throughput, grow, peak_rss_bytes, run
    from qoq.errors import RequestError
    from qoq.kernels.device import choose_device

    if ablate not in (None, "linear"):
        raise RequestError(f"--ablate takes linear, not {ablate!r}.")
    if prompt_len < 1 or output_len < 2 or (batch is not None and batch < 1):
        raise RequestError("prompt-len and batch must be 1 or more, output-len 2 or more.")
    where = choose_device(device)
    on_cpu = where.device.type == "cpu"
    if on_cpu:
        need_kernels()
    use_threads(threads)
    runs_on = what_runs(where)
    kind = "oracle" if ablate else "auto"
    decoder, parsed, what = measured(model, shape, scheme, layers, where, backend=kind, quiet=json)
    check_context(decoder, prompt_len, output_len)
    if ablate:
        if on_cpu:
            torch.set_num_threads(runs_on["threads"])
        decoder = dequantize_linears(decoder)
    with bar("generating", quiet=json) as progress:

        def measure(size: int) -> Throughput:
            def step(done: int, total: int) -> None:
                progress(done, total, f"batch {size}")

            return run(
                decoder,
                parsed.kv,
                batch=size,
                prompt_len=prompt_len,
                output_len=output_len,
                warm_up=not on_cpu,
                step=step,
            )

        runs = [measure(batch)] if batch is not None else list(grow(measure, most))
    best = max(runs, key=lambda result: result.output_tok_s)
    facts = {
        **what,
        "scheme": parsed.name,
        "ablate": ablate,
        "layers": decoder.config.num_layers,
        **best.to_dict(),
        **runs_on,
        "peak_rss_bytes": peak_rss_bytes(),
        "runs": [result.to_dict() for result in runs],
        **origin(),
    }
    if json:
        emit(facts)
        return
    without = f" without our {ablate}" if ablate else ""
    print(f"{headline(facts)}{without}")
    print("batch   prefill    decode    output     total  (tokens a second)")
    for result in runs:
        print(
            f"{result.batch:5} {result.prefill_tok_s:9.1f} {result.decode_tok_s:9.1f} "
            f"{result.output_tok_s:9.1f} {result.total_tok_s:9.1f}"
        )
