"""Options that several verbs share, so that they are spelt and explained once."""

import json
from typing import Annotated, Any

import typer

CHECKPOINT = Annotated[
    str, typer.Argument(metavar="MODEL", help="A packed checkpoint, as `qoq quantize` writes.")
]
ANY_MODEL = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="Packed checkpoint, or a full-precision folder or hub id."
    ),
]
THREADS = Annotated[
    int | None,
    typer.Option(help="Threads of the CPU kernels. Default: QOQ_NUM_THREADS, or all CPUs granted."),
]
DEVICE = Annotated[
    str,
    typer.Option(
        help="Where it runs: cpu, cuda, cuda:N or auto (a GPU that our kernels run on, if there is "
        "one)."
    ),
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
BASE_URL = Annotated[
    str, typer.Option("--base-url", "--url", help="A server's address, such as http://host:8000.")
]
SERVER = Annotated[
    str | None,
    typer.Option(
        "--base-url", "--url", help="Ask this OpenAI-compatible server; no model is loaded here."
    ),
]
API_KEY = Annotated[
    str | None,
    typer.Option(help="Key that the server wants.", envvar=["QOQ_API_KEY", "OPENAI_API_KEY"]),
]
OVERWRITE_FILE = Annotated[
    bool, typer.Option("--overwrite", help="Start afresh, whatever earlier runs have left.")
]
MAYBE_MODEL = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="Packed checkpoint, full-precision folder or hub id; with --base-url a model's name "
        "there.",
        show_default=False,
    ),
]
_DEFAULT = " Default: the server's; of a model loaded here that of its generation_config.json, or "
MAYBE_TEMPERATURE = Annotated[
    float | None, typer.Option("--temperature", "--temp", help=f"0: greedy.{_DEFAULT}0.")
]
MAYBE_TOP_P = Annotated[
    float | None,
    typer.Option(help=f"Choose among the likeliest tokens that add up to this.{_DEFAULT}1 (all)."),
]
MAYBE_TOP_K = Annotated[
    int | None, typer.Option(help=f"Choose among the k likeliest tokens.{_DEFAULT}0 (all).")
]


def mapping(value: str | dict[str, Any]) -> dict[str, Any]:
    """A JSON object from the command line; from a YAML file it is one already."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise typer.BadParameter(f"{value!r} is not JSON: {error}.") from None
    if not isinstance(found, dict):
        raise typer.BadParameter(f"{value!r} is no JSON object.")
    return found


SPECULATIVE_HELP = (
    "Guess tokens from what stands in the prompt and the text; no answer changes, repetitive ones "
    'come sooner: {"method": "ngram", "num_speculative_tokens": 4}.'
)
SPECULATIVE = Annotated[
    dict[str, Any] | None, typer.Option(parser=mapping, metavar="JSON", help=SPECULATIVE_HELP)
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
