"""``qoq bench engine`` and ``invariance``: what a step costs; that company changes nothing."""

from typing import Annotated

import typer

from qoq.cli.bench import numbers, origin
from qoq.cli.options import CHECKPOINT, DEVICE, JSON
from qoq.cli.terminal import bar, emit, verb


@verb()
def engine(
    running: Annotated[str, typer.Option(help="Requests that generate, with commas.")] = "1,8,64",
    waiting: Annotated[
        int, typer.Option(help="Requests in line, in a second row for each of these.")
    ] = 10_000,
    steps: Annotated[int, typer.Option(help="Steps to time in each row.")] = 300,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="A model's folder: make every new token text with its tokenizer."),
    ] = None,
    json: JSON = False,
) -> None:
    """Time a step without its kernels: a null model answers, all the rest is real.

        qoq bench engine --running 64 --waiting 1000 --tokenizer OUT

    --json prints: rows (each with running, waiting, median_ms, p99_ms), steps, tokenizer, command,
    commit, hardware.
    """
    from qoq.bench.engine import step_time
    from qoq.errors import RequestError
    from qoq.tokenizer import Tokenizer

    if steps < 1 or waiting < 0:
        raise RequestError("--steps must be 1 or more and --waiting 0 or more.")
    sizes = numbers(running, "--running")
    text = None if tokenizer is None else Tokenizer.load(tokenizer)
    pairs = [(size, line) for size in sizes for line in dict.fromkeys((0, waiting))]
    rows = []
    with bar("steps", quiet=json) as progress:
        for size, line in pairs:
            rows.append(step_time(size, line, steps=steps, tokenizer=text))
            progress(len(rows), len(pairs), f"{size} running")
    if json:
        listed = [row.to_dict() for row in rows]
        emit({"rows": listed, "steps": steps, "tokenizer": tokenizer, **origin()})
        return
    print("running  waiting  median ms     p99 ms")
    for row in rows:
        print(f"{row.running:7} {row.waiting:8} {row.median_ms:10.3f} {row.p99_ms:10.3f}")


@verb()
def invariance(
    checkpoint: CHECKPOINT,
    backend: Annotated[
        str, typer.Option(help="cpu, oracle or gpu; several with commas.")
    ] = "cpu,oracle",
    batches: Annotated[str, typer.Option(help="Batch sizes, with commas.")] = "2,3,8,17,64",
    chunks: Annotated[
        str, typer.Option(help="Prompt tokens a step reads, with commas.")
    ] = "2,16,33,100,257",
    seed: Annotated[int, typer.Option(help="Chooses prompts, neighbours and places.")] = 0,
    device: DEVICE = "auto",
    json: JSON = False,
) -> None:
    """Check that a request's tokens and log-probabilities do not depend on what runs beside it.

    The same requests run alone, in batches with random neighbours, in chunks, with a warm prefix
    cache, thrown out and read again, and with guessed tokens to verify; all must be equal to the
    bit. Status 1 if any differs.

        qoq bench invariance OUT --batches 2,64 --chunks 16,100

    --json prints: comparisons, mismatches, trials (each with backend, name, comparisons,
    mismatches, cached_tokens, preemptions, draft_tokens, accepted_tokens), scheme, seed, command,
    commit, hardware.
    """
    from qoq.bench.invariance import Invariance
    from qoq.kernels.device import choose_device
    from qoq.models.load import load_model

    sizes, pieces = numbers(batches, "--batches"), numbers(chunks, "--chunks")
    trials = []
    scheme = ""
    with bar("trials", quiet=json) as progress:
        names = [name.strip() for name in backend.split(",")]
        total = len(names) * (len(sizes) + len(pieces) + 4)
        for name in names:
            where = choose_device(device, name).device
            model = load_model(checkpoint, backend=name, device=where)
            scheme = model.scheme.name
            tried = Invariance(model.decoder, model.scheme.kv, backend=name, seed=seed)
            for trial in tried.trials(sizes, pieces):
                trials.append({"backend": name, **trial.to_dict()})
                progress(len(trials), total, f"{name}: {trial.name}")
    facts = {
        "comparisons": sum(row["comparisons"] for row in trials),
        "mismatches": sum(row["mismatches"] for row in trials),
        "trials": trials,
        "scheme": scheme,
        "seed": seed,
        **origin(),
    }
    if json:
        emit(facts)
    else:
        for row in trials:
            print(
                f"{row['backend']:7} {row['name']:28} {row['comparisons']:4} compared, "
                f"{row['mismatches']} differ"
            )
        print(f"{scheme}: {facts['comparisons']} compared, {facts['mismatches']} differ")
    if facts["mismatches"]:
        raise typer.Exit(1)
