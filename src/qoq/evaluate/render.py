"""Saved measurements as markdown, and documents that hold it between markers.

A document marks a place with ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``, where NAME is one
of ``section_names``; what stands between is replaced, so tables in documents are never typed.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from qoq.errors import TextError

FIGURES = ("perplexity", "kl_mean", "kl_p99", "top1_agreement")
HEADS = ("ppl", "KL mean x1e-3", "KL 99 %", "top-1")


def cells(result: Mapping[str, Any]) -> list[str]:
    """One text's figures as they are shown; a dash where there is none."""
    perplexity, kl_mean, kl_p99, top1 = (result.get(name) for name in FIGURES)
    return [
        "inf" if perplexity is None else f"{perplexity:.3f}",
        "-" if kl_mean is None else f"{kl_mean * 1e3:.3f}",
        "-" if kl_p99 is None else f"{kl_p99:.4f}",
        "-" if top1 is None else f"{top1:.2%}",
    ]


def header(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Column titles: the label's (empty), then the figures of each text."""
    return ["", *(f"{text}: {head}" for text in rows[0]["results"] for head in HEADS)]


def line(row: Mapping[str, Any]) -> list[str]:
    """A row's cells, its label first."""
    return [row["label"], *(cell for result in row["results"].values() for cell in cells(result))]


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of rows as a measurement's JSON holds them."""
    if not rows:
        return ""
    return grid(header(rows), [line(row) for row in rows])


def grid(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A markdown table of cells, every column but the first aligned to the right."""
    parts = [heads, ["---", *["---:"] * (len(heads) - 1)], *lines]
    return "\n".join(f"| {' | '.join(part)} |" for part in parts)


def sections(measured: Mapping[str, Any]) -> dict[str, str]:
    """Marker name -> markdown: every table, ``summary`` (the accuracy table without the ablation's
    steps) and ``provenance``.
    """
    tables: Mapping[str, Any] = measured["tables"]
    out = {name: markdown(rows) for name, rows in tables.items()}
    if "accuracy" in tables:
        out["summary"] = markdown([row for row in tables["accuracy"] if not row["step"]])
    out["provenance"] = about(measured)
    return out


def about(measured: Mapping[str, Any]) -> str:
    """How the figures were made, and how to make them again."""
    calibration, machine = measured["calibration"], measured["hardware"]
    texts = "; ".join(
        f"{text['name']}: {text['windows']} windows of {text['seq_len']} tokens"
        for text in measured["texts"]
    )
    return "\n".join(
        [
            "```sh",
            measured["command"],
            "```",
            "",
            f"{texts}. Calibrated on {calibration['samples']} samples of "
            f"{calibration['seq_len']} tokens of {calibration['source']} (seed "
            f"{calibration['seed']}). Commit {measured['commit']}, {measured['date']}, on "
            f"{machine['cores']} cores of {machine['cpu']}, torch {machine['torch']}.",
        ]
    )


def fill(document: str, parts: Mapping[str, str]) -> str:
    """The document with every marked place whose name is in ``parts`` replaced.

    Raises TextError where a marker has no end, and where nothing is marked at all.
    """
    filled = 0
    for name, text in parts.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        if begin not in document:
            continue
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        if not pattern.search(document):
            raise TextError(f"The document has {begin} but no {end} after it; add it.")
        replacement = f"{begin}\n{text}\n{end}"
        document = pattern.sub(lambda _, new=replacement: new, document)  # type: ignore[misc]
        filled += 1
    if not filled:
        raise TextError(
            f"The document marks no place to fill; add <!-- accuracy:begin --> and "
            f"<!-- accuracy:end --> (names: {', '.join(parts)})."
        )
    return document
