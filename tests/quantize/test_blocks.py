"""A block's way: what calibration sees is what the finished checkpoint computes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.families import make_family_model
from helpers.quantizing import PAGE, model_tensors, random_text, relative, write_job
from helpers.tiny import write_byte_tokenizer
from qoq.checkpoint.hf import HFSource
from qoq.formats.kv import KVPages
from qoq.formats.scheme import WeightFormat
from qoq.models.anatomy import EMBED, FINAL_NORM, LM_HEAD
from qoq.models.batch import Batch
from qoq.models.config import ModelConfig
from qoq.models.load import LoadedModel, load_model
from qoq.quantize import blocks, ends
from qoq.quantize.calibration import load_calibration
from qoq.quantize.ends import embed, head_tensors
from qoq.quantize.linears import Moments
from qoq.quantize.pipeline import quantize, resolve_scheme
from qoq.quantize.recipe import PUBLISHED_G128, QOQ, RTN, Recipe
from qoq.quantize.replay import RowFile
from qoq.quantize.rotate import rotate_rows
from qoq.tokenizer import Tokenizer

SIZES: dict[str, Any] = {"samples": 3, "seq_len": 48}


def hidden_of(model: LoadedModel, ids: Tensor) -> Tensor:
    """The residual stream after the last layer, fp32 [tokens, H]."""
    config, batch = model.config, Batch.prefill(list(ids), PAGE)
    pages = [
        KVPages.empty(model.scheme.kv, batch.num_pages, config.num_kv_heads, PAGE, config.head_dim)
        for _ in model.decoder.layers
    ]
    return model.decoder.hidden(batch, pages)


def run_watched(job: tuple[Path, Path], out: Path, **changes: Any) -> dict[str, Tensor]:
    """Quantize, and take each stream's rows as the last layer left them."""
    rows: dict[str, Tensor] = {}
    config = ModelConfig.from_hf(HFSource(job[0]).config)
    tokens = SIZES["samples"] * SIZES["seq_len"]

    def progress(done: int, total: int, what: str) -> None:
        if what == f"layer {config.num_layers}/{config.num_layers}: output":
            for stream in ("float", "quant"):
                name = f"hidden-{config.num_layers:05d}-{stream}.rows"
                file = RowFile(out.parent / f"{out.name}.partial" / name, config.hidden_size)
                if file.holds(tokens):
                    rows[stream] = file.read(slice(0, tokens), torch.device("cpu"))

    quantize(job[0], out, calibration=str(job[1]), progress=progress, **{**SIZES, **changes})
    return rows


@pytest.mark.parametrize(
    ("name", "scheme", "recipe"),
    [
        ("llama-biased", "w4a8kv4-g32", QOQ),
        ("qwen2", "w4a8kv4", QOQ),
        ("qwen3-windows-biased", "w4a8k8v4-g32", QOQ),
        ("mistral-window-d96", "w8a8kv4", PUBLISHED_G128),
        ("llama3.1-d128", "w4a16kv4-g32", Recipe("x", center_keys=True, rotate_keys=True)),
    ],
)
def test_streams_end_where_the_checkpoint_and_the_source_do(
    name: str, scheme: str, recipe: Recipe, tmp_path: Path
) -> None:
    """Nothing of a layer is calibrated on inputs that it will not meet."""
    changes = {"num_hidden_layers": 2, "vocab_size": 300, "initializer_range": 0.05}
    make_family_model(name, **changes).save_pretrained(tmp_path / "model")
    write_byte_tokenizer(tmp_path / "model")
    (tmp_path / "text.txt").write_text(random_text(1000), encoding="utf-8")
    job = (tmp_path / "model", tmp_path / "text.txt")
    rows = run_watched(job, tmp_path / "out", scheme=scheme, recipe=recipe)
    ids = load_calibration(
        str(job[1]), Tokenizer.load(job[0]), SIZES["samples"], SIZES["seq_len"], seed=0
    ).ids
    packed = hidden_of(load_model(tmp_path / "out"), ids)
    # The same integers, but for a rare code that another chunking of float sums tips over.
    assert (rows["quant"] - packed).square().mean().sqrt() < 1e-2 * packed.square().mean().sqrt()
    assert ("float" in rows) == bool(recipe.compensate)
    if "float" in rows:
        source = hidden_of(load_model(job[0]), ids)
        wanted = rotate_rows(source) if recipe.rotate else source
        assert relative(rows["float"], wanted) < 1e-3  # the embedding's fp16
        assert relative(rows["quant"], wanted) > 1e-3


def test_writers_of_the_stream_are_aimed_at_its_drift(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drift is what the quantized stream lacks: float less quantized, o_proj and down_proj only."""
    job, drifts = write_job(tmp_path), []

    class Watched(Moments):
        def add(self, x: Tensor, x_float: Tensor | None, drift: Tensor | None) -> None:
            drifts.append(drift)
            super().add(x, x_float, drift)

    monkeypatch.setattr(blocks, "Moments", Watched)
    lacking: list[Tensor] = []
    tokens = SIZES["samples"] * SIZES["seq_len"]

    def progress(done: int, total: int, what: str) -> None:
        if what == "layer 2/2: statistics":
            files = [
                RowFile(tmp_path / "out.partial" / f"hidden-00001-{stream}.rows", 128)
                for stream in ("float", "quant")
            ]
            float_rows, rows = (f.read(slice(0, tokens), torch.device("cpu")) for f in files)
            lacking.append(float_rows - rows)

    quantize(job[0], tmp_path / "out", calibration=str(job[1]), progress=progress, **SIZES)
    assert [drift is None for drift in drifts] == [True, False] * 4  # four taps, two layers
    assert lacking[0].abs().max() > 1e-4
    torch.testing.assert_close(drifts[5], lacking[0])  # o_proj of the second layer


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("rotate", [False, True])
def test_the_head_is_coded_slice_by_slice(
    tied: bool, bits: int, rotate: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = write_job(tmp_path, tie_word_embeddings=tied)
    source, recipe = HFSource(model), QOQ if rotate else RTN
    config = ModelConfig.from_hf(source.config)
    scheme = resolve_scheme("w8a8" if bits == 8 else "w4a16", recipe)
    assert scheme.lm_head.bits == bits
    whole = head_tensors(source, config, scheme, recipe)
    monkeypatch.setattr(ends, "ROWS", 37)
    parts = head_tensors(source, config, scheme, recipe)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    gain = source.get(FINAL_NORM)
    weight = source.get(EMBED if tied else f"{LM_HEAD}.weight")
    wanted = rotate_rows(weight * gain) if rotate else weight
    assert torch.equal(whole[FINAL_NORM], torch.ones_like(gain) if rotate else gain)
    if bits == 16:
        got = whole[f"{LM_HEAD}.weight"]
        assert got.dtype == torch.float16
    else:
        assert whole[f"{LM_HEAD}.codes"].dtype == torch.int8
        got = whole[f"{LM_HEAD}.codes"] * whole[f"{LM_HEAD}.scale"][:, None]
    assert relative(got.float(), wanted) < (1e-3 if bits == 16 else 5e-3)


@pytest.mark.parametrize("recipe", [QOQ, RTN], ids=lambda r: r.name)
def test_the_embedding_is_stored_slice_by_slice(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = HFSource(write_job(tmp_path)[0])
    whole = embed(source, recipe)
    monkeypatch.setattr(ends, "ROWS", 37)
    assert torch.equal(embed(source, recipe), whole)
    wanted = rotate_rows(source.get(EMBED)) if recipe.rotate else source.get(EMBED)
    assert whole.dtype == torch.float16
    assert relative(whole.float(), wanted) < 1e-3


def test_a_recipe_may_keep_the_head_in_16_bits() -> None:
    assert resolve_scheme("w4a8kv4-g128", QOQ).lm_head == WeightFormat(8)
    assert resolve_scheme("w4a8kv4-g128", PUBLISHED_G128).lm_head == WeightFormat(16)
    given = resolve_scheme("w4a8kv4-g128", QOQ)
    assert resolve_scheme(given, PUBLISHED_G128) is given  # a scheme given whole is kept


def test_every_tensor_of_a_block_is_stored_once(tmp_path: Path) -> None:
    """Biases, q/k norms and centers included, under the names the loader asks for."""
    model = make_family_model("qwen3-windows-biased", num_hidden_layers=2, vocab_size=300)
    config, _ = model_tensors(model)
    assert config.qk_norm
    model.save_pretrained(tmp_path / "model")
    write_byte_tokenizer(tmp_path / "model")
    (tmp_path / "text.txt").write_text(random_text(1000), encoding="utf-8")
    out = tmp_path / "out"
    run_watched((tmp_path / "model", tmp_path / "text.txt"), out, scheme="w4a8kv4-g32")
    layer = load_model(out).decoder.layers[1]
    assert layer.k_center is not None
    assert layer.q_norm is not None
    assert layer.qkv.bias is not None
    assert layer.o.bias is not None
    assert layer.k_rotation is None
