"""report.html: what quantization did to a model, in pictures; one file that needs nothing else."""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
from matplotlib.figure import Figure

from qoq.evaluate.card import accuracy_rows

MAX_LAYERS_DRAWN = 8  # of key channels, spread evenly; all layers are in the other pictures
_BEFORE, _AFTER = "#c44e52", "#4c72b0"
# Figures of ``quantization_report.json`` -> how a reader calls them.
_RANGES = {
    "key_range": "keys: max - min of a head's vector",
    "value_range": "values: max - min of a head's vector",
    "o_proj_input": "entering o_proj: largest of a channel",
    "down_proj_input": "entering down_proj: largest of a channel",
}

_TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ name }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
  color: #222; background: #fff }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
table { border-collapse: collapse } td, th { padding: .2rem .7rem; border-bottom: 1px solid #ddd;
  text-align: right; font-variant-numeric: tabular-nums } td:first-child, th:first-child {
  text-align: left } .wide { overflow-x: auto; font-size: .85rem } img { max-width: 100% }
code { background: #f3f3f3; padding: .1rem .3rem; overflow-wrap: anywhere } p.note { color: #666 }
</style></head><body>
<h1>{{ name }}</h1>
<table>{% for key, value in facts %}<tr><td>{{ key }}</td><td>{{ value }}</td></tr>{% endfor %}
</table>
{% if command %}<p>Made by <code>{{ command }}</code></p>{% endif %}
<h2>Accuracy</h2>
{% if rows %}<p>Measured on {{ measured_on }}. KL is that from full precision, nats per token.</p>
<table><tr><th></th><th>perplexity</th><th>KL mean</th><th>KL 99 %</th><th>same top token</th></tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}
</table>{% else %}<p class="note">Not measured; <code>qoq eval ppl</code> does.</p>{% endif %}
{% for title, note, image in pictures %}<h2>{{ title }}</h2><p class="note">{{ note }}</p>
<img alt="{{ title }}" src="data:image/png;base64,{{ image }}">
{% endfor %}
{% if errors %}<h2>Errors of every linear</h2>
<p class="note">Relative squared error of the weight, and of the output on calibration data.</p>
<div class="wide"><table><tr><th>layer</th>{% for name in linears %}<th>{{ name }}</th>{% endfor %}
</tr>{% for row in errors %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div>{% endif %}
</body></html>
"""

Layers = Sequence[Mapping[str, Any]]


def report_page(
    name: str,
    layers: Layers,
    facts: Mapping[str, str],
    accuracy: Mapping[str, Any] | None,
    command: str = "",
) -> str:
    """The page of a checkpoint.

    ``layers``: those of quantization_report.json ([] leaves the pictures out); ``facts``: lines of
    the head; ``accuracy`` as ``qoq quantize --json`` prints it.
    """
    linears = list(dict.fromkeys(n for layer in layers for n in layer.get("errors", {})))
    rows, measured_on = accuracy_rows(facts.get("scheme", "quantized"), accuracy)
    environment = jinja2.Environment(autoescape=True)
    return environment.from_string(_TEMPLATE).render(
        name=name,
        facts=facts.items(),
        command=command,
        rows=[[row.name, *_cells(row)] for row in rows],
        measured_on=measured_on,
        pictures=_pictures(layers, linears),
        linears=[linear.split(".")[-1] for linear in linears],
        errors=[[i, *(_pair(layer, n) for n in linears)] for i, layer in enumerate(layers)]
        if linears
        else [],
    )


def _cells(row: Any) -> list[str]:
    formats = {"perplexity": ".3f", "kl_mean": ".2e", "kl_p99": ".2e", "top1_agreement": ".2%"}
    values = [(getattr(row, name), spec) for name, spec in formats.items()]
    return ["-" if value is None else format(value, spec) for value, spec in values]


def _pair(layer: Mapping[str, Any], linear: str) -> str:
    error = layer.get("errors", {}).get(linear, {})
    kinds = [error[k] for k in ("weight_error", "output_error") if k in error]
    return " / ".join(f"{value:.2%}" for value in kinds) or "-"


def _pictures(layers: Layers, linears: Sequence[str]) -> list[tuple[str, str, str]]:
    """(title, note, PNG in base64) of every picture there is data for."""
    out = []
    kinds = {"output_error": "Output error", "weight_error": "Weight error"}
    for kind, title in kinds.items():
        if any(kind in e for layer in layers for e in layer.get("errors", {}).values()):
            note = "Relative squared error per layer and linear; 0.01 is 1 % of the power."
            out.append((title, note, _draw(_errors, layers, linears, kind)))
    ranged = [layer for layer in layers if "before" in layer and "after" in layer]
    if ranged and len(ranged) == len(layers):
        out.append(
            (
                "Ranges before and after the passes",
                "What 4 or 8 bits must span. Line: median; band: up to the 99th percentile.",
                _draw(_ranges, layers),
            )
        )
        out.append(
            (
                "Key channels before and after",
                "Largest absolute value of every key channel (after RoPE), heads side by side. "
                "Tall channels cost all others their resolution.",
                _draw(_keys, layers),
            )
        )
    return out


def _draw(painter: Callable[..., Figure], *arguments: Any) -> str:
    buffer = io.BytesIO()
    # No software version in the file: equal data give equal bytes.
    painter(*arguments).savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return base64.b64encode(buffer.getvalue()).decode()


def _errors(layers: Layers, linears: Sequence[str], kind: str) -> Figure:
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots()
    for linear in linears:
        values = [layer.get("errors", {}).get(linear, {}).get(kind) for layer in layers]
        points = [(i, v) for i, v in enumerate(values) if v is not None and v > 0]
        if points:
            axes.plot(*zip(*points, strict=True), marker=".", label=linear.split(".")[-1])
    axes.set(xlabel="layer", ylabel=kind.replace("_", " "), yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(ncols=4, fontsize="small")
    return figure


def _ranges(layers: Layers) -> Figure:
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(2, 2).flat, _RANGES.items(), strict=True):
        for when, color in (("before", _BEFORE), ("after", _AFTER)):
            spreads = [layer[when][key] for layer in layers]
            at = range(len(spreads))
            median, high = [s["median"] for s in spreads], [s["p99"] for s in spreads]
            axes.plot(at, median, color=color, marker=".", label=when)
            axes.fill_between(at, median, high, color=color, alpha=0.18, linewidth=0)
        axes.set_title(title, fontsize="medium")
        axes.set(xlabel="layer", yscale="log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return figure


def _keys(layers: Layers) -> Figure:
    stride = -(-len(layers) // MAX_LAYERS_DRAWN)
    drawn = list(range(0, len(layers), stride))
    figure = Figure(figsize=(9, 1.5 * len(drawn) + 0.4), layout="constrained")
    for axes, index in zip(figure.subplots(len(drawn), squeeze=False).flat, drawn, strict=True):
        for when, color in (("before", _BEFORE), ("after", _AFTER)):
            values = layers[index][when]["key_absmax"]
            axes.plot(values, color=color, linewidth=0.8, label=when)
        axes.set_ylabel(f"layer {index}", fontsize="small")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize="small", ncols=2, loc="upper right")
    figure.axes[-1].set_xlabel("key channel")
    return figure
