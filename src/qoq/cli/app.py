"""The command line: one module per verb, in the order a reader meets them."""

from typing import Annotated

import typer

from qoq import __version__
from qoq.cli import eval as evaluation

app = typer.Typer(
    name="qoq",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"qoq {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it and exit.")
    ] = False,
) -> None:
    """Quantize Hugging Face models to W4A8KV4 with QoQ, measure them, run them.

    The usual way:

      qoq quantize MODEL -o OUT

      qoq eval ppl OUT --reference MODEL

      qoq generate OUT --prompt "Once upon a time"

    MODEL is a folder or a hub id. `qoq VERB --help` explains each verb; --json gives one JSON
    object on stdout, with everything else on stderr.
    """


app.add_typer(evaluation.app, name="eval")
