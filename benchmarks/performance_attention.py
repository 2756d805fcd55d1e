"""What docs/performance.md says of attention beside others, and of each half of the system."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qoq.bench.attention import TORCH
from qoq.evaluate.render import grid

FORMATS = ("kv4", "kv8", "bf16")
Run = Mapping[str, Any]


def compared(runs: Iterable[Run]) -> str:
    """KV4 against KV8 and bf16: how many times as long a decoding call takes over the others."""
    parts = []
    for run in runs:
        at = _seconds(run, "attention")
        contexts, batches = _axes(at)
        lines = []
        for context in contexts:
            for other in FORMATS[1:]:
                cells = [_ratio(at, (context, other, b), (context, FORMATS[0], b)) for b in batches]
                if any(cell != "-" for cell in cells):
                    lines.append([f"context {context}, {other} / {FORMATS[0]}", *cells])
        if lines:
            parts.append(f"{_title(run)}\n\n" + grid(["", *(f"batch {b}" for b in batches)], lines))
    return "\n\n".join(parts)


def prefill(runs: Iterable[Run]) -> str:
    """Prefill attention: milliseconds, and torch's time as a multiple of ours (above 1: we win)."""
    parts = []
    for run in runs:
        at = _seconds(run, "attention_prefill")
        contexts, chunks = _axes(at)
        lines = []
        for context in contexts:
            for chunk in chunks:
                torch_at = (context, TORCH, chunk)
                if torch_at not in at:
                    continue
                cells = [f"{at[torch_at] * 1e3:.1f} ms"]
                for kind in FORMATS:
                    ours = at.get((context, kind, chunk))
                    ratio = _ratio(at, torch_at, (context, kind, chunk))
                    cells.append("-" if ours is None else f"{ours * 1e3:.1f} ms, {ratio}")
                lines.append([f"{chunk} of {context}", *cells])
        if lines:
            parts.append(f"{_title(run)}\n\n" + grid(["tokens", TORCH, *FORMATS], lines))
    return "\n\n".join(parts)


def halves(runs: Iterable[Run]) -> str:
    """A line per ablation of a measured whole: tokens a second, and their share of the whole's."""
    keys = ("prefill_tok_s", "decode_tok_s", "total_tok_s")
    found: dict[tuple[Any, ...], dict[tuple[bool, bool], Run]] = {}
    for run in runs:
        weights, floats = _split(run["scheme"])
        for result in run["runs"]:
            sizes = (result["prompt_len"], result["output_len"], result["batch"])
            case = (run["shape"], weights, run["isa"], run["threads"], *sizes)
            found.setdefault(case, {})[bool(run.get("ablate")), floats] = result
    lines = []
    for (shape, weights, isa, threads, prompt, output, batch), ways in sorted(found.items()):
        if len(ways) == 1 or (False, False) not in ways:
            continue
        name = f"{shape}, {weights}, {isa}, {threads} threads, {prompt} / {output}, batch {batch}"
        whole = ways[False, False]
        for (ablated, floats), result in sorted(ways.items()):
            label = " and ".join(
                (["linears dequantize to bf16"] if ablated else [])
                + (["KV cache in bf16"] if floats else [])
            )
            cells = [f"{result[key]:.1f} ({result[key] / whole[key]:.0%})" for key in keys]
            lines.append([f"without: {label}" if label else name, *cells])
    return grid(["", "prefill", "decode", "total"], lines) if lines else ""


def picture(runs: Sequence[Run], path: Path) -> list[Path]:
    """Decode time per sequence over context, a panel per run, as SVG; the paths written."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    shown = [run for run in runs if {kind for _, kind, _ in _seconds(run, "attention")} > {"kv4"}]
    if not shown:
        return []
    # The same figures give the same bytes.
    mpl.rcParams.update({"svg.hashsalt": "qoq", "font.size": 9, "svg.fonttype": "none"})
    figure, panels = plt.subplots(
        1, len(shown), figsize=(4.2 * len(shown) + 0.6, 3.4), squeeze=False
    )
    for run, panel in zip(shown, panels[0], strict=True):
        at = _seconds(run, "attention")
        contexts, batches = _axes(at)
        batch = max(batches)
        for kind, style in zip(FORMATS, ("o-", "s-", "^-"), strict=True):
            points = [(c, at[c, kind, batch]) for c in contexts if (c, kind, batch) in at]
            panel.plot([c for c, _ in points], [s * 1e3 for _, s in points], style, label=kind)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        panel.set_xticks(contexts, [str(c) for c in contexts])
        panel.yaxis.set_major_formatter("{x:g}")
        panel.set_xlabel("context, tokens")
        panel.set_ylabel("ms per call, one layer")
        panel.set_title(f"{run['shape']}, batch {batch}, {run['isa']}", fontsize=9)
        panel.grid(alpha=0.3)
        panel.legend(title="KV cache", frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return [path]


def _seconds(run: Run, op: str) -> dict[tuple[int, str, int], float]:
    """(context, format, M) -> seconds."""
    out = {}
    for row in run["rows"]:
        if row["op"] == op:
            _, context, kind = row["shape"].split(", ")
            out[int(context.removeprefix("context ")), kind, row["M"]] = row["seconds"]
    return out


def _axes(at: Iterable[tuple[int, str, int]]) -> tuple[list[int], list[int]]:
    keys = list(at)
    return sorted({c for c, _, _ in keys}), sorted({m for _, _, m in keys})


def _ratio(
    at: Mapping[tuple[int, str, int], float],
    over: tuple[int, str, int],
    under: tuple[int, str, int],
) -> str:
    return f"{at[over] / at[under]:.2f}x" if over in at and under in at else "-"


def _title(run: Run) -> str:
    return f"{run['shape']}, {run['isa']}, {run['threads']} threads"


def _split(scheme: str) -> tuple[str, bool]:
    """A scheme without its KV cache, and whether that is of floats: (w4a8-g128, False)."""
    from dataclasses import replace

    from qoq.formats.scheme import KVFormat, QuantScheme

    parsed, floats = QuantScheme.parse(scheme), KVFormat(16, 16)
    return replace(parsed, kv=floats).name, parsed.kv == floats
