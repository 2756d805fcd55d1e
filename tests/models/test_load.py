"""Loading a source: complete and exactly what the config implies, or refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.families import make_family_model, write_family_model
from helpers.packed import random_packed_tensors
from qoq.checkpoint.manifest import make_manifest
from qoq.checkpoint.writer import CheckpointWriter
from qoq.errors import CheckpointTensorError, QoqError, SourceError, UnsupportedModelError
from qoq.formats.kv import KVPages
from qoq.formats.scheme import KVFormat, QuantScheme
from qoq.models.batch import Batch
from qoq.models.config import ModelConfig
from qoq.models.decoder import build_decoder
from qoq.models.load import is_packed, load_model


def edit_tensors(folder: Path, **changes: Any) -> None:
    """Replace, add or (None) drop tensors, ``__`` standing for a dot."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for key, value in changes.items():
        name = key.replace("__", ".")
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    save_file(tensors, file)


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_missing_tensor(tmp_path: Path) -> None:
    write_family_model(tmp_path, "qwen2")
    edit_tensors(tmp_path, model__layers__1__self_attn__k_proj__bias=None)
    with pytest.raises(SourceError, match=r"lacks 1 of .*layers\.1\.self_attn\.k_proj\.bias"):
        load_model(tmp_path)


def test_missing_head(tmp_path: Path) -> None:
    write_family_model(tmp_path, "llama3.2-tied-d64")
    edit_config(tmp_path, tie_word_embeddings=False)
    with pytest.raises(SourceError, match="lm_head"):
        load_model(tmp_path)


def test_misshapen_tensor(tmp_path: Path) -> None:
    write_family_model(tmp_path, "llama-mha")
    edit_tensors(tmp_path, model__norm__weight=torch.ones(95))
    with pytest.raises(SourceError, match=r"model\.norm\.weight has shape \[95\].*\[96\]"):
        load_model(tmp_path)


def test_config_of_another_size(tmp_path: Path) -> None:
    write_family_model(tmp_path, "llama-mha")
    edit_config(tmp_path, intermediate_size=161)
    with pytest.raises(SourceError, match="has shape"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "model__layers__0__self_attn__q_norm__weight",  # a q/k norm we would leave out
        "model__layers__0__self_attn__q_proj__bias",
        "model__layers__3__mlp__up_proj__weight",  # a layer beyond num_hidden_layers
    ],
)
def test_tensors_that_would_be_ignored(tmp_path: Path, name: str) -> None:
    write_family_model(tmp_path, "llama-mha")
    edit_tensors(tmp_path, **{name: torch.zeros(2)})
    with pytest.raises(UnsupportedModelError, match=name.replace("__", r"\.")):
        load_model(tmp_path)


def test_old_rope_tables_are_harmless(tmp_path: Path) -> None:
    write_family_model(tmp_path, "llama-mha")
    edit_tensors(tmp_path, model__layers__0__self_attn__rotary_emb__inv_freq=torch.zeros(8))
    load_model(tmp_path)


def test_head_beside_tied_embeddings(tmp_path: Path) -> None:
    model = write_family_model(tmp_path, "llama3.2-tied-d64")
    embedding = model.model.embed_tokens.weight.detach()
    edit_tensors(tmp_path, lm_head__weight=embedding.clone())
    load_model(tmp_path)
    edit_tensors(tmp_path, lm_head__weight=embedding + 1)
    with pytest.raises(UnsupportedModelError, match="ties the head"):
        load_model(tmp_path)


def test_refused_before_weights_are_read(tmp_path: Path) -> None:
    write_family_model(tmp_path, "llama-mha")
    edit_config(tmp_path, architectures=["Gemma2ForCausalLM"])
    with pytest.raises(UnsupportedModelError, match="Gemma2ForCausalLM"):
        load_model(tmp_path)


def test_half_precision_sources_compute_in_fp32(tmp_path: Path) -> None:
    model = write_family_model(tmp_path, "qwen3-d256")
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    decoder = load_model(tmp_path).decoder
    assert decoder.embed.dtype == torch.bfloat16  # only its rows are ever converted
    assert decoder.norm.dtype == torch.float32
    layer = decoder.layers[0]
    assert layer.q_norm is not None
    assert {layer.q_norm.dtype, layer.input_norm.dtype} == {torch.float32}
    assert isinstance(layer.o.weight, torch.Tensor)
    assert torch.equal(layer.o.weight, model.model.layers[0].self_attn.o_proj.weight.float())


def test_sharded_source(tmp_path: Path) -> None:
    model = write_family_model(tmp_path / "one", "qwen2")
    model.save_pretrained(tmp_path / "many", max_shard_size="100KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    one, many = (load_model(tmp_path / n).decoder for n in ("one", "many"))
    assert torch.equal(one.embed, many.embed)
    for a, b in zip(one.layers, many.layers, strict=True):
        assert isinstance(a.down.weight, torch.Tensor)
        assert isinstance(b.down.weight, torch.Tensor)
        assert torch.equal(a.down.weight, b.down.weight)


def test_is_packed(tmp_path: Path) -> None:
    write_family_model(tmp_path, "llama-mha")
    assert not is_packed(tmp_path)
    edit_config(tmp_path, quantization_config={"quant_method": "gptq"})
    assert not is_packed(tmp_path)
    with pytest.raises(UnsupportedModelError, match="already quantized"):
        load_model(tmp_path)
    edit_config(tmp_path, quantization_config={"quant_method": "qoq"})
    assert is_packed(tmp_path)
    with pytest.raises(QoqError):  # a full-precision folder that claims to be packed
        load_model(tmp_path)


def write_packed(folder: Path, scheme: QuantScheme, *, drop: str = "", **manifest: Any) -> Any:
    """A packed Qwen2 (tied source) of random numbers: its config and tensors."""
    model = make_family_model("qwen2-windows-tied")
    raw = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    config = ModelConfig.from_hf(raw)
    tensors = random_packed_tensors(config, scheme)
    tensors.pop(drop, None)
    writer = CheckpointWriter(folder)
    writer.write_shard("all.safetensors", tensors)
    writer.finish(raw, make_manifest(scheme, **manifest))
    return config, tensors


@pytest.mark.parametrize("scheme_name", ["w4a8kv4-g32", "w4a8kv4", "w8a8"])
@pytest.mark.parametrize("k_rotation", [None, "hadamard"])
def test_packed(tmp_path: Path, scheme_name: str, k_rotation: str | None) -> None:
    scheme = QuantScheme.parse(scheme_name)
    config, tensors = write_packed(tmp_path / "out", scheme, k_rotation=k_rotation)
    loaded = load_model(tmp_path / "out")
    assert loaded.scheme == scheme
    assert loaded.config == replace(config, tie_word_embeddings=False)
    direct = build_decoder(
        config, scheme, tensors.__getitem__, k_rotation is not None, names=tensors
    )
    batch = Batch.prefill([torch.randint(0, 211, (13,))], 8)
    logits = []
    for decoder in (loaded.decoder, direct):
        kv = [KVPages.empty(scheme.kv, 2, config.num_kv_heads, 8, config.head_dim)] * 3
        logits.append(decoder(batch, kv))
    assert torch.equal(logits[0], logits[1])
    assert (loaded.decoder.layers[0].k_rotation is None) == (k_rotation is None)
    assert loaded.decoder.layers[1].k_center is not None


def test_packed_with_another_cache(tmp_path: Path) -> None:
    write_packed(tmp_path / "out", QuantScheme.parse("w4a8kv4-g32"))
    assert load_model(tmp_path / "out", kv=KVFormat(8, 8)).scheme.name == "w4a8kv8-g32"


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.up_proj.group_scale",
        "model.layers.2.self_attn.k_center",
        "model.layers.0.self_attn.q_proj.bias",
        "model.norm.weight",
    ],
)
def test_packed_lacking_a_tensor(tmp_path: Path, name: str) -> None:
    write_packed(tmp_path / "out", QuantScheme.parse("w4a8kv4-g32"), drop=name)
    with pytest.raises(CheckpointTensorError, match=name.rpartition(".")[0].replace(".", r"\.")):
        load_model(tmp_path / "out")
