"""Golden bytes: what docs/checkpoint-format.md promises, byte by byte, in both directions."""

from pathlib import Path

import torch
from torch import Tensor

from qoq.checkpoint.manifest import make_manifest
from qoq.checkpoint.packed import PackedCheckpoint
from qoq.checkpoint.writer import CheckpointWriter
from qoq.formats.packing import pack_nibbles
from qoq.formats.scheme import QuantScheme
from qoq.formats.weights import ChannelWeight, GroupWeight, Int8Weight, PackedWeight

DOWN = "model.layers.0.mlp.down_proj"


def packed(codes: list[list[int]]) -> Tensor:
    return pack_nibbles(torch.tensor(codes, dtype=torch.uint8))


GROUP = GroupWeight(
    codes=packed([[*range(16), *range(16)], [*range(15, -1, -1), 1, 0, *[7, 9] * 7]]),
    channel_scale=torch.tensor([0.5, 0.0078125]),
    group_scale=torch.tensor([[1], [15]], dtype=torch.uint8),
    group_offset=torch.tensor([[-8], [-119]], dtype=torch.int8),
)
GROUP_FILE = (
    bytes.fromhex("9801000000000000")  # header length 408
    + b'{"__metadata__":{"format":"pt"},'
    b'"model.layers.0.mlp.down_proj.channel_scale":'
    b'{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
    b'"model.layers.0.mlp.down_proj.group_offset":'
    b'{"dtype":"I8","shape":[2,1],"data_offsets":[8,10]},'
    b'"model.layers.0.mlp.down_proj.codes":'
    b'{"dtype":"U8","shape":[2,16],"data_offsets":[10,42]},'
    b'"model.layers.0.mlp.down_proj.group_scale":'
    b'{"dtype":"U8","shape":[2,1],"data_offsets":[42,44]}}  '
    + bytes.fromhex(
        "0000003f 0000003c"  # channel_scale 0.5, 2^-7
        "f8 89"  # group_offset -8, -119
        "1032547698badcfe 1032547698badcfe"  # row 0: codes 0 and 1 in byte 10, ...
        "efcdab8967452301 0197979797979797"  # row 1: 15 low and 14 high in byte ef; 1, 0; 7, 9
        "01 0f"  # group_scale 1, 15
    )
)
CHANNEL = ChannelWeight(
    codes=packed([[0, 1, 15, 8]]), scale=torch.tensor([0.25]), offset=torch.tensor([-1.5])
)
CHANNEL_FILE = (
    bytes.fromhex("2801000000000000")  # header length 296
    + b'{"__metadata__":{"format":"pt"},'
    b'"model.layers.0.mlp.down_proj.offset":'
    b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
    b'"model.layers.0.mlp.down_proj.scale":'
    b'{"dtype":"F32","shape":[1],"data_offsets":[4,8]},'
    b'"model.layers.0.mlp.down_proj.codes":'
    b'{"dtype":"U8","shape":[1,2],"data_offsets":[8,10]}}   '
    + bytes.fromhex("0000c0bf 0000803e 108f")  # offset -1.5, scale 0.25, codes 0 1 15 8
)
HEAD = Int8Weight(torch.tensor([[-127, 0, 5]], dtype=torch.int8), torch.tensor([2.0]))
HEAD_FILE = (
    bytes.fromhex("a800000000000000")  # header length 168
    + b'{"__metadata__":{"format":"pt"},'
    b'"lm_head.scale":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
    b'"lm_head.codes":{"dtype":"I8","shape":[1,3],"data_offsets":[4,7]}}     '
    + bytes.fromhex("00000040 810005")
)
CONFIG_FILE = b"""{
  "model_type": "llama",
  "quantization_config": {
    "calibration": null,
    "format_version": 1,
    "k_rotation": null,
    "lm_head_bits": 8,
    "qoq_version": "0.0.0",
    "quant_method": "qoq",
    "recipe": {
      "passes": [
        "rotate"
      ]
    },
    "scheme": "w4a8kv4-g32",
    "seed": 7
  },
  "tie_word_embeddings": false
}
"""
INDEX_FILE = b"""{
  "metadata": {
    "total_size": 51
  },
  "weight_map": {
    "lm_head.codes": "head.safetensors",
    "lm_head.scale": "head.safetensors",
    "model.layers.0.mlp.down_proj.channel_scale": "layer-00000.safetensors",
    "model.layers.0.mlp.down_proj.codes": "layer-00000.safetensors",
    "model.layers.0.mlp.down_proj.group_offset": "layer-00000.safetensors",
    "model.layers.0.mlp.down_proj.group_scale": "layer-00000.safetensors"
  }
}
"""


def named(linear: str, weight: PackedWeight) -> dict[str, Tensor]:
    return {f"{linear}.{part}": tensor for part, tensor in weight.tensors().items()}


def test_written_bytes(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "out")
    writer.write_shard("layer-00000.safetensors", named(DOWN, GROUP))
    writer.write_shard("head.safetensors", named("lm_head", HEAD))
    manifest = make_manifest(
        QuantScheme.parse("w4a8kv4-g32"), recipe={"passes": ["rotate"]}, seed=7
    )
    out = writer.finish({"model_type": "llama"}, {**manifest, "qoq_version": "0.0.0"})
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {
        "config.json": CONFIG_FILE,
        "model.safetensors.index.json": INDEX_FILE,
        "layer-00000.safetensors": GROUP_FILE,
        "head.safetensors": HEAD_FILE,
    }


def test_read_bytes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(CONFIG_FILE)
    (tmp_path / "model.safetensors.index.json").write_bytes(INDEX_FILE)
    (tmp_path / "layer-00000.safetensors").write_bytes(GROUP_FILE)
    (tmp_path / "head.safetensors").write_bytes(HEAD_FILE)
    checkpoint = PackedCheckpoint.open(tmp_path)
    assert checkpoint.scheme == QuantScheme.parse("w4a8kv4-g32")
    weight = GroupWeight(**{p: checkpoint.get(f"{DOWN}.{p}") for p in GROUP.tensors()})
    # Row 0: (code - 8) / 2. Row 1: (15 code - 119) / 128.
    assert weight.dequantize()[0, :4].tolist() == [-4.0, -3.5, -3.0, -2.5]
    assert weight.dequantize()[1, [0, 1, 15, 16, 17, 18, 19]].tolist() == [
        (15 * code - 119) / 128 for code in (15, 14, 0, 1, 0, 7, 9)
    ]
    head = Int8Weight(checkpoint.get("lm_head.codes"), checkpoint.get("lm_head.scale"))
    assert head.dequantize().tolist() == [[-254.0, 0.0, 10.0]]


def test_per_channel_bytes(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "out")
    writer.write_shard("x.safetensors", named(DOWN, CHANNEL))
    out = writer.finish({}, make_manifest(QuantScheme.parse("w4a8kv4")))
    assert (out / "x.safetensors").read_bytes() == CHANNEL_FILE
    (out / "x.safetensors").write_bytes(CHANNEL_FILE)
    checkpoint = PackedCheckpoint.open(out)
    weight = ChannelWeight(**{p: checkpoint.get(f"{DOWN}.{p}") for p in CHANNEL.tensors()})
    assert weight.dequantize().tolist() == [[-1.5, -1.25, 2.25, 0.5]]  # code / 4 - 1.5


def test_nibble_order() -> None:
    # Element 2i lies in the low nibble of byte i, element 2i + 1 in the high one.
    assert packed([[0x1, 0x2, 0xF, 0x0]]).tolist() == [[0x21, 0x0F]]


def test_float_dtypes(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "out")
    tensors = {
        "model.norm.weight": torch.tensor([1.0, -2.0]),
        "model.embed_tokens.weight": torch.tensor([[1.0, -2.0]], dtype=torch.float16),
        "lm_head.weight": torch.tensor([[1.0, -2.0]], dtype=torch.bfloat16),
    }
    writer.write_shard("x.safetensors", tensors)
    data = (writer.partial / "x.safetensors").read_bytes()
    # The header's brace and padding; F32, then BF16, then F16; little-endian.
    assert data.endswith(bytes.fromhex("7d 20202020 0000803f 000000c0 803f00c0 003c00c0"))
