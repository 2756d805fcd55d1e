"""The command line: one module per verb, in the order a reader meets them."""

from typing import Annotated

import typer

from qoq import __version__
from qoq.cli.bench import kernels
from qoq.cli.bench_crossover import crossover
from qoq.cli.bench_engine import engine, invariance
from qoq.cli.bench_latency import latency
from qoq.cli.bench_serve import serve as bench_serve
from qoq.cli.bench_throughput import throughput
from qoq.cli.chat import chat
from qoq.cli.check_env import check_env
from qoq.cli.complete import complete
from qoq.cli.eval_lm import lm
from qoq.cli.eval_ppl import ppl
from qoq.cli.eval_table import render, table
from qoq.cli.generate import generate
from qoq.cli.gpu_check import gpu_check
from qoq.cli.inspect import inspect
from qoq.cli.qserve import export_qserve, import_qserve
from qoq.cli.quantize import quantize
from qoq.cli.run_batch import run_batch
from qoq.cli.serve import serve
from qoq.cli.serve_command import ServeCommand, dashes

app = typer.Typer(
    name="qoq",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={
        "help_option_names": ["-h", "--help"],
        # --max_tokens is --max-tokens, as users of other engines spell it
        "token_normalize_func": lambda word: word.replace("_", "-"),
    },
)
evaluation = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")
benches = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")


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

        qoq serve OUT

    MODEL is a folder or a hub id. `qoq VERB --help` explains each verb; --json gives one JSON
    object on stdout, with everything else on stderr. Errors are one sentence and status 1.
    """


app.command()(quantize)
app.add_typer(evaluation, name="eval", help="Measure accuracy: perplexity, KL, benchmark tasks.")
evaluation.command()(ppl)
evaluation.command()(lm)
evaluation.command()(table)
evaluation.command()(render)
app.add_typer(benches, name="bench", help="Measure speed: kernels, whole models, servers.")
benches.command()(kernels)
benches.command()(throughput)
benches.command()(latency)
benches.command("serve")(bench_serve)
benches.command()(crossover)
benches.command()(engine)
benches.command()(invariance)
app.command()(inspect)
app.command()(generate)
app.command()(chat)
app.command(cls=ServeCommand, context_settings={"token_normalize_func": dashes})(serve)
app.command()(complete)
app.command("run-batch")(run_batch)
app.command("import-qserve")(import_qserve)
app.command("export-qserve")(export_qserve)
app.command("check-env")(check_env)
app.command("gpu-check")(gpu_check)
