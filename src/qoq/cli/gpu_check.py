"""``qoq gpu-check``: is all well on this GPU, and how fast is it?"""

import json as jsonlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from qoq.cli.options import JSON
from qoq.cli.terminal import emit, fail, note, verb


@verb("What was measured is in the file; --resume goes on from there.")
def gpu_check(
    only: Annotated[
        str | None,
        typer.Option(
            help="Parts, with commas: env, ceilings, subnormal, tests, bits, gemm, attention, "
            "rows, model. Default: all."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="File of results, written after every part.")] = Path(
        "gpu-check.json"
    ),
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Keep what the file has of other parts."),
    ] = False,
    minutes: Annotated[float, typer.Option(help="Time for everything.")] = 8.0,
    json: JSON = False,
) -> None:
    """Check and measure everything there is for GPUs, on the first one, in one go.

    env: what this is. ceilings: memory and products at their best. subnormal: a property of tensor
    cores that attention rests on. tests: every kernel against its oracle. bits: sums equal to the
    bit. gemm, attention, rows: speed beside torch's and the floor. model: greedy tokens of the
    bundled model on every backend, and tokens per second. Status 1 if anything is wrong.

        qoq gpu-check

        qoq gpu-check --only gemm,attention --resume

    --json prints what the file holds: parts (each with status, seconds, rows), command, commit,
    hardware.
    """
    from qoq.bench.gpu import check
    from qoq.errors import BackendUnavailable
    from qoq.evaluate.provenance import provenance
    from qoq.kernels.gpu.backend import missing

    reason = _no_gpu() or missing()
    if reason is not None:
        raise BackendUnavailable(f"There is nothing to check: {reason}.")
    results: dict[str, Any] = _earlier(out) if resume else {}
    facts = {"parts": results, **provenance(sys.argv[1:])}

    def save() -> None:
        partial = out.with_name(out.name + ".partial")
        partial.write_text(jsonlib.dumps(facts, indent=1) + "\n", encoding="utf-8")
        partial.replace(out)

    parts = check.chosen(only, results)
    check.run(parts, results, save, (lambda _: None) if json else note, seconds=60 * minutes)
    if json:
        emit(facts)
    else:
        print("\n".join(check.lines(results)))
        print(f"all of it is in {out}")
    wrong = check.failures(results)
    if wrong:
        fail(f"not all is well: {', '.join(wrong)}.")


def _no_gpu() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "torch sees no CUDA GPU on this machine"


def _earlier(file: Path) -> dict[str, Any]:
    from qoq.errors import RequestError

    if not file.is_file():
        return {}
    try:
        parts = jsonlib.loads(file.read_text(encoding="utf-8"))["parts"]
    except (ValueError, KeyError, TypeError):
        raise RequestError(f"{file} is no file of results; name another with --out.") from None
    return dict(parts)
