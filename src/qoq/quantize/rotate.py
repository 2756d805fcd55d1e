"""Fold norm gains, then rotate: residual stream and v/o heads (QServe section 4.2).

A Hadamard rotation spreads outliers over all channels. RMSNorm without a gain commutes with it, so
the rotation of the residual stream folds into the weights on both sides; that of a head's values
commutes with the softmax mixing and folds into v_proj and o_proj. All of it in fp64.
"""

import torch
from torch import Tensor

from qoq.formats.hadamard import rotate_last
from qoq.models.anatomy import NORM_READERS, RESIDUAL_WRITERS
from qoq.quantize.block import Block

ROWS = 4096  # rows of an embedding rotated at a time: bounds the fp64 copy


def fold_norms(block: Block) -> None:
    """Multiply each norm's gain into the linears that read it; the gain becomes ones."""
    for norm, readers in NORM_READERS.items():
        gain = block.tensors[f"{norm}.weight"]
        for linear in readers:
            folded = block.weight(linear).to(torch.float64) * gain.to(torch.float64)
            block.tensors[f"{linear}.weight"] = folded.to(torch.float32)
        block.tensors[f"{norm}.weight"] = torch.ones_like(gain)


def rotate_rows(x: Tensor) -> Tensor:
    """``x @ H`` for x [rows, hidden] in fp64, by slices of rows; fp32 result."""
    parts = [rotate_last(part.to(torch.float64)).to(torch.float32) for part in x.split(ROWS)]
    return torch.cat(parts)


def rotate_residual(block: Block) -> None:
    """Turn the stream this block reads and writes by H; norms must have been folded."""
    for readers in NORM_READERS.values():
        for linear in readers:
            block.tensors[f"{linear}.weight"] = rotate_rows(block.weight(linear))
    for linear in RESIDUAL_WRITERS:
        block.tensors[f"{linear}.weight"] = rotate_rows(block.weight(linear).T).T.contiguous()
        if f"{linear}.bias" in block.tensors:
            bias = block.tensors[f"{linear}.bias"]
            block.tensors[f"{linear}.bias"] = rotate_rows(bias[None])[0]


def rotate_heads(block: Block) -> None:
    """Turn every value head by H over head_dim, undone in o_proj's input columns."""
    dim = block.config.head_dim
    v, o = block.weight("self_attn.v_proj"), block.weight("self_attn.o_proj")
    # [Hkv*D, K] -> [K, Hkv, D] so that D is last, and back.
    turned = rotate_rows(v.T.reshape(-1, dim)).reshape(v.shape[1], v.shape[0]).T
    block.tensors["self_attn.v_proj.weight"] = turned.contiguous()
    if "self_attn.v_proj.bias" in block.tensors:
        bias = block.tensors["self_attn.v_proj.bias"]
        block.tensors["self_attn.v_proj.bias"] = rotate_rows(bias.reshape(-1, dim)).flatten()
    block.tensors["self_attn.o_proj.weight"] = rotate_rows(o.reshape(-1, dim)).reshape(o.shape)
