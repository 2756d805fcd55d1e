"""The way of one block: its passes in order, then its linears packed one stage after another."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from qoq.formats.scheme import QuantScheme
from qoq.formats.weights import PackedWeight
from qoq.models.anatomy import INPUTS, layer_prefix
from qoq.models.decoder import DecoderLayer
from qoq.models.layers import Linear
from qoq.quantize import rotate
from qoq.quantize.block import Block
from qoq.quantize.keys import key_center, smooth_attention
from qoq.quantize.linears import Moments, quantize_linear
from qoq.quantize.outputs import reorder, smooth_output
from qoq.quantize.recipe import Recipe
from qoq.quantize.replay import FLOAT_KV, STAGES, Replay, StreamReplay, values
from qoq.quantize.report import summarize
from qoq.quantize.statistics import SAMPLE_TOKENS, LayerStatistics

Step = Callable[[str], None]
"""Told the name of every finished part of a block (see ``BLOCK_STEPS``)."""

BLOCK_STEPS = ("statistics", *STAGES, "output")
# The fields of DecoderLayer that hold a stage's linears.
_FIELDS = {"qkv_proj": "qkv", "o_proj": "o", "gate_up_proj": "gate_up", "down_proj": "down"}
_STREAM_WRITERS = ("o_proj", "down_proj")


def quantize_block(
    block: Block, replay: Replay | None, scheme: QuantScheme, recipe: Recipe, step: Step
) -> dict[str, Tensor]:
    """A float block -> its checkpoint tensors by full name, passes in the paper's order.

    ``replay`` is None where the recipe needs no data. Else the streams' input rows of this layer
    must lie in its files; those of the next layer do afterwards. ``block.notes`` tells what
    happened.
    """
    prepare(block, recipe)
    if replay is None:
        packed = {
            name: _pack(block, name, None, scheme, recipe)
            for part in INPUTS.values()
            for name in part
        }
        return _checkpoint_tensors(block, packed)
    reference = "float" if recipe.compensate else "quant"
    statistics = observe(block, StreamReplay(replay, reference, block.float_layer(), FLOAT_KV))
    block.notes["before"] = summarize(block, statistics)
    transform(block, statistics, scheme, recipe)
    block.notes["after"] = summarize(block, statistics)
    step("statistics")
    del statistics
    return _checkpoint_tensors(block, _pack_stages(block, replay, scheme, recipe, step))


def prepare(block: Block, recipe: Recipe) -> None:
    """The function-preserving passes that need no data."""
    if recipe.rotate:
        rotate.fold_norms(block)
        rotate.rotate_residual(block)


def observe(block: Block, stream: StreamReplay) -> LayerStatistics:
    """Run the float block over all chunks and keep what the scaling passes need."""
    tokens = stream.replay.tokens
    statistics = LayerStatistics(block.config, max(1, tokens // SAMPLE_TOKENS))
    for chunk in stream.replay.chunks():
        see = partial(statistics.add_heads, cos=chunk.cos, sin=chunk.sin)
        mixed, _ = stream.o_input(chunk, see)
        statistics.add_inputs("self_attn.o_proj", values(mixed))
        stream.gate_up_input(chunk)
        statistics.add_inputs("mlp.down_proj", values(stream.down_input(chunk)[0]))
    return statistics


def transform(
    block: Block, statistics: LayerStatistics, scheme: QuantScheme, recipe: Recipe
) -> None:
    """The scaling passes, each function-preserving in full precision."""
    if scheme.kv.k_bits < 16:
        center = key_center(block, statistics) if recipe.center_keys else None
        if recipe.smooth_attention:
            factor = smooth_attention(
                block, statistics, recipe.smooth_attention, scheme.kv.k_bits, center
            )
            center = None if center is None else center / factor
        block.k_center = center
    for consumer in recipe.smooth_outputs:
        smooth_output(block, statistics, consumer, recipe.smooth_output_alphas, scheme)
    if recipe.rotate_heads:
        rotate.rotate_heads(block)
        statistics.rotate_heads("self_attn.o_proj")
    for consumer in recipe.reorder:
        reorder(block, statistics, consumer)


def _pack_stages(
    block: Block, replay: Replay, scheme: QuantScheme, recipe: Recipe, step: Step
) -> dict[str, PackedWeight | Tensor]:
    """Quantize stage by stage, each from what the stages before it really give."""
    float_layer = block.float_layer()
    fields = {
        name: replace(getattr(float_layer, name), act_bits=scheme.act_bits)
        for name in _FIELDS.values()
    }
    k_rotation = block.k_rotation if scheme.kv.k_bits < 16 else None
    layer = replace(float_layer, k_center=block.k_center, k_rotation=k_rotation, **fields)
    quant = StreamReplay(replay, "quant", layer, scheme.kv)
    reference = StreamReplay(replay, "float", float_layer, FLOAT_KV) if recipe.compensate else None
    packed: dict[str, PackedWeight | Tensor] = {}
    for tap, stage in STAGES.items():
        moments = Moments()
        for chunk in replay.chunks():
            entering, residual = stage(quant, chunk)
            if reference is None:
                moments.add(values(entering), None, None)
                continue
            ideal, stream = stage(reference, chunk)
            drift = stream - residual if tap in _STREAM_WRITERS else None
            moments.add(values(entering), values(ideal), drift)
        for name in INPUTS[tap]:
            packed[name] = _pack(block, name, moments, scheme, recipe)
        quant.layer = _install(quant.layer, tap, packed)
        step(tap)
    for chunk in replay.chunks():
        quant.finish(chunk)
        if reference is not None:
            reference.finish(chunk)
    for stream_replay in (quant, reference):
        if stream_replay is not None:
            stream_replay.clean()
    step("output")
    return packed


def _pack(
    block: Block, name: str, moments: Moments | None, scheme: QuantScheme, recipe: Recipe
) -> PackedWeight | Tensor:
    weight = block.weight(name)
    if scheme.weight.bits == 16:
        return weight
    packed, errors = quantize_linear(weight, moments, scheme.weight, recipe)
    block.notes.setdefault("errors", {})[name] = errors  # type: ignore[index]
    return packed


def _install(
    layer: DecoderLayer, tap: str, packed: dict[str, PackedWeight | Tensor]
) -> DecoderLayer:
    """The layer with a stage's linears replaced by their packed form."""
    parts = [packed[name] for name in INPUTS[tap]]
    if isinstance(parts[0], Tensor):
        return layer
    old: Linear = getattr(layer, _FIELDS[tap])
    weight: Any = parts[0] if len(parts) == 1 else type(parts[0]).stack(parts)  # type: ignore[arg-type]
    return replace(layer, **{_FIELDS[tap]: Linear(weight, old.bias, old.act_bits)})  # type: ignore[arg-type]


def _checkpoint_tensors(
    block: Block, packed: dict[str, PackedWeight | Tensor]
) -> dict[str, Tensor]:
    """Everything a checkpoint holds of this block, by full name."""
    prefix = layer_prefix(block.index)
    out: dict[str, Tensor] = {}
    for name, tensor in block.tensors.items():
        if name.removesuffix(".weight") not in packed:  # norms and biases
            out[prefix + name] = tensor
    for name, weight in packed.items():
        if isinstance(weight, Tensor):
            out[f"{prefix}{name}.weight"] = weight
        else:
            out |= {f"{prefix}{name}.{field}": t for field, t in weight.tensors().items()}
    if block.k_center is not None:
        out[f"{prefix}self_attn.k_center"] = block.k_center
    return {name: t.to("cpu").contiguous() for name, t in out.items()}
