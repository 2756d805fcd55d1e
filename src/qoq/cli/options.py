"""Options that several verbs share, so that they are spelt and explained once."""

from typing import Annotated

import typer

JSON = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, no more.")]
CALIBRATION = Annotated[
    str,
    typer.Option(
        help="Text to calibrate on: a .txt, .txt.xz or .jsonl file, a hub dataset (needs the "
        "`datasets` package), or built-in (public-domain prose)."
    ),
]
SAMPLES = Annotated[int, typer.Option(help="Calibration samples.")]
SEED = Annotated[int, typer.Option(help="Chooses the samples; the same seed gives the same bytes.")]
