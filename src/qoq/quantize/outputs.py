"""Block outputs: smoothing of o_proj and down_proj, and channel reordering (QServe sections 4.3).

A channel's scale moves from the producer's rows into the consumer's columns (up -> down, v -> o),
or all channels are put in order of magnitude so that groups hold like with like. Under GQA the
query heads that read one KV head share its factors and its order.
"""

import torch
from torch import Tensor

from qoq.formats.activation import quantize_per_token
from qoq.formats.affine import affine_dequantize, affine_quantize
from qoq.formats.scheme import QuantScheme
from qoq.models.anatomy import PAIRS
from qoq.quantize.block import Block
from qoq.quantize.grids import make_grid
from qoq.quantize.statistics import LayerStatistics

GATE_PROJ, O_PROJ = "mlp.gate_proj", "self_attn.o_proj"
SEARCH_ROWS, SEARCH_OUTPUTS = 512, 512  # tokens and output channels that judge a factor
_TINY = 1e-8


def smooth_output(
    block: Block,
    stats: LayerStatistics,
    consumer: str,
    candidates: tuple[tuple[float, float], ...],
    scheme: QuantScheme,
) -> None:
    """s = absmax(X)^alpha / absmax(W)^beta per input channel; columns * s, producer rows / s.

    One candidate: applied as it is. Several: the one with the least output error on sampled tokens
    under the scheme's formats (round to nearest), doing nothing included. Updates ``stats``.
    """
    weight = block.weight(consumer)
    x_max = _shared(block, consumer, stats.absmax[consumer])
    w_max = _shared(block, consumer, weight.abs().amax(dim=0))
    factors = [torch.ones_like(x_max)] if len(candidates) > 1 else []
    for alpha, beta in candidates:
        log = alpha * x_max.clamp(min=_TINY).log() - beta * w_max.clamp(min=_TINY).log()
        factor = (log - log.mean()).exp()
        dead = (x_max <= _TINY) | (w_max <= _TINY) | ~torch.isfinite(factor)
        factors.append(torch.where(dead, torch.ones_like(factor), factor))
    rows = stats.sample(consumer)
    rows = rows[:: max(1, len(rows) // SEARCH_ROWS)]
    best = 0
    if len(factors) > 1:
        errors = [_output_error(block, stats, consumer, rows, f, scheme) for f in factors]
        best = min(range(len(errors)), key=errors.__getitem__)
    names = [(0.0, 0.0), *candidates] if len(candidates) > 1 else list(candidates)
    block.notes[f"smooth {consumer}"] = list(names[best])
    _apply(block, stats, consumer, factors[best])


def reorder(block: Block, stats: LayerStatistics, consumer: str) -> None:
    """Sort a consumer's input channels by absmax, ascending; o_proj within each KV head."""
    producer = _producer(consumer)
    x_max = _shared(block, consumer, stats.absmax[consumer])
    if consumer == O_PROJ:
        config, dim = block.config, block.config.head_dim
        group = config.num_heads // config.num_kv_heads
        per_head = x_max.reshape(config.num_kv_heads, group, dim)[:, 0]
        order = torch.argsort(per_head, dim=1, stable=True)  # [Hkv, D]
        kv_heads = torch.arange(config.num_kv_heads, device=order.device)[:, None] * dim
        rows = (order + kv_heads).flatten()
        heads = torch.arange(config.num_heads, device=order.device)[:, None] * dim
        columns = (order.repeat_interleave(group, dim=0) + heads).flatten()
        _permute_rows(block, producer, rows)
        values = stats.samples["values"]
        stats.samples["values"] = [v.flatten(1)[:, rows].reshape(v.shape) for v in values]
    else:
        columns = torch.argsort(x_max, stable=True)
        _permute_rows(block, producer, columns)
        _permute_rows(block, GATE_PROJ, columns)
    block.tensors[f"{consumer}.weight"] = block.weight(consumer)[:, columns].contiguous()
    stats.absmax[consumer] = stats.absmax[consumer][columns]
    stats.samples[consumer] = [x[:, columns] for x in stats.samples[consumer]]


def _producer(consumer: str) -> str:
    return next(producer for producer, reader in PAIRS if reader == consumer)


def _permute_rows(block: Block, linear: str, rows: Tensor) -> None:
    for name in (f"{linear}.weight", f"{linear}.bias"):
        if name in block.tensors:
            block.tensors[name] = block.tensors[name][rows].contiguous()


def _shared(block: Block, consumer: str, per_channel: Tensor) -> Tensor:
    """Maximum over the query heads of a KV head, spread back over them; [K] either way."""
    if consumer != O_PROJ:
        return per_channel
    config = block.config
    grouped = per_channel.reshape(config.num_kv_heads, -1, config.head_dim)
    return grouped.amax(dim=1, keepdim=True).expand_as(grouped).flatten()


def _output_error(
    block: Block,
    stats: LayerStatistics,
    consumer: str,
    rows: Tensor,
    factor: Tensor,
    scheme: QuantScheme,
) -> float:
    """Squared output error on rows [n, K] after this factor, all formats of the scheme applied."""
    weight = _sampled_outputs(block, consumer)
    x, w = rows / factor, weight * factor
    if scheme.act_bits == 8:
        x = quantize_per_token(x).dequantize()
    if scheme.weight.bits < 16:
        grid = make_grid(w, scheme.weight, None)
        w = grid.values(grid.codes(w))
    error = float((x @ w.T - rows @ weight.T).square().mean())
    if consumer == O_PROJ and scheme.kv.v_bits < 16:
        error += _value_error(block, stats, factor, scheme.kv.v_bits)
    return error


def _sampled_outputs(block: Block, consumer: str) -> Tensor:
    """Some hundred evenly spaced rows of a weight: enough to rank factors by their error."""
    weight = block.weight(consumer)
    return weight[:: max(1, len(weight) // SEARCH_OUTPUTS)]


def _value_error(block: Block, stats: LayerStatistics, factor: Tensor, bits: int) -> float:
    """Squared output error of coding values alone, as if each token attended to one key.

    Mixing many keys averages coding errors out; this upper bound ranks factors all the same.
    """
    config, weight = block.config, _sampled_outputs(block, O_PROJ)
    values = stats.sample("values")
    values = values[:: max(1, len(values) // SEARCH_ROWS)]
    group = config.num_heads // config.num_kv_heads
    scale = factor.reshape(config.num_kv_heads, group, -1)[:, 0]
    decoded = affine_dequantize(*affine_quantize(values / scale, bits))
    error = (decoded * scale - values).repeat_interleave(group, dim=1).flatten(1)
    return float((error @ weight.T).square().mean())


def _apply(block: Block, stats: LayerStatistics, consumer: str, factor: Tensor) -> None:
    producer = _producer(consumer)
    block.scale_inputs(consumer, factor)
    rows = factor
    if consumer == O_PROJ:
        config = block.config
        rows = factor.reshape(config.num_kv_heads, -1, config.head_dim)[:, 0].flatten()
        scale = rows.reshape(config.num_kv_heads, config.head_dim)
        stats.samples["values"] = [v / scale for v in stats.samples["values"]]
    block.scale_outputs(producer, 1 / rows)
    stats.absmax[consumer] = stats.absmax[consumer] / factor
    stats.samples[consumer] = [x / factor for x in stats.samples[consumer]]
