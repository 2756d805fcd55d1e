"""The README beside a checkpoint: what it is, how it was made, how much it lost."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class AccuracyRow:
    """One row of the accuracy table; None prints as a dash.

    kl_mean and kl_p99 are nats per token from full precision, top1_agreement is a share of 1.
    """

    name: str
    perplexity: float | None = None
    kl_mean: float | None = None
    kl_p99: float | None = None
    top1_agreement: float | None = None


def model_card(
    title: str,
    manifest: Mapping[str, Any],
    rows: Sequence[AccuracyRow] = (),
    *,
    base_model: str | None = None,
    license: str | None = None,
    measured_on: str | None = None,
    command: str | None = None,
    notes: Sequence[str] = (),
) -> str:
    """Markdown with the front matter that model hubs read.

    ``manifest`` is the checkpoint's quantization_config; ``measured_on`` says which text and
    window the table is about, ``command`` how to repeat it. Equal arguments give equal text.
    """
    front: dict[str, Any] = {"license": license, "base_model": base_model}
    lines = ["---"]
    lines += [f"{key}: {json.dumps(value)}" for key, value in front.items() if value]
    lines += ["library_name: qoq", "tags:", "- quantized", f"- {_plain(manifest['scheme'])}", "---"]
    lines += ["", f"# {_plain(title)}", ""]
    made = f"Quantized to **{_plain(manifest['scheme'])}** with the QoQ algorithm by `qoq`"
    made += f" {_plain(manifest['qoq_version'])}" if manifest.get("qoq_version") else ""
    made += f", from {_plain(base_model)}." if base_model else "."
    use = ["qoq serve .", "qoq generate . --prompt 'Once upon a time'"]
    lines += [made, "", "```sh", *use, "```", ""]
    if rows:
        lines += ["## Accuracy", ""]
        if measured_on:
            lines += [f"Measured on {_plain(measured_on)}. KL is in nats per token.", ""]
        lines += table(rows)
        lines.append("")
        if command:
            lines += ["```sh", command.replace("```", ""), "```", ""]
    lines += ["## How it was made", ""]
    lines += [
        "| | |",
        "|---|---|",
        *(f"| {_cell(key)} | {_cell(value)} |" for key, value in _facts(manifest)),
        "",
    ]
    if notes:
        lines += [*(f"- {_plain(note)}" for note in notes), ""]
    return "\n".join(lines)


def table(rows: Sequence[AccuracyRow]) -> list[str]:
    """The accuracy table's Markdown lines."""

    def number(value: float | None, spec: str) -> str:
        return "-" if value is None else format(value, spec)

    lines = [
        "| | perplexity | mean KL | 99th percentile of KL | same top token |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = (
            _cell(row.name),
            number(row.perplexity, ".4f"),
            number(row.kl_mean, ".5f"),
            number(row.kl_p99, ".4f"),
            number(row.top1_agreement, ".2%"),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _facts(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The manifest as rows of text, nested objects flattened with dots."""
    facts: list[tuple[str, str]] = []

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key in sorted(value):
                walk(f"{prefix}.{key}" if prefix else str(key), value[key])
        elif value is not None:
            facts.append((prefix, value if isinstance(value, str) else json.dumps(value)))

    walk("", {k: v for k, v in manifest.items() if k not in ("quant_method", "qoq_version")})
    return facts


def _plain(text: object) -> str:
    """One line of text."""
    return " ".join(str(text).split())


def _cell(text: object) -> str:
    """One line that cannot end a table cell."""
    return _plain(text).replace("\\", "\\\\").replace("|", "\\|")
