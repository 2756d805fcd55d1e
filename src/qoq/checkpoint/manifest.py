"""``quantization_config``: how a packed checkpoint says what it is (the docs' byte spec)."""

from collections.abc import Mapping
from typing import Any

from qoq import __version__
from qoq.errors import CheckpointError, CheckpointVersionError, SchemeError
from qoq.formats.scheme import QuantScheme

QUANT_METHOD = "qoq"
FORMAT_VERSION = 1
# The keys that change what is computed must be there; the others tell where it came from.
_REQUIRED = ("quant_method", "format_version", "scheme", "lm_head_bits", "k_rotation")
_OPTIONAL = ("recipe", "seed", "calibration", "qoq_version")


def make_manifest(
    scheme: QuantScheme,
    *,
    k_rotation: str | None = None,
    recipe: Mapping[str, Any] | None = None,
    seed: int | None = None,
    calibration: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The ``quantization_config`` of a checkpoint in ``scheme``.

    ``recipe`` is data (passes and their numbers); ``calibration`` names source, sha256, samples
    and seq_len. Raises CheckpointError for a k_rotation that does not exist.
    """
    manifest = {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "scheme": scheme.name,
        "lm_head_bits": scheme.lm_head.bits,
        "k_rotation": k_rotation,
        "recipe": dict(recipe or {}),
        "seed": seed,
        "calibration": None if calibration is None else dict(calibration),
        "qoq_version": __version__,
    }
    parse_manifest(manifest)
    return manifest


def parse_manifest(manifest: object) -> QuantScheme:
    """The scheme a ``quantization_config`` stands for, after checking every key.

    Raises CheckpointVersionError for another method or version, CheckpointError for the rest.
    """
    if not isinstance(manifest, Mapping):
        raise CheckpointError("config.json has no quantization_config: no packed checkpoint.")
    method, version = manifest.get("quant_method"), manifest.get("format_version")
    if method != QUANT_METHOD:
        raise CheckpointVersionError(
            f"quant_method is {method!r}; only {QUANT_METHOD!r} checkpoints can be read."
        )
    if version is None and "wbits" in manifest:
        raise CheckpointVersionError(
            "This is a checkpoint in QServe's layout (quant_method 'qoq' with wbits, as SGLang "
            "reads it). Convert it with `qoq import-qserve`."
        )
    if type(version) is not int or version != FORMAT_VERSION:
        newer = type(version) is int and version > FORMAT_VERSION
        raise CheckpointVersionError(
            f"format_version is {version!r}; this program reads {FORMAT_VERSION}. "
            + ("Update it." if newer else "Quantize the model again.")
        )
    for key in _REQUIRED:
        if key not in manifest:
            raise CheckpointError(f"quantization_config lacks {key}; quantize the model again.")
    unknown = sorted(str(key) for key in manifest if key not in _REQUIRED + _OPTIONAL)
    if unknown:
        raise CheckpointError(
            f"quantization_config has the unknown key {unknown[0]}, which might change what the "
            "numbers mean. Use the version of this program that wrote it."
        )
    if not isinstance(manifest.get("recipe", {}), Mapping):
        raise CheckpointError("quantization_config's recipe must be an object.")
    if manifest["k_rotation"] not in (None, "hadamard"):
        raise CheckpointError(
            f"k_rotation {manifest['k_rotation']!r} does not exist; null and 'hadamard' do."
        )
    return _scheme(manifest["scheme"], manifest["lm_head_bits"])


def _scheme(name: object, lm_head_bits: object) -> QuantScheme:
    if type(lm_head_bits) is not int or lm_head_bits not in (8, 16):
        raise CheckpointError(f"lm_head_bits {lm_head_bits!r} does not exist; 8 and 16 do.")
    try:
        if not isinstance(name, str):
            raise SchemeError(f"A scheme is a name, not {name!r}.")
        return QuantScheme.parse(name, lm_head_bits)
    except SchemeError as error:
        raise CheckpointError(f"quantization_config names no scheme known here: {error}") from None
