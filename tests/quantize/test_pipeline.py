"""quantize() from a folder to a checkpoint: every scheme, every family, the same bytes again."""

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.families import VARIANTS, make_family_model
from helpers.quantizing import divergence, logits_of, random_text, relative, text_ids, write_job
from helpers.tiny import write_byte_tokenizer
from qoq import LLM
from qoq.checkpoint.packed import PackedCheckpoint
from qoq.errors import CheckpointError, SourceError, UnsupportedModelError
from qoq.models.load import load_model
from qoq.quantize.pipeline import needs_calibration, quantize
from qoq.quantize.recipe import (
    O_PROJ,
    PASS_NAMES,
    PUBLISHED_G128,
    PUBLISHED_PER_CHANNEL,
    QOQ,
    RTN,
    Recipe,
)

SCHEMES = [
    "w4a8kv4-g128",
    "w4a8kv4-g64",
    "w4a8kv4-g32",
    "w4a8kv4",
    "w4a8k8v4-g128",
    "w8a8",
    "w8a8kv8",
    "w16a8",
    "w4a16-g128",
    "w16a16k16v4",
    "w16a16kv4",
    "w16a16",
]
SMALL: dict[str, Any] = {"samples": 8, "seq_len": 64}
NEAR = 0.02  # KL of a 4-bit model; that of one with its logits shuffled is about 0.3
JOB_FILES = (".partial", ".rows", "job.json", "notes-")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_job(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def ids(job: tuple[Path, Path]) -> Tensor:
    return text_ids(job[0])


@pytest.fixture(scope="module")
def source_logits(job: tuple[Path, Path], ids: Tensor) -> Tensor:
    return logits_of(load_model(job[0]).decoder, ids)


def run(job: tuple[Path, Path], out: Path, **changes: Any) -> Path:
    return quantize(job[0], out, **{"calibration": str(job[1]), **SMALL, **changes})


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_gives_a_checkpoint_near_its_source(
    job: tuple[Path, Path], ids: Tensor, source_logits: Tensor, scheme: str, tmp_path: Path
) -> None:
    out = run(job, tmp_path / "out", scheme=scheme)
    assert out == tmp_path / "out"
    loaded = load_model(out)
    assert loaded.scheme.name == scheme
    got = logits_of(loaded.decoder, ids, loaded.scheme.kv)
    # 16-bit parts are limited by the fp16 embedding.
    limit = 1e-5 if scheme == "w16a16" else 5e-4 if "4" not in scheme else NEAR
    assert divergence(source_logits, got) < limit
    shuffled = source_logits[:, torch.randperm(got.shape[1])]
    assert divergence(source_logits, shuffled) > 10 * NEAR


def test_both_recipes_beat_rounding_to_nearest(
    job: tuple[Path, Path], ids: Tensor, source_logits: Tensor, tmp_path: Path
) -> None:
    far = {}
    for recipe in (QOQ, PUBLISHED_G128, RTN):
        loaded = load_model(run(job, tmp_path / recipe.name, recipe=recipe, samples=20))
        got = logits_of(loaded.decoder, ids, loaded.scheme.kv)
        far[recipe.name] = divergence(source_logits, got)
    assert far["qoq"] < 0.7 * far["rtn"]
    assert far["published-g128"] < 0.8 * far["rtn"]


def family_job(name: str, folder: Path) -> tuple[Path, Path]:
    """A tiny model of a family with a tokenizer, and a text."""
    changes = {"num_hidden_layers": 2, "vocab_size": 300, "initializer_range": 0.05}
    make_family_model(name, **changes).save_pretrained(folder / "model")
    write_byte_tokenizer(folder / "model")
    (folder / "text.txt").write_text(random_text(4000), encoding="utf-8")
    return folder / "model", folder / "text.txt"


@pytest.mark.parametrize("name", VARIANTS)
def test_every_family_in_the_default_recipe(name: str, tmp_path: Path) -> None:
    job = family_job(name, tmp_path)
    ids = text_ids(job[0])
    wanted = logits_of(load_model(job[0]).decoder, ids)
    loaded = load_model(run(job, tmp_path / "out", scheme="w4a8kv4-g32"))
    far = divergence(wanted, logits_of(loaded.decoder, ids, loaded.scheme.kv))
    assert far < 0.1 * divergence(wanted, wanted[:, torch.randperm(300)])


@pytest.mark.parametrize("name", VARIANTS)
def test_every_family_in_float_keeps_its_logits(name: str, tmp_path: Path) -> None:
    """Every pass that moves numbers about, and none that rounds (but the fp16 embedding)."""
    job = family_job(name, tmp_path)
    recipe = replace(QOQ, rotate_heads=True, reorder=(*PUBLISHED_G128.reorder, O_PROJ))
    ids = text_ids(job[0])
    wanted = logits_of(load_model(job[0]).decoder, ids)
    loaded = load_model(run(job, tmp_path / "out", scheme="w16a16", recipe=recipe, samples=2))
    assert relative(logits_of(loaded.decoder, ids), wanted) < 1e-3


def test_the_same_seed_gives_the_same_bytes_and_another_one_does_not(
    job: tuple[Path, Path], tmp_path: Path
) -> None:
    one, same, other = (
        digests(run(job, tmp_path / f"{i}" / "out", seed=seed)) for i, seed in enumerate((7, 7, 8))
    )
    assert one == same
    assert set(one) == set(other)
    changed = {name for name in one if one[name] != other[name]}
    assert {"config.json", "model-00002-of-00004.safetensors"} <= changed


def test_what_a_checkpoint_holds(job: tuple[Path, Path], tmp_path: Path) -> None:
    out = run(job, tmp_path / "out", seed=3)
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= names
    assert not [n for n in names for leftover in JOB_FILES if leftover in n]
    assert not (tmp_path / "out.partial").exists()
    manifest = PackedCheckpoint.open(out).manifest
    assert manifest["scheme"] == "w4a8kv4-g128"
    assert manifest["recipe"] == QOQ.to_dict()
    assert Recipe.from_dict(manifest["recipe"]) == QOQ
    assert manifest["seed"] == 3
    assert manifest["calibration"]["samples"] == 8
    assert manifest["calibration"]["source"] == "text.txt"
    assert re.fullmatch(r"[0-9a-f]{64}", manifest["calibration"]["sha256"])
    text = "".join(path.read_text() for path in out.glob("*.json"))
    assert str(tmp_path) not in text  # nobody's folders in what is published
    assert LLM(out).generate(["the"])


def test_the_report_tells_every_layer_and_linear(job: tuple[Path, Path], tmp_path: Path) -> None:
    out = run(job, tmp_path / "out")
    report = json.loads((out / "quantization_report.json").read_text())
    assert report["job"]["scheme"] == "w4a8kv4-g128"
    assert len(report["layers"]) == 2
    for layer in report["layers"]:
        assert len(layer["errors"]) == 7
        for errors in layer["errors"].values():
            assert 0 < errors["output_error"] < 0.1
            assert 0 < errors["weight_error"] < 0.1
        assert len(layer["before"]["key_absmax"]) == len(layer["after"]["key_absmax"])


@pytest.mark.parametrize("name", [n for n, field in PASS_NAMES.items() if getattr(QOQ, field)])
def test_every_pass_can_be_switched_off(
    job: tuple[Path, Path], ids: Tensor, source_logits: Tensor, name: str, tmp_path: Path
) -> None:
    loaded = load_model(run(job, tmp_path / "out", recipe=QOQ.without(name), samples=4))
    got = logits_of(loaded.decoder, ids, loaded.scheme.kv)
    assert divergence(source_logits, got) < NEAR


@pytest.mark.parametrize("recipe", [PUBLISHED_G128, PUBLISHED_PER_CHANNEL], ids=lambda r: r.name)
@pytest.mark.parametrize("rotate_keys", [False, True])
def test_published_recipes_and_rotated_keys(
    job: tuple[Path, Path],
    ids: Tensor,
    source_logits: Tensor,
    recipe: Recipe,
    rotate_keys: bool,
    tmp_path: Path,
) -> None:
    scheme = "w4a8kv4" if recipe is PUBLISHED_PER_CHANNEL else "w4a8kv4-g128"
    changed = replace(recipe, rotate_keys=rotate_keys)
    loaded = load_model(run(job, tmp_path / "out", recipe=changed, scheme=scheme))
    assert loaded.scheme.lm_head.bits == 16
    assert (loaded.decoder.layers[0].k_rotation is not None) == rotate_keys
    assert divergence(source_logits, logits_of(loaded.decoder, ids, loaded.scheme.kv)) < NEAR


def test_a_recipe_without_data_reads_no_text(job: tuple[Path, Path], tmp_path: Path) -> None:
    """RTN runs without a tokenizer, too."""
    assert not needs_calibration(RTN, load_model(job[0]).scheme)
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((job[0] / name).read_bytes())
    seen: list[str] = []
    out = quantize(
        bare,
        tmp_path / "out",
        recipe=RTN,
        calibration="no such file",
        progress=lambda done, total, what: seen.append(f"{done}/{total} {what}"),
    )
    assert PackedCheckpoint.open(out).manifest["calibration"] is None
    assert seen == [
        "1/4 embedding",
        "2/4 layer 1/2: packed",
        "3/4 layer 2/2: packed",
        "4/4 lm_head",
    ]


def test_progress_counts_every_step_once(job: tuple[Path, Path], tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    run(job, tmp_path / "out", progress=lambda *step: seen.append(step))
    assert [done for done, _, _ in seen] == list(range(1, len(seen) + 1))
    assert {total for _, total, _ in seen} == {len(seen)}
    assert seen[1][2] == "layer 1/2: statistics"
    assert seen[-1][2] == "lm_head"


def test_the_plan_is_announced_before_any_work(job: tuple[Path, Path], tmp_path: Path) -> None:
    said: list[str] = []

    def announce(plan: object) -> None:
        assert not (tmp_path / "out.partial").exists()
        said.append(str(plan))

    run(job, tmp_path / "out", announce=announce)
    assert len(said) == 1
    assert re.search(r"GB of memory.*GB of disk", said[0])


def test_bf16_products_are_near_and_leave_no_trace(
    job: tuple[Path, Path], ids: Tensor, source_logits: Tensor, tmp_path: Path
) -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    loaded = load_model(run(job, tmp_path / "out", dtype="bfloat16"))
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    assert divergence(source_logits, logits_of(loaded.decoder, ids, loaded.scheme.kv)) < NEAR


def test_refusals_come_before_any_work(job: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run(job, tmp_path / "done", recipe=RTN)
    with pytest.raises(UnsupportedModelError, match="quantized already"):
        quantize(done, out)
    with pytest.raises(UnsupportedModelError, match="--dtype float8"):
        run(job, out, dtype="float8")
    with pytest.raises(SourceError, match="no folder"):
        quantize(tmp_path / "gone", out)
    assert not out.exists()


def test_sizes_without_a_hadamard_matrix_are_refused_by_name(tmp_path: Path) -> None:
    odd = write_job(tmp_path, hidden_size=116, intermediate_size=64, head_dim=46)
    wide = {"scheme": "w4a8kv4", "calibration": str(odd[1]), **SMALL}
    with pytest.raises(UnsupportedModelError, match=r"116 \(hidden_size\).*--without rotate"):
        quantize(odd[0], tmp_path / "out", **wide)
    with pytest.raises(UnsupportedModelError, match=r"46 \(head_dim\)"):
        quantize(odd[0], tmp_path / "out", recipe=Recipe("x", rotate_heads=True), **wide)
    assert not (tmp_path / "out.partial").exists()
    quantize(odd[0], tmp_path / "out", recipe=QOQ.without("rotate"), **wide)


def test_groups_that_divide_nothing_are_refused_by_name(tmp_path: Path) -> None:
    odd = write_job(tmp_path, intermediate_size=96)
    with pytest.raises(UnsupportedModelError, match=r"down_proj has 96 input channels"):
        run(odd, tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("recipe", [RTN, QOQ], ids=lambda r: r.name)
def test_a_source_with_nan_is_refused_by_name(name: str, recipe: Recipe, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    bad = write_job(tmp_path)
    tensors = load_file(bad[0] / "model.safetensors")
    tensors[name][3, 2] = torch.nan
    save_file(tensors, bad[0] / "model.safetensors")
    with pytest.raises(SourceError, match=f"{name}.*NaN"):
        run(bad, tmp_path / "out", recipe=recipe)
    assert not (tmp_path / "out").exists()


def test_an_output_that_exists_is_refused_unless_asked(
    job: tuple[Path, Path], tmp_path: Path
) -> None:
    out = run(job, tmp_path / "out", recipe=RTN)
    before = digests(out)
    with pytest.raises(CheckpointError, match="exists already"):
        run(job, out, recipe=RTN, scheme="w8a8")
    assert digests(out) == before
    run(job, out, recipe=RTN, scheme="w8a8", overwrite=True)
    assert load_model(out).scheme.name == "w8a8"


def test_embeddings_beyond_fp16_stay_fp32(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    job = write_job(tmp_path)
    tensors = load_file(job[0] / "model.safetensors")
    tensors["model.embed_tokens.weight"] *= 1e7
    save_file(tensors, job[0] / "model.safetensors")
    out = run(job, tmp_path / "out", recipe=RTN)
    ids = text_ids(job[0], windows=1)
    wanted = logits_of(load_model(job[0]).decoder, ids)
    loaded = load_model(out)
    assert divergence(wanted, logits_of(loaded.decoder, ids, loaded.scheme.kv)) < NEAR
