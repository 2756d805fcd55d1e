"""load_model: a folder to a decoder, packed (ours) or full-precision (Hugging Face)."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from qoq.checkpoint.hf import CONFIG_NAME, HFSource, read_json_object, resolve_source
from qoq.checkpoint.packed import PackedCheckpoint
from qoq.errors import SourceError, UnsupportedModelError
from qoq.formats.scheme import FLOAT_SCHEME, KVFormat, QuantScheme
from qoq.models.anatomy import EMBED, LM_HEAD, layer_prefix, packed_tensors, source_tensors
from qoq.models.config import ModelConfig
from qoq.models.decoder import Decoder, build_decoder
from qoq.models.layers import Get

# Tensors that old conversions carry along and nothing reads: RoPE tables, which we compute.
_IGNORED_SUFFIXES = (".rotary_emb.inv_freq", ".self_attn.masked_bias", ".self_attn.rotary_emb.cos")


@dataclass(frozen=True)
class LoadedModel:
    """A decoder with what it was made from; ``path`` is the local folder."""

    config: ModelConfig
    scheme: QuantScheme
    decoder: Decoder
    path: Path

    @property
    def device(self) -> torch.device:
        """Where its weights are, and its batches and pages must be."""
        return self.decoder.embed.device


def load_model(
    path: str | Path,
    *,
    kv: KVFormat | None = None,
    backend: str = "auto",
    device: torch.device | str = "cpu",
) -> LoadedModel:
    """Load a packed checkpoint or a full-precision model, told apart by ``config.json``.

    ``path`` is a folder or a hub id. ``kv`` replaces the scheme's KV format (full-precision models
    have a 16-bit one); packed weights are laid out for ``backend`` on ``device``. Raises
    SourceError, CheckpointError, UnsupportedModelError or BackendUnavailable.
    """
    folder = resolve_source(path)
    if is_packed(folder):
        return _load_packed(folder, kv, backend, device)
    source = HFSource(folder)
    config = ModelConfig.from_hf(source.config)
    check_source(config, source)
    scheme = FLOAT_SCHEME if kv is None else FLOAT_SCHEME.with_kv(kv)
    decoder = build_decoder(config, scheme, _onto(device, source.get))
    return LoadedModel(config, scheme, decoder, folder)


def is_packed(folder: Path) -> bool:
    """Whether a folder's ``config.json`` says it is one of our checkpoints."""
    quantization = read_json_object(folder / CONFIG_NAME).get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == "qoq"


def check_source(config: ModelConfig, source: HFSource) -> None:
    """Prove that a source holds exactly the tensors the config implies, of the right shapes.

    Raises UnsupportedModelError for tensors we would leave unread (they would change the output)
    and SourceError for missing or misshapen ones. Reads headers only, except for a head stored
    beside tied embeddings, which must equal them.
    """
    expected = source_tensors(config)
    missing = [name for name in expected if name not in source]
    if missing:
        raise SourceError(
            f"{source.path} lacks {len(missing)} of {len(expected)} tensors that config.json "
            f"implies ({missing[0]}, ...). Finish the download, or check that both belong together."
        )
    for name, shape in expected.items():
        if source.shape(name) != shape:
            raise SourceError(
                f"Tensor {name} has shape {list(source.shape(name))}, but config.json implies "
                f"{list(shape)}."
            )
    head = f"{LM_HEAD}.weight"
    extra = [
        name
        for name in source.names()
        if name not in expected and not name.endswith(_IGNORED_SUFFIXES) and name != head
    ]
    if extra:
        raise UnsupportedModelError(
            f"{source.path} holds {len(extra)} tensors that a {config.architecture} does not have "
            f"({extra[0]}, ...); leaving them out would change its output."
        )
    if head not in expected and head in source:
        same_shape = source.shape(head) == source.shape(EMBED)
        if not same_shape or not torch.equal(source.get(head), source.get(EMBED)):
            raise UnsupportedModelError(
                f"config.json ties the head to the embedding, but {head} is stored with other "
                "values. Set tie_word_embeddings to false if the stored head is the right one."
            )


def _load_packed(
    folder: Path, kv: KVFormat | None, backend: str, device: torch.device | str
) -> LoadedModel:
    checkpoint = PackedCheckpoint.open(folder)
    # Our checkpoints always store the head, whatever the source did.
    config = replace(ModelConfig.from_hf(checkpoint.raw_config), tie_word_embeddings=False)
    names = set(checkpoint.names())
    k_center = f"{layer_prefix(0)}self_attn.k_center" in names
    checkpoint.verify(packed_tensors(config, checkpoint.scheme, k_center))
    scheme = checkpoint.scheme if kv is None else checkpoint.scheme.with_kv(kv)
    k_rotation = checkpoint.manifest.get("k_rotation") == "hadamard"
    get = _onto(device, checkpoint.get)
    decoder = build_decoder(config, scheme, get, k_rotation, names=names, backend=backend)
    checkpoint.close()
    return LoadedModel(config, scheme, decoder, folder)


def _onto(device: torch.device | str, get: Get) -> Get:
    """``get``, its tensors brought to the device one by one."""
    return lambda name: get(name).to(device)
