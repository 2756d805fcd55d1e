"""``qoq bench kernels``: ops against the machine's roof; what benches share."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from qoq.cli.options import JSON, THREADS, use_threads
from qoq.cli.terminal import bar, emit, note, verb

if TYPE_CHECKING:
    from qoq.formats.scheme import QuantScheme
    from qoq.kernels.device import Choice
    from qoq.models.decoder import Decoder

SHAPE = Annotated[
    str, typer.Option(help="Shapes of a real model, such as llama-3.2-1b or llama-3-8b.")
]
SCHEME = Annotated[str, typer.Option(help="w4a8kv4-g128, w4a8kv4, w8a8kv8, w4a8k8v4-g128, ...")]
LAYERS = Annotated[int | None, typer.Option(help="Only this many layers. Default: all.")]
MODEL = Annotated[
    str | None, typer.Option(help="Measure this checkpoint or folder, not random weights.")
]


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

        qoq bench kernels --shape llama-3-8b --rows 1,16,64

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


def measured(
    model: str | None,
    shape: str,
    scheme: str,
    layers: int | None,
    where: "Choice",
    *,
    backend: str = "auto",
    quiet: bool = False,
) -> tuple["Decoder", "QuantScheme", dict[str, str]]:
    """What a bench of whole models runs and its name: ``model``, or random weights of ``shape``."""
    from qoq.bench.random_weights import random_decoder
    from qoq.bench.shapes import config_of
    from qoq.errors import RequestError
    from qoq.formats.scheme import QuantScheme
    from qoq.models.load import load_model

    if model is not None:
        if layers is not None:
            raise RequestError("--layers is for random weights; --model is measured whole.")
        loaded = load_model(model, backend=backend, device=where.device)
        return loaded.decoder, loaded.scheme, {"model": model}
    parsed, config = QuantScheme.parse(scheme), config_of(shape, layers)
    if not quiet:
        note(f"making random weights: {shape}, {config.num_layers} layers, {parsed.name}")
    decoder = random_decoder(config, parsed, backend=backend, device=where.device)
    return decoder, parsed, {"shape": shape}


def check_context(decoder: "Decoder", prompt_len: int, output_len: int) -> None:
    """Raise RequestError where requests of this size do not fit the model."""
    from qoq.errors import RequestError

    context = decoder.config.max_positions
    if prompt_len + output_len > context:
        raise RequestError(
            f"{prompt_len} tokens in and {output_len} out are more than the model's context of "
            f"{context}; lower --prompt-len or --output-len."
        )


def headline(facts: dict[str, Any]) -> str:
    """What was measured, on what."""
    name = facts.get("model") or f"random weights of {facts['shape']}"
    layers = f"{facts['layers']} layer" + ("s" if facts["layers"] != 1 else "")
    return f"{name}, {layers}, {facts['scheme']}, {machine(facts)}"


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
