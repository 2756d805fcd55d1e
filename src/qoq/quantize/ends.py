"""The two ends of the model: the embedding as stored, and the final norm with lm_head."""

import torch
from torch import Tensor

from qoq.checkpoint.hf import HFSource
from qoq.errors import SourceError
from qoq.formats.scheme import QuantScheme, WeightFormat
from qoq.models.anatomy import EMBED, FINAL_NORM, LM_HEAD
from qoq.models.config import ModelConfig
from qoq.quantize import rotate
from qoq.quantize.grids import make_grid, pack
from qoq.quantize.recipe import Recipe

ROWS = 8192  # of the vocabulary, handled at a time


def embed(source: HFSource, recipe: Recipe) -> Tensor:
    """The embedding [V, H] as stored: rotated with the residual stream; fp16, fp32 if too large."""
    table = read(source, EMBED)
    half = _stored(table, recipe, torch.float16)
    return half if bool(torch.isfinite(half).all()) else _stored(table, recipe, torch.float32)


def _stored(table: Tensor, recipe: Recipe, dtype: torch.dtype) -> Tensor:
    # Slice by slice: an fp32 or fp64 copy of a whole vocabulary would be the peak of the job.
    parts = (rotate.rotate_rows(p) if recipe.rotate else p for p in table.split(ROWS))
    return torch.cat([part.to(dtype) for part in parts])


def head_tensors(
    source: HFSource, config: ModelConfig, scheme: QuantScheme, recipe: Recipe
) -> dict[str, Tensor]:
    """Final norm and lm_head (untied), gain folded in if rotated; int8 to nearest, or fp16."""
    gain = read(source, FINAL_NORM).to(torch.float32)
    table = read(source, EMBED if config.tie_word_embeddings else f"{LM_HEAD}.weight")
    parts: list[dict[str, Tensor]] = []
    for rows in table.split(ROWS):
        weight = rows.to(torch.float32)
        if recipe.rotate:
            weight = rotate.rotate_rows(weight * gain)
        if scheme.lm_head.bits == 16:
            parts.append({"weight": weight.to(torch.float16)})
            continue
        fmt = WeightFormat(8)
        grid = make_grid(weight, fmt, None)
        parts.append(pack(grid.codes(weight), grid, fmt).tensors())
    tensors = {f"{LM_HEAD}.{n}": torch.cat([part[n] for part in parts]) for n in parts[0]}
    tensors[FINAL_NORM] = torch.ones_like(gain) if recipe.rotate else gain
    return tensors


def read(source: HFSource, name: str) -> Tensor:
    """A tensor of the source, proven to hold numbers only: NaN would spread without a word."""
    tensor = source.get(name)
    low, high = tensor.aminmax()  # both are NaN where any element is
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        raise SourceError(
            f"Tensor {name} of {source.path} holds NaN or infinite values, so the model is damaged "
            "or its training diverged. Download it again."
        )
    return tensor
