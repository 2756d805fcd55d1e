"""``qoq inspect``: what a packed checkpoint is and holds, from its headers alone."""

import json as json_module
import re
from collections import defaultdict
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qoq.cli.options import CHECKPOINT, JSON
from qoq.cli.terminal import emit, size, verb
from qoq.quantize.recipe import PASS_NAMES

if TYPE_CHECKING:
    from qoq.checkpoint.packed import PackedCheckpoint

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
REPORT_NAME = "quantization_report.json"


@verb()
def inspect(checkpoint: CHECKPOINT, json: JSON = False) -> None:
    """Scheme, sizes, bits per weight, recipe and a line per layer of a packed checkpoint.

    Reads headers, no weights, so it is quick on any size.

    Example:

        qoq inspect OUT

    --json prints: path, scheme, lm_head_bits, k_rotation, recipe, seed, calibration, qoq_version,
    model (sizes), bytes, weights, bits_per_weight (linears, scales included),
    bits_per_parameter (everything), kv_bytes_per_token, parts (bytes by kind), layers (bytes,
    weight_error, output_error: relative squared errors, null where no report is there).
    """
    facts = summary(Path(checkpoint))
    if json:
        emit(facts)
        return
    _show(facts)


def summary(path: Path) -> dict[str, Any]:
    """Everything ``inspect --json`` prints."""
    from qoq.checkpoint.packed import PackedCheckpoint
    from qoq.formats.kv import page_bytes
    from qoq.models.config import ModelConfig

    packed = PackedCheckpoint.open(path, values=False)
    config = ModelConfig.from_hf(packed.raw_config)
    names = packed.names()
    linears = [n for n in names if _LAYER.match(n) and _is_linear(n)]
    weights = sum(_weights(packed, n) for n in linears)
    total = sum(packed.nbytes(n) for n in names)
    parameters = sum(_weights(packed, n) for n in names)
    kv = page_bytes(packed.scheme.kv, config.num_kv_heads, 1, config.head_dim, float_bytes=2)
    return {
        "path": str(path),
        "scheme": packed.scheme.name,
        **{k: packed.manifest.get(k) for k in ("lm_head_bits", "k_rotation", "recipe", "seed")},
        **{k: packed.manifest.get(k) for k in ("calibration", "qoq_version")},
        "model": {
            "architecture": config.architecture,
            "layers": config.num_layers,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "heads": config.num_heads,
            "kv_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "vocab_size": config.vocab_size,
            "max_positions": config.max_positions,
        },
        "bytes": total,
        "weights": weights,
        "bits_per_weight": 8 * sum(packed.nbytes(n) for n in linears) / weights,
        "bits_per_parameter": 8 * total / parameters,
        "kv_bytes_per_token": kv * config.num_layers,
        "parts": _parts(packed),
        "layers": _layers(packed, config.num_layers, read_report(path)),
    }


def read_report(path: Path) -> list[dict[str, Any]]:
    """The notes per layer that quantization left; [] where there are none."""
    try:
        report = json_module.loads((path / REPORT_NAME).read_text(encoding="utf-8"))
        layers = report["layers"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return list(layers) if all(isinstance(layer, dict) for layer in layers) else []


def _is_linear(name: str) -> bool:
    return "norm" not in name and not name.endswith((".bias", ".k_center"))


def _weights(packed: "PackedCheckpoint", name: str) -> int:
    """Original parameters a tensor stands for: scales and offsets stand for none."""
    if name.endswith(".codes"):
        linear = name.removesuffix(".codes")
        bits = packed.scheme.lm_head.bits if linear == "lm_head" else packed.scheme.weight.bits
        return prod(packed.shape(name)) * 8 // bits
    return prod(packed.shape(name)) if name.endswith((".weight", ".bias")) else 0


def _parts(packed: "PackedCheckpoint") -> dict[str, int]:
    """Bytes by kind of tensor."""
    parts: dict[str, int] = defaultdict(int)
    for name in packed.names():
        if name.startswith("lm_head"):
            kind = "lm_head"
        elif "embed" in name:
            kind = "embedding"
        elif not _is_linear(name):
            kind = "norms, biases, key centers"
        else:
            kind = "codes" if name.endswith(".codes") else "scales and offsets"
            kind = "16-bit weights" if name.endswith(".weight") else kind
        parts[kind] += packed.nbytes(name)
    return dict(parts)


def _layers(
    packed: "PackedCheckpoint", count: int, notes: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    bytes_of = [0] * count
    for name in packed.names():
        match = _LAYER.match(name)
        if match and int(match[1]) < count:
            bytes_of[int(match[1])] += packed.nbytes(name)
    layers = []
    for index, nbytes in enumerate(bytes_of):
        errors = notes[index].get("errors", {}) if index < len(notes) else {}
        layers.append(
            {
                "layer": index,
                "bytes": nbytes,
                "weight_error": _mean(errors, "weight_error"),
                "output_error": _mean(errors, "output_error"),
            }
        )
    return layers


def _mean(errors: dict[str, dict[str, float]], kind: str) -> float | None:
    values = [error[kind] for error in errors.values() if kind in error]
    return sum(values) / len(values) if values else None


def lines(facts: dict[str, Any]) -> dict[str, str]:
    """A summary's head as a reader wants it, by name."""
    model, recipe, calibration = facts["model"], facts["recipe"] or {}, facts["calibration"]
    passes = ", ".join(name for name, field in PASS_NAMES.items() if recipe.get(field))
    rotation = f", keys rotated ({facts['k_rotation']})" if facts["k_rotation"] else ""
    sample = "none"
    if calibration:
        sample = f"{calibration.get('samples')} x {calibration.get('seq_len')} tokens of "
        sample += f"{calibration.get('source')}, seed {facts['seed']}"
    return {
        "scheme": f"{facts['scheme']}, lm_head {facts['lm_head_bits']} bits{rotation}",
        "model": f"{model['architecture']}, {model['layers']} layers of {model['hidden_size']}, "
        f"{model['heads']} heads ({model['kv_heads']} KV) of {model['head_dim']}",
        "size": f"{size(facts['bytes'])}: "
        + ", ".join(f"{name} {size(count)}" for name, count in facts["parts"].items()),
        "bits": f"{facts['bits_per_weight']:.2f} per weight of {facts['weights']:,} in linears, "
        f"{facts['bits_per_parameter']:.2f} per parameter over all",
        "KV cache": f"{facts['kv_bytes_per_token']:,} bytes per token",
        "recipe": f"{recipe.get('name', 'unknown')} ({passes or 'no passes'})",
        "calibration": sample,
        "written by": f"qoq {facts['qoq_version']}",
    }


def _show(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    for name, line in lines(facts).items():
        print(f"{name:12} {line}")
    table = Table("layer", "size", "weight error", "output error")
    for layer in facts["layers"]:
        errors = (layer["weight_error"], layer["output_error"])
        cells = ["-" if e is None else f"{e:.3%}" for e in errors]
        table.add_row(str(layer["layer"]), size(layer["bytes"]), *cells)
    Console().print(table)
