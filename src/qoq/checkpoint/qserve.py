"""QServe/OmniServe checkpoints in and out (their layout: docs/checkpoint-format.md).

``import_qserve`` reads both a converted checkpoint and the pair model.pt + scale.pt it is made
from. Zero points become offsets exactly, so the imported weights are the same numbers.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from qoq.checkpoint.hf import read_json_object
from qoq.checkpoint.manifest import make_manifest
from qoq.checkpoint.qserve_export import QServeExport, export_qserve
from qoq.checkpoint.qserve_groups import OrderEvidence
from qoq.checkpoint.qserve_layout import ORDERS, ScaleOrder
from qoq.checkpoint.qserve_sources import ConvertedSource, FakeQuantSource
from qoq.checkpoint.tensor_files import TensorFiles
from qoq.checkpoint.values import all_finite
from qoq.checkpoint.writer import MAX_SHARD_BYTES, CheckpointWriter, companion_files
from qoq.errors import CheckpointTensorError, CheckpointValueError, SourceError
from qoq.formats.scheme import KVFormat, QuantScheme, WeightFormat

__all__ = ["QServeExport", "QServeImport", "export_qserve", "import_qserve"]

_EMBED, _HEAD, _NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_LAYER_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
# Left behind by conversions: RoPE tables, and static KV scales of runs without KV4.
_IGNORED = re.compile(r".*(\.rotary_emb\.(inv_freq|cos_cached|sin_cached)|\.kv_scale_quant_orig)$")
_EVIDENCE_LAYERS = 2  # linears of this many layers are asked for the scale order


@dataclass(frozen=True)
class QServeImport:
    """What an import made: the new checkpoint, its scheme, the order the group scales were in
    (None without groups), and what its user should know.
    """

    path: Path
    scheme: QuantScheme
    scale_order: ScaleOrder | None
    notes: tuple[str, ...]


def import_qserve(
    folder: str | Path,
    out: str | Path,
    *,
    kv: KVFormat | None = None,
    config_folder: str | Path | None = None,
    scale_order: ScaleOrder | Literal["auto"] = "auto",
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> QServeImport:
    """Convert a QServe checkpoint to a packed one in ``out``.

    folder: config.json and ``*.safetensors`` or ``*.bin``; or model.pt and scale.pt, then
    config_folder usually names the original model (for config.json and tokenizer).
    kv: how the cache will be kept (KV4 if None); QServe's files don't say.
    scale_order: "auto" finds out from the weights which order s2_scales and s2_zeros are in, since
    one converter wrote an order that QServe's own kernels misread; refused if they don't tell.

    Raises SourceError, CheckpointTensorError, CheckpointValueError, ResourceError.
    """
    folder = Path(folder)
    home = Path(config_folder) if config_folder is not None else folder
    if not folder.is_dir():
        raise SourceError(f"There is no folder {folder}.")
    config = read_json_object(home / "config.json")
    source: ConvertedSource | FakeQuantSource
    if (folder / "scale.pt").is_file():
        source = FakeQuantSource(folder)
    else:
        source = ConvertedSource(TensorFiles.in_folder(folder))
    if not source.linears:
        raise SourceError(
            f"{folder} holds no QServe weights: neither qweight tensors nor model.pt + scale.pt."
        )
    notes: list[str] = []
    order = None
    if isinstance(source, ConvertedSource):
        order = source.order = _scale_order(source, scale_order, notes)

    first = source.linear(source.linears[0]).format
    if not first.group_size:
        order = None
    scheme = QuantScheme(first, 8, kv or KVFormat(4, 4), WeightFormat(16))
    layers, rest = _by_layer([*source.linears, *source.others])
    if set(layers) != set(range(len(layers))):
        raise CheckpointTensorError(f"{folder} lacks layers: it has {sorted(layers)}.")
    writer = CheckpointWriter(out, overwrite=overwrite, max_shard_bytes=max_shard_bytes)
    embed = _get(source, _EMBED)
    hidden = embed.shape[1]
    writer.write_shard("embed.safetensors", {_EMBED: embed})
    del embed
    for index, names in sorted(layers.items()):
        tensors = _convert(source, names, first)
        for norm in _LAYER_NORMS:
            _default_gain(tensors, f"model.layers.{index}.{norm}", hidden, notes)
        writer.write_shard(f"layer-{index:05d}.safetensors", tensors)
    tied = _HEAD not in rest and bool(config.get("tie_word_embeddings"))
    head = {_HEAD: _get(source, _EMBED if tied else _HEAD)}
    head |= _convert(source, [n for n in rest if n not in (_EMBED, _HEAD)], first)
    _default_gain(head, _NORM, hidden, notes)
    writer.write_shard("head.safetensors", head)

    config.pop("quantization_config", None)  # SGLang's description of the same weights
    recipe = {"imported_from": "qserve", "scale_order": order}
    path = writer.finish(config, make_manifest(scheme, recipe=recipe), companion_files(home))
    return QServeImport(path, scheme, order, tuple(dict.fromkeys(notes)))


def _scale_order(
    source: ConvertedSource, wanted: ScaleOrder | Literal["auto"], notes: list[str]
) -> ScaleOrder:
    """The order to read group parameters in, found in the weights unless the caller knows."""
    if wanted != "auto":
        if wanted not in ORDERS:
            raise SourceError(f"scale_order {wanted!r} does not exist; auto, kernel and pairs do.")
        return wanted
    layers, _ = _by_layer(source.linears)
    evidence = OrderEvidence()
    for index in sorted(layers)[:_EVIDENCE_LAYERS]:
        for linear in layers[index]:
            evidence += source.evidence(linear)
    order = evidence.order()
    if order is None:
        raise CheckpointValueError(
            "The weights don't tell in which order s2_scales and s2_zeros are stored. Say so with "
            "scale_order: 'kernel' for what QServe's kernels read, 'pairs' for the output of "
            "deepcompressor's converter since February 2025."
        )
    if order == "pairs":
        notes.append(
            "s2_scales and s2_zeros were stored in an order that QServe's kernels misread "
            "(deepcompressor's converter since February 2025); they were put right."
        )
    return order


def _by_layer(names: Iterable[str]) -> tuple[dict[int, list[str]], list[str]]:
    """Layer index -> names in it, and the names outside all layers; without what is ignored."""
    layers: dict[int, list[str]] = {}
    rest = []
    for name in names:
        if _IGNORED.fullmatch(name):
            continue
        match = _LAYER.match(name)
        if match:
            layers.setdefault(int(match[1]), []).append(name)
        else:
            rest.append(name)
    return layers, rest


def _convert(
    source: ConvertedSource | FakeQuantSource, names: Iterable[str], fmt: WeightFormat
) -> dict[str, Tensor]:
    """Our tensors for some linears, norm gains and biases of theirs."""
    tensors: dict[str, Tensor] = {}
    linears = set(source.linears)
    for name in names:
        if name in linears:
            weight = source.linear(name)
            if weight.format != fmt:
                raise CheckpointTensorError(
                    f"{name} is stored in {weight.format}, others in {fmt}; mixed formats cannot "
                    "be represented."
                )
            tensors |= {f"{name}.{part}": t for part, t in weight.tensors().items()}
        elif name.endswith(("norm.weight", ".bias")):
            tensors[name] = _get(source, name, 1).to(torch.float32)
        else:
            raise CheckpointTensorError(f"Tensor {name} is unexpected in a QServe checkpoint.")
    return tensors


def _get(source: ConvertedSource | FakeQuantSource, name: str, ndim: int = 2) -> Tensor:
    """A float tensor of theirs, finite or refused."""
    tensor = source.tensors.get(name, ndim)
    if not tensor.is_floating_point():
        raise CheckpointTensorError(f"Tensor {name} has dtype {tensor.dtype}; it must be a float.")
    if not all_finite(tensor):
        raise CheckpointValueError(f"Tensor {name} holds NaN or infinity.")
    return tensor


def _default_gain(tensors: dict[str, Tensor], name: str, size: int, notes: list[str]) -> None:
    """QServe's loader takes every norm gain as 1: what a file without them means."""
    if name not in tensors:
        tensors[name] = torch.ones(size)
        notes.append("Norm gains were missing and were set to 1, as QServe does.")
    elif not (tensors[name] == 1).all():
        notes.append(
            "Norm gains other than 1 were kept; QServe itself ignores them, so its output differs."
        )
