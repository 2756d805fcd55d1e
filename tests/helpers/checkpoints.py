"""Small packed checkpoints whose weights were really quantized, for file-format tests."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qoq.checkpoint.manifest import make_manifest
from qoq.checkpoint.writer import CheckpointWriter
from qoq.formats.affine import affine_quantize
from qoq.formats.packing import pack_nibbles
from qoq.formats.progressive import channel_scales, group_codes, group_qparams
from qoq.formats.scheme import QuantScheme, WeightFormat
from qoq.formats.weights import ChannelWeight, GroupWeight, Int8Weight, PackedWeight

HIDDEN, INNER, KV, VOCAB, LAYERS = 128, 256, 64, 37, 2
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
}


def quantize_rtn(weight: Tensor, fmt: WeightFormat, *, half: bool = True) -> PackedWeight:
    """Round-to-nearest in ``fmt``; ``half`` keeps float scales exact in fp16."""

    def scale_like(scale: Tensor) -> Tensor:
        return scale.half().float() if half else scale

    if fmt.bits == 8:
        scale = scale_like(weight.abs().amax(1) / 127 * 1.01)
        return Int8Weight((weight / scale[:, None]).round().to(torch.int8), scale)
    if fmt.group_size is None:
        codes, scale, offset = affine_quantize(weight, 4, torch.float16 if half else torch.float32)
        return ChannelWeight(pack_nibbles(codes), scale.float(), offset.float())
    scale = scale_like(channel_scales(weight) * 1.001)
    w8 = (weight / scale[:, None]).unflatten(1, (-1, fmt.group_size))
    group_scale, offset = group_qparams(w8.amin(-1), w8.amax(-1), ceil=True)
    codes = group_codes(w8, group_scale, offset)
    return GroupWeight(pack_nibbles(codes.flatten(1)), scale, group_scale, offset)


def tiny_tensors(
    scheme: QuantScheme, *, half: bool = True, bias: bool = False
) -> dict[str, Tensor]:
    """Every tensor of a two-layer checkpoint in ``scheme`` with folded norms; random weights."""
    tensors = {
        "model.embed_tokens.weight": torch.randn(VOCAB, HIDDEN).half(),
        "model.norm.weight": torch.ones(HIDDEN),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = torch.ones(HIDDEN)
        for name, shape in SHAPES.items():
            packed = quantize_rtn(torch.randn(shape) * 0.05, scheme.weight, half=half)
            tensors |= {f"{prefix}{name}.{part}": t for part, t in packed.tensors().items()}
            if bias and "self_attn" in name:
                tensors[f"{prefix}{name}.bias"] = torch.randn(shape[0]).half().float()
    head = torch.randn(VOCAB, HIDDEN) * 0.05
    if scheme.lm_head.bits == 16:
        return {**tensors, "lm_head.weight": head.half()}
    packed = quantize_rtn(head, scheme.lm_head, half=half)
    return tensors | {f"lm_head.{part}": t for part, t in packed.tensors().items()}


def write_checkpoint(
    out: Path, scheme: QuantScheme, tensors: dict[str, Tensor], **manifest: Any
) -> Path:
    """A finished checkpoint of these tensors, one shard per layer."""
    writer = CheckpointWriter(out)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        part = {name: t for name, t in tensors.items() if name.startswith(prefix)}
        if part:
            writer.write_shard(f"layer-{layer}.safetensors", part)
    rest = {name: t for name, t in tensors.items() if not name.startswith("model.layers.")}
    writer.write_shard("rest.safetensors", rest)
    return writer.finish(CONFIG, make_manifest(scheme, **manifest))
