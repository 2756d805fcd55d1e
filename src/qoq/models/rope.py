"""Rotary position embeddings: cosines and sines for given positions, for every RoPE type we honour.

The formulas are those of the models' own training code (linear and dynamic-NTK interpolation,
Llama-3.1's frequency bands, YaRN), evaluated per token, so that a row never depends on its batch.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True)
class RopeConfig:
    """RoPE of one model; ``head_dim`` is fully rotated (partial rotary is refused by the config).

    ``original_max_positions`` is the context the frequencies were trained for: the bound beyond
    which ``dynamic`` stretches, and the reference length of ``llama3`` and ``yarn``.
    ``attention_scale`` multiplies cosine and sine (YaRN's temperature; 1 elsewhere).
    """

    head_dim: int
    theta: float = 10000.0
    type: str = "default"
    factor: float = 1.0
    original_max_positions: int = 2048
    attention_scale: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


def yarn_attention_scale(
    factor: float, mscale: float | None = None, mscale_all_dim: float | None = None
) -> float:
    """YaRN's attention temperature when the config does not state it (YaRN section 3.4)."""

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if mscale and mscale_all_dim:
        return scale(mscale) / scale(mscale_all_dim)
    return scale(1.0)


@lru_cache(maxsize=16)  # every pass asks, and a GPU would have to be handed them anew
def inverse_frequencies(config: RopeConfig, device: torch.device | str = "cpu") -> Tensor:
    """fp32 [head_dim/2] radians per position, inside the trained context for ``dynamic``."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    freqs = 1.0 / (config.theta**exponent)
    if config.type == "linear":
        freqs = freqs / config.factor
    elif config.type == "llama3":
        freqs = _llama3(freqs, config)
    elif config.type == "yarn":
        freqs = _yarn(freqs, config)
    return freqs.to(device)


def cos_sin(config: RopeConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine fp32 [T, head_dim/2] for positions int64 [T], times the attention scale.

    A token's row depends on its own position only. For ``dynamic`` that means the base frequency
    of token t is the one for a sequence of t + 1 tokens, as in incremental decoding.
    """
    freqs = inverse_frequencies(config, positions.device)
    if config.type == "dynamic":
        freqs = _dynamic(freqs, config, positions)
    # The angle is rounded to fp32 (as in training) but its cosine is taken in fp64: then the fp32
    # result is the same whatever vector width or batch position it is computed at.
    angle = (positions.to(torch.float32)[:, None] * freqs).to(torch.float64)
    scale = config.attention_scale
    return (angle.cos() * scale).to(torch.float32), (angle.sin() * scale).to(torch.float32)


def _dynamic(freqs: Tensor, config: RopeConfig, positions: Tensor) -> Tensor:
    """Dynamic NTK: [T, head_dim/2]; beyond the trained context theta grows with the position."""
    dim, trained = config.head_dim, config.original_max_positions
    length = (positions.to(torch.float64) + 1).clamp(min=trained)
    growth = (config.factor * length / trained - (config.factor - 1)) ** (dim / (dim - 2))
    exponent = torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim
    stretched = 1.0 / (config.theta * growth)[:, None] ** exponent
    return torch.where(length[:, None] > trained, stretched.to(torch.float32), freqs)


def _llama3(freqs: Tensor, config: RopeConfig) -> Tensor:
    """Llama 3.1: long wavelengths are divided by factor, short ones kept, a smooth band between."""
    trained, low, high = (
        config.original_max_positions,
        config.low_freq_factor,
        config.high_freq_factor,
    )
    wavelength = 2 * math.pi / freqs
    # 0 where the wavelength exceeds trained/low, 1 where it is below trained/high.
    keep = ((trained / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * freqs / config.factor + keep * freqs


def _yarn(freqs: Tensor, config: RopeConfig) -> Tensor:
    """YaRN: interpolate pairs that turn fewer than beta_slow times, keep those over beta_fast."""
    dim = config.head_dim

    def pair_turning(times: float) -> float:
        """The (real-valued) pair index that makes ``times`` turns over the trained context."""
        turns = config.original_max_positions / (times * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(config.theta))

    low, high = pair_turning(config.beta_fast), pair_turning(config.beta_slow)
    if config.truncate:
        low, high = float(math.floor(low)), float(math.ceil(high))
    low, high = max(low, 0.0), min(high, dim - 1.0)
    if low == high:
        high += 0.001
    interpolate = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return freqs / config.factor * interpolate + freqs * (1 - interpolate)
