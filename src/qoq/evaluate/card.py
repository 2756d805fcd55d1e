"""The model card of a checkpoint that was just made and judged."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qoq.checkpoint.card import AccuracyRow, model_card

_LICENSE = re.compile(r"^license:\s*([\w.-]+)\s*$", re.MULTILINE)


def accuracy_rows(
    scheme: str, accuracy: Mapping[str, Any] | None
) -> tuple[list[AccuracyRow], str | None]:
    """Rows, and what they were measured on, from ``accuracy`` as ``qoq quantize --json`` has it."""
    if not accuracy:
        return [], None
    rows = []
    if accuracy["source_perplexity"] is not None:
        rows.append(AccuracyRow("full precision", accuracy["source_perplexity"]))
    figures = [accuracy[n] for n in ("perplexity", "kl_mean", "kl_p99", "top1_agreement")]
    rows.append(AccuracyRow(scheme, *figures))
    size = f"{accuracy['windows']} windows of {accuracy['seq_len']} tokens"
    return rows, f"{size} of {accuracy['text']}"


def card(
    title: str,
    manifest: Mapping[str, Any],
    accuracy: Mapping[str, Any] | None,
    *,
    source: Path,
    hub_id: str | None = None,
    notes: tuple[str, ...] = (),
) -> str:
    """README.md of a checkpoint whose quantization_config is ``manifest``.

    The licence is the one that the card in the ``source`` folder names, if any.
    """
    rows, measured_on = accuracy_rows(str(manifest["scheme"]), accuracy)
    return model_card(
        title,
        manifest,
        rows,
        base_model=hub_id,
        license=_license(source),
        measured_on=measured_on,
        notes=notes,
    )


def _license(source: Path) -> str | None:
    try:
        text = (source / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    front = text.split("---")[1] if text.startswith("---") else ""
    found = _LICENSE.search(front)
    return found[1] if found else None
