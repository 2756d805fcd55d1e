"""quantize(): the whole way of a weight, from a Hugging Face folder to a packed checkpoint."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from qoq.checkpoint.hf import HFSource, resolve_source
from qoq.checkpoint.partial import check_out
from qoq.checkpoint.writer import CheckpointWriter
from qoq.errors import UnsupportedModelError
from qoq.formats.hadamard import hadamard_matrix, has_hadamard
from qoq.formats.scheme import DEFAULT_SCHEME, QuantScheme, WeightFormat
from qoq.models.anatomy import packed_tensors
from qoq.models.config import ModelConfig
from qoq.models.load import check_source, is_packed
from qoq.quantize.block import Block
from qoq.quantize.blocks import quantize_block
from qoq.quantize.calibration import BUILT_IN, Calibration, load_calibration
from qoq.quantize.ends import embed, head_tensors, read
from qoq.quantize.job import EMBEDDING, Job, Progress, Settings
from qoq.quantize.plan import Plan, check_plan, make_plan
from qoq.quantize.recipe import QOQ, Recipe
from qoq.tokenizer import Tokenizer


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
    check_out(out, overwrite=overwrite)
    source = HFSource(resolve_source(model))
    config = ModelConfig.from_hf(source.config)
    scheme = resolve_scheme(scheme, recipe)
    check_job(config, source, scheme, recipe)
    texts: Calibration | None = None
    if needs_calibration(recipe, scheme):
        tokenizer = Tokenizer.load(source.path)
        texts = load_calibration(calibration, tokenizer, samples, seq_len, seed)
    place = torch.device(device)
    plan = make_plan(config, scheme, recipe, texts.ids.numel() if texts else 0, place)
    if announce:
        announce(plan)
    check_plan(plan, Path(out), place)
    writer = CheckpointWriter(out, overwrite=overwrite, resume=resume)
    settings = Settings(scheme, recipe, texts, seed, dtype)
    job = Job(writer, source, config, settings, place, progress)
    with torch.no_grad(), float_products(dtype):
        if not job.finished(EMBEDDING):
            job.write_embedding(embed(source, recipe))
        for index in range(config.num_layers):
            if not job.finished(index):
                block = Block.load(config, index, lambda n: read(source, n).to(place))
                if recipe.rotate_keys:
                    block.k_rotation = hadamard_matrix(config.head_dim).to(place, torch.float32)
                step = partial(job.step, index)
                tensors = quantize_block(block, job.replay, scheme, recipe, step)
                job.write_layer(index, tensors, block.notes)
        job.write_head(head_tensors(source, config, scheme, recipe))
    return job.publish()


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
