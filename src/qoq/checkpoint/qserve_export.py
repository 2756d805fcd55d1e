"""Our checkpoints as QServe/OmniServe and SGLang read them; what they cannot hold is refused."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from torch import Tensor

from qoq.checkpoint.files import atomic_file, dump_json
from qoq.checkpoint.packed import PackedCheckpoint
from qoq.checkpoint.partial import PartialFolder
from qoq.checkpoint.qserve_layout import check_tiles, pack_group_params, pack_tiles
from qoq.checkpoint.shard import write_tensors
from qoq.checkpoint.values import all_finite
from qoq.checkpoint.writer import CONFIG_NAME, MAX_SHARD_BYTES, companion_files
from qoq.errors import CheckpointValueError, ResourceError, UnsupportedModelError
from qoq.formats.packing import unpack_nibbles
from qoq.formats.scheme import KVFormat, QuantScheme

FileFormat = Literal["safetensors", "bin"]
_STEM = {"safetensors": "model", "bin": "pytorch_model"}
_CHUNK = 1 << 22  # elements compared together
_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")


@dataclass(frozen=True)
class QServeExport:
    """What an export made, the options that QServe must be given for it (its files don't say),
    and what was lost or will not run.
    """

    path: Path
    precision: str
    group_size: int
    warnings: tuple[str, ...]


class _Rounding:
    """To fp16, remembering the largest relative change per kind of tensor."""

    def __init__(self) -> None:
        self.worst: dict[str, float] = {}

    def __call__(self, what: str, name: str, tensor: Tensor) -> Tensor:
        """fp16 of ``tensor``; raises CheckpointValueError if it does not fit."""
        if tensor.dtype == torch.float16 or not tensor.numel():
            return tensor.to(torch.float16)
        half = tensor.to(torch.float16)
        if not all_finite(half) or (what == "scales" and not (half > 0).all()):
            raise CheckpointValueError(f"{name} does not fit in fp16, which QServe's files use.")
        worst, largest = 0.0, 0.0
        pairs = zip(half.reshape(-1).split(_CHUNK), tensor.reshape(-1).split(_CHUNK), strict=True)
        for rounded, exact in pairs:
            size = exact.to(torch.float32).abs()
            change = (rounded.to(torch.float32) - exact).abs()
            worst = max(worst, float((change / size if what == "scales" else change).max()))
            largest = max(largest, float(size.max()))
        relative = worst if what == "scales" or not largest else worst / largest
        self.worst[what] = max(self.worst.get(what, 0.0), relative)
        return half

    def warnings(self) -> list[str]:
        return [
            f"{what} were rounded to fp16, by at most {worst:.1e} "
            + ("of their value." if what == "scales" else "of their tensor's largest value.")
            for what, worst in sorted(self.worst.items())
            if worst
        ]


def export_qserve(
    checkpoint: str | Path,
    out: str | Path,
    *,
    file_format: FileFormat = "safetensors",
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> QServeExport:
    """Write a packed checkpoint in QServe's layout.

    file_format: "safetensors", or "bin" for torch pickles; their loader takes both. One file, or
    several of at most ``max_shard_bytes`` (each is made in memory).
    Codes and group parameters are exact; float scales are rounded to fp16, an int8 lm_head is
    written in fp16; the result says how much was lost. Raises UnsupportedModelError for what
    QServe cannot represent, CheckpointError for a checkpoint that cannot be read.
    """
    source = PackedCheckpoint.open(checkpoint)
    scheme = source.scheme
    _refuse(source)
    rounding = _Rounding()
    plan = _plan(source, rounding)
    shards: list[list[str]] = [[]]
    used = 0
    for name, (nbytes, _) in plan.items():
        if shards[-1] and used + nbytes > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += nbytes

    stem, suffix = _STEM[file_format], file_format
    folder = PartialFolder(out, overwrite=overwrite)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        part = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        file = f"{stem}{part}.{suffix}"
        _write(folder.path / file, {name: plan[name][1]() for name in names}, file_format)
        weight_map |= dict.fromkeys(names, file)
    group_size = scheme.weight.group_size or -1
    files = {CONFIG_NAME: dump_json(_config(source, group_size))}
    if len(shards) > 1:
        total = sum(nbytes for nbytes, _ in plan.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        files[f"{stem}.{suffix}.index.json"] = dump_json(index)
    for name, path in companion_files(source.path).items():
        files[name] = path if isinstance(path, bytes) else path.read_bytes()
    for name, content in files.items():
        with atomic_file(folder.path / name) as handle:
            handle.write(content)
    path = folder.publish({*files, *weight_map.values()})
    precision = f"w{scheme.weight.bits}a8{scheme.kv}"
    warnings = rounding.warnings() + _remarks(source)
    return QServeExport(path, precision, group_size, tuple(warnings))


def _refuse(source: PackedCheckpoint) -> None:
    """Raise UnsupportedModelError for what QServe's layout or kernels cannot represent."""
    scheme, names = source.scheme, source.names()

    def no(what: str, instead: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"QServe cannot represent {what}. {instead}")

    if scheme.act_bits != 8 or scheme.weight.bits == 16:
        raise no(f"the scheme {scheme}", "It has 4- and 8-bit weights with 8-bit activations.")
    if scheme.weight.group_size not in (None, 128):
        raise no(
            f"groups of {scheme.weight.group_size}",
            "Quantize with w4a8kv4-g128 or w4a8kv4 (per-channel).",
        )
    if scheme.kv not in (KVFormat(4, 4), KVFormat(8, 8)):
        raise no(
            f"the KV format {scheme.kv}",
            "Keys and values must both have 4 or both 8 bits; quantize with kv4 or kv8.",
        )
    if any(name.endswith(".k_center") for name in names):
        raise no(
            "centered keys (k_center)",
            "Quantize the model again with a recipe that leaves key centering out.",
        )
    if source.manifest["k_rotation"] is not None:
        raise no("rotated keys (k_rotation)", "Quantize again without --k-rotation.")
    for name in names:
        if name.endswith("norm.weight") and not (source.get(name) == 1).all():
            raise no(
                f"the norm gains {name}",
                "Its loader takes all gains as 1. Quantize with a recipe that folds the norms "
                "into the weights (models with q/k norms cannot be exported).",
            )
        if scheme.weight.bits == 4 and name.endswith(".codes") and name != "lm_head.codes":
            rows, half_columns = source.shape(name)
            check_tiles(name.removesuffix(".codes"), rows, 2 * half_columns)


# Name in the export -> its bytes, and how to make it.
_Plan = dict[str, tuple[int, Callable[[], Tensor]]]


def _plan(source: PackedCheckpoint, rounding: _Rounding) -> _Plan:
    """What the export holds, layer after layer; nothing is read until it is written."""
    plan: _Plan = {}
    bits = source.scheme.weight.bits
    for name in source.names():
        linear, _, part = name.rpartition(".")
        count = prod(source.shape(name))
        if part == "codes" and linear == "lm_head":
            plan["lm_head.weight"] = (2 * count, partial(_head, source, rounding))
        elif linear == "lm_head" and part == "scale":
            continue
        elif part == "codes" and bits == 4:
            plan[f"{linear}.qweight"] = (count, partial(_tiles, source, name))
        elif part == "codes":
            plan[f"{linear}.weight"] = (count, partial(source.get, name))
        elif part in ("scale", "channel_scale"):
            target = "s1_scales" if bits == 4 else "dequant_scale"
            plan[f"{linear}.{target}"] = (
                2 * count,
                partial(_half, source, rounding, "scales", name),
            )
        elif part == "offset":
            plan[f"{linear}.s1_szeros"] = (2 * count, partial(_szeros, source, rounding, name))
        elif part in ("group_scale", "group_offset"):
            target = "s2_scales" if part == "group_scale" else "s2_zeros"
            plan[f"{linear}.{target}"] = (count, partial(_group_params, source, name))
        else:
            what = "biases" if part == "bias" else "embedding and head weights"
            plan[name] = (2 * count, partial(_half, source, rounding, what, name))
    return plan


def _tiles(source: PackedCheckpoint, name: str) -> Tensor:
    return pack_tiles(unpack_nibbles(source.get(name)))


def _group_params(source: PackedCheckpoint, name: str) -> Tensor:
    return pack_group_params(source.get(name).to(torch.int8))


def _half(source: PackedCheckpoint, rounding: _Rounding, what: str, name: str) -> Tensor:
    return rounding(what, name, source.get(name))


def _szeros(source: PackedCheckpoint, rounding: _Rounding, name: str) -> Tensor:
    """Scaled zeros: QServe subtracts what we add."""
    return -rounding("offsets", name, source.get(name))


def _head(source: PackedCheckpoint, rounding: _Rounding) -> Tensor:
    """The int8 head in fp16."""
    codes, scale = source.get("lm_head.codes"), source.get("lm_head.scale")
    exact = codes.to(torch.float32) * scale[:, None]
    return rounding("embedding and head weights", "lm_head.weight", exact)


def _write(path: Path, tensors: dict[str, Tensor], file_format: FileFormat) -> None:
    if file_format == "safetensors":
        write_tensors(path, tensors)
        return
    with atomic_file(path) as file:
        _save_pickle(path, tensors, file)


def _save_pickle(path: Path, tensors: dict[str, Tensor], file: BinaryIO) -> None:
    try:
        torch.save(tensors, file)
    except RuntimeError as error:  # how torch reports a write that failed
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise ResourceError(f"{path} could not be written ({error}); is the disk full?") from None


def _config(source: PackedCheckpoint, group_size: int) -> dict[str, Any]:
    """config.json with the two entries by which SGLang knows the layout."""
    config = {**source.raw_config, "torch_dtype": "float16"}
    config.pop("dtype", None)  # the newer name of torch_dtype
    if source.scheme.weight.bits == 4:
        config["quantization_config"] = {
            "quant_method": "qoq",
            "wbits": 4,
            "group_size": group_size,
        }
    return config


def _remarks(source: PackedCheckpoint) -> list[str]:
    """What the user should know before running the export."""
    config, scheme = source.raw_config, source.scheme
    remarks = []
    if scheme.lm_head.bits == 8:
        remarks.append("The int8 lm_head was written in fp16, twice its size.")
    if not set(config.get("architectures") or ()) & set(_ARCHITECTURES):
        remarks.append("QServe itself runs Llama and Mistral only; SGLang runs more.")
    if config.get("rope_scaling"):
        remarks.append("QServe ignores rope_scaling or knows the linear one only.")
    if _uneven(source, scheme):
        remarks.append("QServe's kernels need weights whose sides are multiples of 128.")
    return remarks


def _uneven(source: PackedCheckpoint, scheme: QuantScheme) -> bool:
    pack = 2 if scheme.weight.bits == 4 else 1
    shapes = [source.shape(n) for n in source.names() if n.endswith(".codes")]
    return any(rows % 128 or columns * pack % 128 for rows, columns in shapes)
