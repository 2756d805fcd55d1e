"""Keys made easy to code in 4 bits: centering and SmoothAttention (QServe section 4.2).

Centering is ours: softmax is invariant to a vector subtracted from all keys of a head, so the
calibrated mean key is taken off before quantization and nothing is added back. The mean is that
before RoPE, turned by RoPE and averaged over ``CENTER_CONTEXT`` positions: what a key of a full
context is on average, however short the calibration texts are. SmoothAttention moves scale from
keys to queries, one factor per RoPE pair (so that it commutes with RoPE) and KV head.
"""

import torch
from torch import Tensor

from qoq.formats.affine import affine_dequantize, affine_quantize
from qoq.kernels.kv_append import apply_rope
from qoq.models.rope import cos_sin
from qoq.quantize.block import Block
from qoq.quantize.statistics import LayerStatistics

CENTER_CONTEXT = 4096
Q_PROJ, K_PROJ = "self_attn.q_proj", "self_attn.k_proj"


def key_center(block: Block, stats: LayerStatistics) -> Tensor:
    """fp32 [Hkv, D]: the mean key over positions 0..min(max_positions, CENTER_CONTEXT) - 1."""
    if stats.k_sum is None:
        raise ValueError("no keys were observed")
    mean = (stats.k_sum / stats.tokens).to(torch.float32)
    length = min(block.config.max_positions, CENTER_CONTEXT)
    cos, sin = cos_sin(block.config.rope, torch.arange(length, device=mean.device))
    total = torch.zeros_like(mean, dtype=torch.float64)
    for start in range(0, length, 512):
        part = slice(start, start + 512)
        rows = cos[part].shape[0]
        turned = apply_rope(mean.expand(rows, -1, -1), cos[part], sin[part])
        total += turned.sum(dim=0, dtype=torch.float64)
    return (total / length).to(torch.float32)


def smooth_attention(
    block: Block,
    stats: LayerStatistics,
    candidates: tuple[tuple[float, float], ...],
    bits: int,
    center: Tensor | None,
) -> Tensor:
    """Scale keys down and queries up by one factor per RoPE pair; return it, fp32 [Hkv, D].

    lambda = absmax(K)^alpha / absmax(Q)^beta, of keys less ``center``. One candidate: applied as
    it is. Several: each KV head takes the one with the least error of its scores under ``bits``-bit
    keys, doing nothing included. With q/k norms the factor folds into their gains and is shared by
    all heads.
    """
    shared = block.config.qk_norm
    keys = stats.sample("keys")
    base = torch.zeros_like(keys[0]) if center is None else center
    k_max = stats.absmax["k"] if center is None else (keys - base).abs().amax(dim=0)
    factors = [_factor(k_max, stats.absmax["q"], a, b, shared) for a, b in candidates]
    if len(candidates) > 1:
        factors.insert(0, torch.ones_like(base))
    errors = torch.stack(
        [_score_error(keys, base, f, bits, stats, block.k_rotation) for f in factors]
    )
    if shared:
        errors = errors.sum(dim=1, keepdim=True).expand_as(errors)
    best = errors.argmin(dim=0)
    factor = torch.stack(factors)[best, torch.arange(len(best))]
    names = [(0.0, 0.0), *candidates] if len(candidates) > 1 else list(candidates)
    block.notes["smooth_attention"] = [list(names[int(i)]) for i in best]
    _fold(block, factor)
    stats.samples["keys"] = [part / factor for part in stats.samples["keys"]]
    return factor


def _factor(k_max: Tensor, q_max: Tensor, alpha: float, beta: float, shared: bool) -> Tensor:
    """lambda [Hkv, D], equal within RoPE pairs (i, i + D/2), mean 1 in the logarithm."""
    half = k_max.shape[1] // 2

    def paired(x: Tensor) -> Tensor:
        x = torch.maximum(x[:, :half], x[:, half:])
        return x.amax(dim=0, keepdim=True).expand_as(x) if shared else x

    log = alpha * paired(k_max).clamp(min=1e-8).log() - beta * paired(q_max).clamp(min=1e-8).log()
    # One factor for a whole head changes nothing but the size of numbers: keep it near 1.
    factor = (log - log.mean(dim=1, keepdim=True)).exp()
    factor = torch.where(torch.isfinite(factor) & (factor > 0), factor, torch.ones_like(factor))
    return torch.cat([factor, factor], dim=1)


def _score_error(
    keys: Tensor,
    center: Tensor,
    factor: Tensor,
    bits: int,
    stats: LayerStatistics,
    rotation: Tensor | None,
) -> Tensor:
    """Mean squared error of q.k [Hkv] when keys [n, Hkv, D] are coded after this factor."""
    if stats.q_moment is None:
        raise ValueError("no queries were observed")
    moved = (keys - center) / factor
    coded = moved if rotation is None else moved @ rotation
    decoded = affine_dequantize(*affine_quantize(coded, bits))
    back = decoded if rotation is None else decoded @ rotation.T
    error = ((back - moved) * factor).transpose(0, 1)  # [Hkv, n, D], in units of the old keys
    return ((error @ stats.q_moment) * error).mean(dim=(1, 2))


def _fold(block: Block, factor: Tensor) -> None:
    """Keys / factor, queries * factor; in the q/k norm gains where there are such norms."""
    if block.config.qk_norm:
        one = factor[0]
        block.tensors["self_attn.k_norm.weight"] = block.tensors["self_attn.k_norm.weight"] / one
        block.tensors["self_attn.q_norm.weight"] = block.tensors["self_attn.q_norm.weight"] * one
        return
    group = block.config.num_heads // block.config.num_kv_heads
    block.scale_outputs(K_PROJ, 1 / factor.flatten())
    block.scale_outputs(Q_PROJ, factor.repeat_interleave(group, dim=0).flatten())
