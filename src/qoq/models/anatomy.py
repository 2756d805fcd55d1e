"""Anatomy: which linears read which norm, which feed which, and every tensor's name and shape.

Data that the quantization passes and the loaders walk (QServe figure 8). Names are those of
Hugging Face checkpoints; ``self_attn.q_proj`` and the like are relative to a layer.
"""

from dataclasses import dataclass

import torch

from qoq.errors import UnsupportedModelError
from qoq.formats.scheme import QuantScheme, WeightFormat
from qoq.models.config import ModelConfig

EMBED = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head"

# Norm -> the linears that read its output.
NORM_READERS: dict[str, tuple[str, ...]] = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
# Linears whose output is added to the residual stream.
RESIDUAL_WRITERS: tuple[str, ...] = ("self_attn.o_proj", "mlp.down_proj")
# Producer -> consumer: a scale or permutation of the producer's outputs can be undone in the
# consumer's inputs (v and o: within a head, shared by the query heads of its group).
PAIRS: tuple[tuple[str, str], ...] = (
    ("self_attn.v_proj", "self_attn.o_proj"),
    ("mlp.up_proj", "mlp.down_proj"),
)
# Input tap of the decoder -> the linears multiplied by it, stacked along N in this order.
INPUTS: dict[str, tuple[str, ...]] = {
    "qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o_proj": ("self_attn.o_proj",),
    "gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "down_proj": ("mlp.down_proj",),
}


@dataclass(frozen=True)
class LinearSpec:
    """One linear of a layer: weight [out_features, in_features], relative name, input tap."""

    name: str
    out_features: int
    in_features: int
    bias: bool
    input: str


def layer_prefix(index: int) -> str:
    """``model.layers.3.`` for index 3."""
    return f"model.layers.{index}."


def layer_linears(config: ModelConfig) -> tuple[LinearSpec, ...]:
    """The seven linears of a layer, in the order a token meets them."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q, kv = config.q_size, config.kv_size
    return (
        LinearSpec("self_attn.q_proj", q, hidden, config.qkv_bias, "qkv_proj"),
        LinearSpec("self_attn.k_proj", kv, hidden, config.qkv_bias, "qkv_proj"),
        LinearSpec("self_attn.v_proj", kv, hidden, config.qkv_bias, "qkv_proj"),
        LinearSpec("self_attn.o_proj", hidden, q, config.o_bias, "o_proj"),
        LinearSpec("mlp.gate_proj", inner, hidden, config.mlp_bias, "gate_up_proj"),
        LinearSpec("mlp.up_proj", inner, hidden, config.mlp_bias, "gate_up_proj"),
        LinearSpec("mlp.down_proj", hidden, inner, config.mlp_bias, "down_proj"),
    )


def layer_norms(config: ModelConfig) -> dict[str, int]:
    """Norm name relative to the layer -> length of its gain."""
    norms = dict.fromkeys(NORM_READERS, config.hidden_size)
    if config.qk_norm:
        norms |= {"self_attn.q_norm": config.head_dim, "self_attn.k_norm": config.head_dim}
    return norms


def source_layer_tensors(config: ModelConfig, index: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a layer in a full-precision checkpoint."""
    prefix = layer_prefix(index)
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}{norm}.weight": (size,) for norm, size in layer_norms(config).items()
    }
    for spec in layer_linears(config):
        shapes[f"{prefix}{spec.name}.weight"] = (spec.out_features, spec.in_features)
        if spec.bias:
            shapes[f"{prefix}{spec.name}.bias"] = (spec.out_features,)
    return shapes


def source_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor a full-precision checkpoint must hold."""
    shapes: dict[str, tuple[int, ...]] = {EMBED: (config.vocab_size, config.hidden_size)}
    for index in range(config.num_layers):
        shapes |= source_layer_tensors(config, index)
    shapes[FINAL_NORM] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        shapes[f"{LM_HEAD}.weight"] = (config.vocab_size, config.hidden_size)
    return shapes


# Name -> (shape, dtype); None stands for any of fp32, fp16 and bf16.
PackedTensors = dict[str, tuple[tuple[int, ...], torch.dtype | None]]


def packed_linear_tensors(name: str, out: int, inp: int, fmt: WeightFormat) -> PackedTensors:
    """The tensors that store weight [out, inp] in ``fmt`` under ``name``.

    Raises UnsupportedModelError if the format's groups or nibbles don't divide ``inp``.
    """
    if fmt.bits == 16:
        return {f"{name}.weight": ((out, inp), None)}
    if fmt.bits == 8:
        return {
            f"{name}.codes": ((out, inp), torch.int8),
            f"{name}.scale": ((out,), torch.float32),
        }
    group = fmt.group_size
    if inp % (group or 2):
        what = f"groups of {group}" if group else "pairs of 4-bit codes"
        raise UnsupportedModelError(
            f"{name} has {inp} input channels, no multiple of {group or 2}: {what} don't divide "
            "it. Choose a scheme with smaller groups or per-channel scales."
        )
    codes = {f"{name}.codes": ((out, inp // 2), torch.uint8)}
    if group is None:
        return {
            **codes,
            f"{name}.scale": ((out,), torch.float32),
            f"{name}.offset": ((out,), torch.float32),
        }
    return {
        **codes,
        f"{name}.channel_scale": ((out,), torch.float32),
        f"{name}.group_scale": ((out, inp // group), torch.uint8),
        f"{name}.group_offset": ((out, inp // group), torch.int8),
    }


def packed_layer_tensors(
    config: ModelConfig, scheme: QuantScheme, index: int, k_center: bool
) -> PackedTensors:
    """Every tensor of one layer of a packed checkpoint; norm gains, biases, centers are fp32."""
    prefix = layer_prefix(index)
    tensors: PackedTensors = {
        f"{prefix}{norm}.weight": ((size,), torch.float32)
        for norm, size in layer_norms(config).items()
    }
    for spec in layer_linears(config):
        name = prefix + spec.name
        tensors |= packed_linear_tensors(name, spec.out_features, spec.in_features, scheme.weight)
        if spec.bias:
            tensors[f"{name}.bias"] = ((spec.out_features,), torch.float32)
    if k_center:
        shape = (config.num_kv_heads, config.head_dim)
        tensors[f"{prefix}self_attn.k_center"] = (shape, torch.float32)
    return tensors


def packed_tensors(config: ModelConfig, scheme: QuantScheme, k_center: bool) -> PackedTensors:
    """Every tensor of a finished packed checkpoint; the head is always stored, never tied."""
    tensors: PackedTensors = {EMBED: ((config.vocab_size, config.hidden_size), None)}
    for index in range(config.num_layers):
        tensors |= packed_layer_tensors(config, scheme, index, k_center)
    tensors[FINAL_NORM] = ((config.hidden_size,), torch.float32)
    return tensors | packed_linear_tensors(
        LM_HEAD, config.vocab_size, config.hidden_size, scheme.lm_head
    )
