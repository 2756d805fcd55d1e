"""``qoq bench``: kernels against the machine's roof, whole models in tokens per second."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from qoq.cli.options import DEVICE, JSON, THREADS, use_threads
from qoq.cli.terminal import bar, emit, note, verb

if TYPE_CHECKING:
    from qoq.kernels.device import Choice

SHAPE = Annotated[
    str, typer.Option(help="Shapes of a real model, such as llama-3.2-1b or llama-3-8b.")
]
SCHEME = Annotated[str, typer.Option(help="w4a8kv4-g128, w4a8kv4, w8a8kv8, w4a8k8v4-g128, ...")]
LAYERS = Annotated[int | None, typer.Option(help="Only this many layers. Default: all.")]


@verb()
def kernels(
    shape: SHAPE = "llama-3.2-1b",
    scheme: SCHEME = "w4a8kv4-g128",
    rows: Annotated[str, typer.Option(help="Numbers of rows M, with commas.")] = "1,8,32,128,512",
    batches: Annotated[
        str, typer.Option(help="Sequences that decode at once, with commas.")
    ] = "1,8,32",
    contexts: Annotated[
        str, typer.Option(help="Context lengths, with commas.")
    ] = "512,1024,2048,4096,8192",
    chunks: Annotated[
        str, typer.Option(help="Prompt tokens read at once, with commas.")
    ] = "512,2048",
    threads: THREADS = None,
    json: JSON = False,
) -> None:
    """Time every op at a model's shapes against the least time the machine allows.

    The roof is measured first: int8 products a second in registers, bytes a second read from
    memory. `fraction` is the share of it that a kernel reaches.

    Attention is timed over the scheme's KV cache, KV8 and bf16 in turn: `attention` with one new
    token for each of M sequences, `attention_prefill` with M tokens at a prompt's end, beside
    torch's scaled_dot_product_attention over dense bf16 keys and values.

    --json prints: shape, scheme, isa, threads, int8_peak_ops, read_bandwidth, rows (each with op,
    shape, M, seconds, roof_seconds, fraction), command, commit, hardware.
    """
    from qoq.bench.attention import COMPARED, decode_rows, prefill_cases, prefill_rows
    from qoq.bench.kernels import Row, linear_rows, row_rows
    from qoq.bench.roof import measure_roof
    from qoq.bench.shapes import config_of
    from qoq.formats.scheme import QuantScheme

    need_kernels()
    use_threads(threads)
    config, parsed = config_of(shape, 1), QuantScheme.parse(scheme)
    sizes, lengths = numbers(rows, "--rows"), numbers(contexts, "--contexts")
    together, pieces = numbers(batches, "--batches"), numbers(chunks, "--chunks")
    formats = list(dict.fromkeys((parsed.kv, *COMPARED[1:])))
    if not json:
        note("measuring the roof: int8 products and memory reads")
    roof = measure_roof()
    results: list[Row] = []
    with bar("kernels", quiet=json) as progress:
        total = len(sizes) * 6 + len(lengths) * len(together) * len(formats)
        total += prefill_cases(pieces, lengths) * (len(formats) + 1)
        for part in (
            linear_rows(config, parsed.weight, sizes, roof),
            decode_rows(config, formats, together, lengths, roof),
            prefill_rows(config, formats, pieces, lengths, roof),
            row_rows(config, sizes, roof),
        ):
            for row in part:
                results.append(row)
                progress(len(results), total, f"{row.op} {row.shape}, M {row.M}")
    facts = {
        "shape": shape,
        "scheme": parsed.name,
        **what_runs(),
        "int8_peak_ops": roof.int8_peak_ops,
        "read_bandwidth": roof.read_bandwidth,
        "rows": [row.to_dict() for row in results],
        **origin(),
    }
    if json:
        emit(facts)
        return
    print(
        f"{facts['isa']}, {facts['threads']} threads: int8 {roof.int8_peak_ops / 1e12:.2f} TOPS, "
        f"reads {roof.read_bandwidth / 1e9:.1f} GB/s"
    )
    for row in results:
        print(
            f"{row.op:15} {row.shape:44} M {row.M:5} {row.seconds * 1e3:9.3f} ms "
            f"{100 * row.fraction:5.1f}% of the roof"
        )


@verb()
def throughput(
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
    """Tokens per second of a whole model with random weights of real shapes, through the engine.

    The paper's protocol by default: 1024 tokens in, 512 out, the batch grown until throughput peaks
    ("maximum achievable throughput").

        qoq bench throughput --shape llama-3.2-1b --prompt-len 256 --output-len 32 --batch 32

        qoq bench throughput --prompt-len 256 --output-len 32 --batch 32 --ablate linear

    --json prints the best run: prefill_tok_s, decode_tok_s, output_tok_s, total_tok_s, batch,
    prompt_len, output_len, seconds, kv_cache_bytes, and device, isa, threads (of the CPU kernels),
    peak_rss_bytes, shape, scheme, ablate, runs (every batch), command, commit, hardware.
    """
    import torch

    from qoq.bench.ablation import dequantize_linears
    from qoq.bench.random_weights import random_decoder
    from qoq.bench.shapes import config_of
    from qoq.bench.throughput import Throughput, grow, peak_rss_bytes, run
    from qoq.errors import RequestError
    from qoq.formats.scheme import QuantScheme
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
    config, parsed = config_of(shape, layers), QuantScheme.parse(scheme)
    if not json:
        note(f"making random weights: {shape}, {config.num_layers} layers, {parsed.name}")
    backend = "oracle" if ablate else "auto"
    decoder = random_decoder(config, parsed, backend=backend, device=where.device)
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
        "shape": shape,
        "scheme": parsed.name,
        "ablate": ablate,
        "layers": config.num_layers,
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
    print(f"{shape}, {parsed.name}{without}, {machine(facts)}")
    print("batch   prefill    decode    output     total  (tokens a second)")
    for result in runs:
        print(
            f"{result.batch:5} {result.prefill_tok_s:9.1f} {result.decode_tok_s:9.1f} "
            f"{result.output_tok_s:9.1f} {result.total_tok_s:9.1f}"
        )


def need_kernels() -> None:
    """Raise BackendUnavailable where there is nothing to measure."""
    from qoq.errors import BackendUnavailable
    from qoq.kernels.cpu import backend

    reason = backend.missing()
    if reason is not None:
        raise BackendUnavailable(f"The benches measure the CPU kernels, but {reason}.")


def numbers(text: str, option: str) -> list[int]:
    """Positive integers from a list with commas. Raises RequestError that names the option."""
    from qoq.errors import RequestError

    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise RequestError(f"{option} takes positive numbers with commas, such as 1,8,32.")
    return [int(part) for part in parts]


def what_runs(where: "Choice | None" = None) -> dict[str, Any]:
    """The device (None: the CPU), and the instruction set and threads of kernels on the CPU."""
    from qoq.kernels.cpu.backend import backend

    if where is not None and where.device.type != "cpu":
        return {"device": str(where), "isa": None, "threads": None}
    return {"device": "cpu", "isa": backend().isa, "threads": backend().threads}


def machine(facts: dict[str, Any]) -> str:
    """What ``what_runs`` says, for people."""
    on_cpu = facts["isa"] is not None
    return f"{facts['isa']}, {facts['threads']} threads" if on_cpu else str(facts["device"])


def origin() -> dict[str, Any]:
    """Command, commit, date and hardware of this run."""
    import sys

    from qoq.evaluate.provenance import provenance

    return provenance(sys.argv[1:])
