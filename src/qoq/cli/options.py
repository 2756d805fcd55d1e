"""Options that several verbs share, so that they are spelt and explained once."""

from typing import Annotated

import typer

CHECKPOINT = Annotated[str, typer.Argument(help="A packed checkpoint, as `qoq quantize` writes.")]
ANY_MODEL = Annotated[
    str, typer.Argument(help="Packed checkpoint, or a full-precision folder or hub id.")
]
THREADS = Annotated[
    int | None,
    typer.Option(help="Threads of the CPU kernels. Default: QOQ_NUM_THREADS, or all CPUs granted."),
]
JSON = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, no more.")]
CALIBRATION = Annotated[
    str,
    typer.Option(
        help="Text to calibrate on: a .txt, .txt.xz or .jsonl file, a hub dataset (needs the "
        "`datasets` package), or built-in (public-domain prose)."
    ),
]
SEED = Annotated[int, typer.Option(help="Chooses the samples; the same seed gives the same bytes.")]
OVERWRITE = Annotated[bool, typer.Option("--overwrite", help="Replace the output folder.")]
MAX_TOKENS = Annotated[int, typer.Option(help="New tokens at most.")]
TEMPERATURE = Annotated[float, typer.Option(help="0 takes the likeliest token.")]
TOP_P = Annotated[
    float, typer.Option(help="Choose among the likeliest tokens that add up to this; 1: all.")
]
TOP_K = Annotated[int, typer.Option(help="Choose among the k likeliest tokens; 0: all.")]
SAMPLING_SEED = Annotated[
    int | None, typer.Option("--seed", help="The same seed gives the same text. Default: random.")
]


def use_threads(threads: int | None) -> None:
    """Run the CPU kernels on this many threads, if a number is given.

    Raises BackendUnavailable for a number below 1.
    """
    if threads is None:
        return
    from qoq.errors import BackendUnavailable
    from qoq.kernels.cpu.backend import set_threads

    if threads < 1:
        raise BackendUnavailable(f"--threads takes a number from 1 on, not {threads}.")
    set_threads(threads)
