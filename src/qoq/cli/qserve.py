"""``qoq import-qserve`` and ``qoq export-qserve``: checkpoints of QServe and back."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from qoq.cli.options import CHECKPOINT, JSON, OVERWRITE
from qoq.cli.terminal import emit, note, verb


class ScaleOrder(StrEnum):
    """Orders in which group scales are found in the wild."""

    AUTO = "auto"
    KERNEL = "kernel"
    PAIRS = "pairs"


class FileFormat(StrEnum):
    """Files that QServe reads."""

    SAFETENSORS = "safetensors"
    BIN = "bin"


@verb()
def import_qserve(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="QServe/OmniServe checkpoint.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to make.")],
    kv: Annotated[
        int, typer.Option(help="Bits of the KV cache: 4, 8 or 16. QServe's files don't say.")
    ] = 4,
    config: Annotated[
        Path | None,
        typer.Option(help="Folder with config.json and tokenizer, if FOLDER has none."),
    ] = None,
    scale_order: Annotated[
        ScaleOrder, typer.Option(help="Order of group scales; auto finds out from the weights.")
    ] = ScaleOrder.AUTO,
    overwrite: OVERWRITE = False,
    json: JSON = False,
) -> None:
    """Convert a QServe checkpoint to a packed one; codes stay as they are.

    Pickles are read as plain tensors; nothing else in them ever runs.

    Example:

        qoq import-qserve Llama-3-8B-QServe-g128 -o llama3

    --json prints: out, scheme, scale_order (null without groups), notes.
    """
    from qoq.checkpoint.qserve import import_qserve as run
    from qoq.formats.scheme import KVFormat

    done = run(
        folder,
        out,
        kv=KVFormat(kv, kv),
        config_folder=config,
        scale_order=scale_order.value,
        overwrite=overwrite,
    )
    if json:
        answer = {"out": str(done.path), "scheme": done.scheme.name}
        emit({**answer, "scale_order": done.scale_order, "notes": list(done.notes)})
        return
    print(f"{done.path}: {done.scheme}")
    for text in done.notes:
        note(text)


@verb()
def export_qserve(
    checkpoint: CHECKPOINT,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to make.")],
    file_format: Annotated[
        FileFormat, typer.Option("--format", help="safetensors, or bin (torch pickles).")
    ] = FileFormat.SAFETENSORS,
    overwrite: OVERWRITE = False,
    json: JSON = False,
) -> None:
    """Write a packed checkpoint in QServe's layout.

    QServe has no key centering and no key rotation: quantize with
    `--without center-keys` for it.

    Example:

        qoq export-qserve OUT -o OUT-qserve

    --json prints: out, precision and group_size (options that QServe needs), warnings.
    """
    from qoq.checkpoint.qserve_export import export_qserve as run

    done = run(checkpoint, out, file_format=file_format.value, overwrite=overwrite)
    if json:
        answer = {"out": str(done.path), "precision": done.precision}
        emit({**answer, "group_size": done.group_size, "warnings": list(done.warnings)})
        return
    print(f"{done.path}: run QServe with --precision {done.precision} ", end="")
    print(f"--group-size {done.group_size}")
    for text in done.warnings:
        note(text)
