"""quantize(): the whole way of a weight, from a Hugging Face folder to a packed checkpoint."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qoq.checkpoint.files import atomic_file, dump_json
from qoq.checkpoint.hf import HFSource, resolve_source
from qoq.checkpoint.manifest import make_manifest
from qoq.checkpoint.writer import CheckpointWriter, companion_files
from qoq.errors import CheckpointError, UnsupportedModelError
from qoq.formats.hadamard import hadamard_matrix, has_hadamard
from qoq.formats.scheme import DEFAULT_SCHEME, QuantScheme, WeightFormat
from qoq.models.anatomy import EMBED, packed_tensors
from qoq.models.config import ModelConfig
from qoq.models.load import check_source, is_packed
from qoq.quantize.block import Block
from qoq.quantize.blocks import BLOCK_STEPS, quantize_block
from qoq.quantize.calibration import BUILT_IN, Calibration, load_calibration
from qoq.quantize.ends import ROWS, embed, head_tensors, read
from qoq.quantize.plan import Plan, check_plan, make_plan
from qoq.quantize.recipe import QOQ, Recipe
from qoq.quantize.replay import Replay
from qoq.quantize.report import REPORT_NAME
from qoq.tokenizer import Tokenizer

Progress = Callable[[int, int, str], None]
"""progress(done, total, what): after every finished step; ``what`` names the step."""

JOB_NAME = "job.json"


def quantize(
    model: str | Path,
    out: str | Path,
    *,
    scheme: QuantScheme | str = DEFAULT_SCHEME,
    recipe: Recipe = QOQ,
    calibration: str = BUILT_IN,
    samples: int = 128,
    seq_len: int = 1024,
    seed: int = 0,
    device: str = "cpu",
    dtype: str = "float32",
    resume: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
    announce: Callable[[Plan], None] | None = None,
) -> Path:
    """Quantize ``model`` (folder or hub id) into the new folder ``out``; return its path.

    Memory is bounded by one layer. An interrupted run leaves ``out.partial`` and continues there
    at the last finished layer when called again with the same arguments; equal arguments give
    equal bytes. ``dtype`` "bfloat16" lets float products use the CPU's bf16 units. Raises QoqError
    subclasses before any work for models, schemes or sizes that cannot be honoured.
    """
    source = HFSource(resolve_source(model))
    config = ModelConfig.from_hf(source.config)
    scheme = resolve_scheme(scheme, recipe)
    place = torch.device(device)
    check_job(config, source, scheme, recipe)
    texts = (
        load_calibration(calibration, Tokenizer.load(source.path), samples, seq_len, seed)
        if needs_calibration(recipe, scheme)
        else None
    )
    plan = make_plan(config, scheme, recipe, texts.ids.numel() if texts else 0, place)
    if announce:
        announce(plan)
    check_plan(plan, Path(out), place)
    writer = CheckpointWriter(out, overwrite=overwrite, resume=resume)
    job = _claim(writer, source, scheme, recipe, texts, seed, dtype)
    total = 2 + config.num_layers * (len(BLOCK_STEPS) if texts else 1)
    done = 0

    def step(what: str) -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, total, what)

    replay = Replay(config, texts.ids, writer.partial, place) if texts else None
    finished = _finished(writer, config, replay, recipe)
    with torch.no_grad(), float_products(dtype):
        if _shard(config, 0) not in finished:
            embedding = embed(source, recipe)
            if replay:
                _first_rows(replay, embedding, recipe)
            writer.write_shard(_shard(config, 0), {EMBED: embedding})
        step("embedding")
        for index in range(config.num_layers):
            name = f"layer {index + 1}/{config.num_layers}"
            if _shard(config, index + 1) in finished:
                done += (len(BLOCK_STEPS) if texts else 1) - 1
                step(f"{name}: finished before")
                continue
            block = Block.load(config, index, lambda n: read(source, n).to(place))
            if recipe.rotate_keys:
                block.k_rotation = hadamard_matrix(config.head_dim).to(place, torch.float32)
            tensors = quantize_block(block, replay, scheme, recipe, partial(_step_of, step, name))
            _note(writer.partial, index, block.notes)
            writer.write_shard(_shard(config, index + 1), tensors)  # marks the layer finished
            if replay:
                _drop_rows(replay, index)
            else:
                step(name)
        head = head_tensors(source, config, scheme, recipe)
        writer.write_shard(_shard(config, config.num_layers + 1), head)
        step("lm_head")
    report = dump_json(_report(writer.partial, config, job))
    rotation = "hadamard" if recipe.rotate_keys and scheme.kv.k_bits < 16 else None
    manifest = make_manifest(
        scheme,
        k_rotation=rotation,
        recipe=recipe.to_dict(),
        seed=seed,
        calibration=texts.to_dict() if texts else None,
    )
    files = {**companion_files(source.path), REPORT_NAME: report}
    return writer.finish(source.config, manifest, files)


def _step_of(step: Callable[[str], None], layer: str, what: str) -> None:
    step(f"{layer}: {what}")


def resolve_scheme(scheme: QuantScheme | str, recipe: Recipe) -> QuantScheme:
    """A scheme by name; its lm_head stays 16-bit where the recipe says so."""
    if isinstance(scheme, QuantScheme):
        return scheme
    parsed = QuantScheme.parse(scheme)
    bits = max(parsed.lm_head.bits, recipe.lm_head_bits)
    return replace(parsed, lm_head=WeightFormat(bits))


def check_job(config: ModelConfig, source: HFSource, scheme: QuantScheme, recipe: Recipe) -> None:
    """Refuse by name, before any work, what cannot be honoured."""
    if is_packed(source.path):
        raise UnsupportedModelError(f"{source.path} is quantized already; give the original model.")
    check_source(config, source)
    packed_tensors(config, scheme, k_center=False)  # raises where groups don't divide
    if recipe.rotate and not has_hadamard(config.hidden_size):
        raise UnsupportedModelError(
            f"No Hadamard matrix of size {config.hidden_size} (hidden_size) can be built; "
            "leave the rotation out with --without rotate."
        )
    if (recipe.rotate_heads or recipe.rotate_keys) and not has_hadamard(config.head_dim):
        raise UnsupportedModelError(
            f"No Hadamard matrix of size {config.head_dim} (head_dim) can be built; use a recipe "
            "that rotates neither heads nor keys."
        )


def needs_calibration(recipe: Recipe, scheme: QuantScheme) -> bool:
    """Whether any pass looks at data."""
    keys = (recipe.center_keys or recipe.smooth_attention) and scheme.kv.k_bits < 16
    rounding = (recipe.gptq or recipe.search_range) and scheme.weight.bits < 16
    return bool(keys or rounding or recipe.smooth_outputs or recipe.reorder)


@contextmanager
def float_products(dtype: str) -> Iterator[None]:
    """Let fp32 matrix products on CPU run in bf16 units (fp32 accumulation) if so asked."""
    if dtype not in ("float32", "bfloat16"):
        raise UnsupportedModelError(f"--dtype {dtype} does not exist; use float32 or bfloat16.")
    before = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    torch.backends.mkldnn.matmul.fp32_precision = "bf16" if dtype == "bfloat16" else "ieee"  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before  # type: ignore[attr-defined]


def _shard(config: ModelConfig, number: int) -> str:
    return f"model-{number + 1:05d}-of-{config.num_layers + 2:05d}.safetensors"


def _finished(
    writer: CheckpointWriter, config: ModelConfig, replay: Replay | None, recipe: Recipe
) -> set[str]:
    """The shards that need not be made again: all before the first missing one.

    None at all where the next layer's input rows were lost (a power cut, a tidied folder): only
    the layers before can make them.
    """
    names, there = [_shard(config, n) for n in range(config.num_layers + 1)], set(writer.shards())
    count = next((n for n, name in enumerate(names) if name not in there), len(names))
    if replay and 0 < count <= config.num_layers:
        files = [replay.hidden(stream, count - 1) for stream in _streams(recipe)]
        if not all(file.holds(replay.tokens) for file in files):
            count = 0
    return set(names[:count])


def _streams(recipe: Recipe) -> tuple[str, ...]:
    return ("float", "quant") if recipe.compensate else ("quant",)


def _first_rows(replay: Replay, embedding: Tensor, recipe: Recipe) -> None:
    """Write the first layer's input rows; both streams read the stored embedding."""
    flat, width = replay.ids.reshape(-1), embedding.shape[1]
    for stream in _streams(recipe):
        file = replay.hidden(stream, 0)
        file.delete()
        for start in range(0, len(flat), ROWS):
            file.write(start, embedding[flat[start : start + ROWS]].reshape(-1, width))


def _drop_rows(replay: Replay, index: int) -> None:
    """A layer's input rows have served once its shard is on disk."""
    for stream in ("float", "quant"):
        replay.hidden(stream, index).delete()


def _note(folder: Path, index: int, notes: dict[str, object]) -> None:
    with atomic_file(folder / f"notes-{index:05d}.json") as file:
        file.write(dump_json(notes))


def _report(folder: Path, config: ModelConfig, job: dict[str, Any]) -> dict[str, Any]:
    layers = [
        json.loads((folder / f"notes-{i:05d}.json").read_bytes()) for i in range(config.num_layers)
    ]
    return {"job": job, "layers": layers}


def _claim(
    writer: CheckpointWriter,
    source: HFSource,
    scheme: QuantScheme,
    recipe: Recipe,
    texts: Calibration | None,
    seed: int,
    dtype: str,
) -> dict[str, Any]:
    """Mark the partial folder as this job's; refuse to continue another job's layers in it."""
    job = {
        "source": source.path.name,
        "source_sha256": source.fingerprint(),
        "scheme": scheme.name,
        "lm_head_bits": scheme.lm_head.bits,
        "recipe": recipe.to_dict(),
        "calibration": texts.to_dict() if texts else None,
        "seed": seed,
        "dtype": dtype,
    }
    path = writer.partial / JOB_NAME
    if path.is_file() and json.loads(path.read_bytes()) != job:
        raise CheckpointError(
            f"{writer.partial} holds an unfinished quantization with other settings. Finish that "
            "one, use --no-resume to start over, or choose another output folder."
        )
    with atomic_file(path) as file:
        file.write(dump_json(job))
    return job
