"""Hostile checkpoints: every way to be wrong is refused, each with its own sentence."""

import contextlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.checkpoints import tiny_tensors, write_checkpoint
from qoq.checkpoint.files import is_plain_name
from qoq.checkpoint.manifest import make_manifest
from qoq.checkpoint.packed import PackedCheckpoint
from qoq.checkpoint.shard import HEADER_LIMIT, write_tensors
from qoq.checkpoint.writer import INDEX_NAME, CheckpointWriter
from qoq.errors import (
    CheckpointError,
    CheckpointIncompleteError,
    CheckpointPathError,
    CheckpointTensorError,
    CheckpointValueError,
    CheckpointVersionError,
    QoqError,
)
from qoq.formats.scheme import QuantScheme

GROUPS = QuantScheme.parse("w4a8kv4-g128")
CHANNELS = QuantScheme.parse("w4a8kv4")
UP = "model.layers.0.mlp.up_proj"
SHARD = "layer-0.safetensors"

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("t") / "c", GROUPS, tiny_tensors(GROUPS))


@pytest.fixture
def good(template: Path, tmp_path: Path) -> Path:
    return shutil.copytree(template, tmp_path / "c")


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def refuse(folder: Path, error: type[QoqError], match: str) -> None:
    with pytest.raises(error, match=match) as caught:
        PackedCheckpoint.open(folder)
    assert caught.type is error  # not a subclass: each cause has its own
    assert str(caught.value).endswith((".", "`.")), "a sentence"


def test_the_untouched_checkpoint_opens(good: Path) -> None:
    PackedCheckpoint.open(good)


# --- files ---


@pytest.mark.parametrize("name", ["config.json", INDEX_NAME, SHARD])
def test_missing_file(good: Path, name: str) -> None:
    (good / name).unlink()
    refuse(good, CheckpointIncompleteError, name.replace(".", r"\."))


@pytest.mark.parametrize("keep", [0, 3, 8, 9, 100, -1, -4096])
def test_truncated_shard(good: Path, keep: int) -> None:
    data = (good / SHARD).read_bytes()
    (good / SHARD).write_bytes(data[:keep])
    refuse(good, CheckpointIncompleteError, "truncated")


def test_bytes_after_the_end(good: Path) -> None:
    with open(good / SHARD, "ab") as file:
        file.write(b"?")
    refuse(good, CheckpointError, "1 bytes follow")


@pytest.mark.parametrize("length", [HEADER_LIMIT + 1, 1 << 40, (1 << 64) - 1])
def test_giant_header(good: Path, length: int) -> None:
    data = (good / SHARD).read_bytes()
    (good / SHARD).write_bytes(length.to_bytes(8, "little") + data[8:])
    refuse(good, CheckpointError, "claims a header of")


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"[]",
        b"{",
        b"\xff\xfe{}",
        b"[" * 200_000,
        b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},'
        b'"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
        b'{"a":3}',
        b'{"a":{"dtype":"U8","shape":[-1],"data_offsets":[0,0]}}',
        b'{"a":{"dtype":"U8","shape":[1.0],"data_offsets":[0,1]}}',
        b'{"a":{"dtype":"U8","shape":[true],"data_offsets":[0,1]}}',
        b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[4,4]}}',
        b'{"a":{"dtype":"U8","shape":[99999999999999999999],"data_offsets":[0,4]}}',
        b'{"a\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
    ],
    ids=range(13),
)
def test_damaged_header(good: Path, header: bytes) -> None:
    (good / SHARD).write_bytes(len(header).to_bytes(8, "little") + header + b" " * (not header))
    refuse(good, CheckpointError, "damaged")


def test_overlapping_tensors(good: Path) -> None:
    def entry(begin: int, end: int) -> dict[str, Any]:
        return {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}

    header = json.dumps({"a": entry(0, 4), "b": entry(2, 6)}).encode()
    (good / SHARD).write_bytes(len(header).to_bytes(8, "little") + header + bytes(6))
    refuse(good, CheckpointError, "gap or overlap before tensor b")


def test_offsets_that_lie_about_the_size(good: Path) -> None:
    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}'
    (good / SHARD).write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    refuse(good, CheckpointTensorError, "8 bytes, but data_offsets")


@pytest.mark.parametrize("name", ["config.json", INDEX_NAME])
@pytest.mark.parametrize("text", ["", "{", "[" * 200_000, '{"a": 1, "a": 2}', '{"a": 1}x'])
def test_damaged_json(good: Path, name: str, text: str) -> None:
    (good / name).write_text(text)
    refuse(good, CheckpointError, "no valid JSON")


@pytest.mark.parametrize("name", ["config.json", INDEX_NAME])
def test_json_of_another_kind(good: Path, name: str) -> None:
    (good / name).write_text("[1]")
    refuse(good, CheckpointError, "must hold a JSON object, not a list")


def test_random_damage_never_escapes(good: Path) -> None:
    rng = random.Random(torch.initial_seed())
    names = ["config.json", INDEX_NAME, SHARD]
    originals = {name: (good / name).read_bytes() for name in names}
    for _ in range(150):
        name = rng.choice(names)
        data = bytearray(originals[name])
        head = min(len(data), 4000)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(head)] = rng.choice(b'\x00\xff"{}[],:019aZ')
        (good / name).write_bytes(bytes(data))
        with contextlib.suppress(CheckpointError):
            PackedCheckpoint.open(good)
        (good / name).write_bytes(originals[name])
    PackedCheckpoint.open(good)


# --- paths ---


@pytest.mark.parametrize(
    "name",
    [
        *("../evil.safetensors", "/etc/passwd", "..", ".", "", "a/b.safetensors", "a\\b", "C:x"),
        *("x\0.safetensors", "\ud800.safetensors", "n" * 300, 3, None, ["a"], {"a": 1}),
    ],
    ids=repr,
)
def test_path_tricks_in_the_index(good: Path, name: Any) -> None:
    write_tensors(good.parent / "evil.safetensors", {f"{UP}.bias": torch.zeros(2)})
    edit_json(good / INDEX_NAME, lambda v: v["weight_map"].update({f"{UP}.bias": name}))
    refuse(good, CheckpointPathError, "plain file name")
    assert not is_plain_name(name)


def test_index_naming_another_kind_of_file(good: Path) -> None:
    edit_json(good / INDEX_NAME, lambda v: v["weight_map"].update(x="config.json"))
    refuse(good, CheckpointPathError, "no safetensors file")


@pytest.mark.parametrize("name", ["config.json", INDEX_NAME, SHARD])
def test_symlink_out_of_the_folder(good: Path, name: str) -> None:
    outside = good.parent / name
    (good / name).rename(outside)
    (good / name).symlink_to(outside)
    refuse(good, CheckpointPathError, "symlink .* outside")
    (good / name).unlink()
    (good / name).symlink_to(good.parent / "nowhere")
    with pytest.raises((CheckpointPathError, CheckpointIncompleteError)):
        PackedCheckpoint.open(good)


def test_symlink_within_the_folder(good: Path) -> None:
    (good / SHARD).rename(good / "real.bin")
    (good / SHARD).symlink_to("real.bin")
    PackedCheckpoint.open(good)


def test_a_linked_folder_opens(good: Path, tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to(good)
    PackedCheckpoint.open(tmp_path / "latest")


def test_the_hub_cache_opens_but_nothing_like_it(good: Path, tmp_path: Path) -> None:
    repo = tmp_path / "models--a--b"
    (repo / "snapshots").mkdir(parents=True)
    (repo / "blobs").mkdir()
    snapshot = repo / "snapshots" / "0123"
    good.rename(snapshot)
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(repo / "blobs" / str(number))
        path.symlink_to(Path("..", "..", "blobs", str(number)))
    PackedCheckpoint.open(snapshot)
    (repo / "refs").mkdir()
    blob = (snapshot / SHARD).resolve()
    blob.rename(repo / "refs" / "x")
    (snapshot / SHARD).unlink()
    (snapshot / SHARD).symlink_to(Path("..", "..", "refs", "x"))
    refuse(snapshot, CheckpointPathError, "outside")


def test_a_folder_instead_of_a_file(good: Path) -> None:
    (good / SHARD).unlink()
    (good / SHARD).mkdir()
    refuse(good, CheckpointIncompleteError, "no file layer-0")


# --- the index against the shards ---


def test_no_weight_map(good: Path) -> None:
    edit_json(good / INDEX_NAME, lambda v: v.pop("weight_map"))
    refuse(good, CheckpointError, "no weight_map")


def test_tensor_in_two_shards(good: Path) -> None:
    write_tensors(good / "rest.safetensors", {f"{UP}.codes": torch.zeros(1, dtype=torch.uint8)})
    refuse(good, CheckpointTensorError, "is in both layer-0.safetensors and rest.safetensors")


def test_tensor_the_index_does_not_list(good: Path) -> None:
    edit_json(good / INDEX_NAME, lambda v: v["weight_map"].pop(f"{UP}.codes"))
    refuse(good, CheckpointTensorError, "does not list")


def test_tensor_that_is_not_there(good: Path) -> None:
    edit_json(good / INDEX_NAME, lambda v: v["weight_map"].update({f"{UP}.bias": SHARD}))
    refuse(good, CheckpointTensorError, "but it is not")


def test_tensor_in_another_shard(good: Path) -> None:
    edit_json(
        good / INDEX_NAME, lambda v: v["weight_map"].update({f"{UP}.codes": "rest.safetensors"})
    )
    refuse(good, CheckpointTensorError, r"it is not; it is in layer-0\.safetensors")


# --- quantization_config ---


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda q: q.update(quant_method="awq"), CheckpointVersionError, "quant_method is 'awq'"),
        (lambda q: q.pop("quant_method"), CheckpointVersionError, "quant_method is None"),
        (lambda q: q.update(format_version=2), CheckpointVersionError, "Update it"),
        (lambda q: q.update(format_version=0), CheckpointVersionError, "Quantize the model again"),
        (lambda q: q.update(format_version=True), CheckpointVersionError, "is True"),
        (lambda q: q.update(format_version="1"), CheckpointVersionError, "is '1'"),
        (lambda q: q.pop("format_version"), CheckpointVersionError, "is None"),
        (lambda q: q.pop("scheme"), CheckpointError, "lacks scheme"),
        (lambda q: q.pop("k_rotation"), CheckpointError, "lacks k_rotation"),
        (lambda q: q.update(k_rotation="fourier"), CheckpointError, "'fourier' does not exist"),
        (lambda q: q.update(scheme="w3a8"), CheckpointError, "no scheme known here"),
        (lambda q: q.update(scheme=4), CheckpointError, "no scheme known here"),
        (lambda q: q.update(lm_head_bits=4), CheckpointError, "lm_head_bits 4"),
        (lambda q: q.update(lm_head_bits=True), CheckpointError, "lm_head_bits True"),
        (lambda q: q.update(recipe="x"), CheckpointError, "recipe must be an object"),
        (lambda q: q.update(v_rotation="x"), CheckpointError, "unknown key v_rotation"),
    ],
)
def test_manifest(
    good: Path, change: Callable[[dict[str, Any]], object], error: type[QoqError], match: str
) -> None:
    edit_json(good / "config.json", lambda v: change(v["quantization_config"]))
    refuse(good, error, match)


@pytest.mark.parametrize("value", [None, [], "qoq"])
def test_no_quantization_config(good: Path, value: Any) -> None:
    edit_json(good / "config.json", lambda v: v.update(quantization_config=value))
    refuse(good, CheckpointError, "no packed checkpoint")


def test_qserve_layout_is_told_apart(good: Path) -> None:
    theirs = {"quant_method": "qoq", "wbits": 4, "group_size": 128}
    edit_json(good / "config.json", lambda v: v.update(quantization_config=theirs))
    refuse(good, CheckpointVersionError, "qoq import-qserve")


# --- tensors ---


def rewritten(tmp_path: Path, scheme: QuantScheme, change: Callable[[Tensors], object]) -> Path:
    tensors = tiny_tensors(scheme)
    change(tensors)
    return write_checkpoint(tmp_path / "bad", scheme, tensors)


def put(name: str, make: Callable[[Tensor], Tensor]) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name] = make(tensors[name])

    return change


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop(f"{UP}.group_scale"), r"up_proj\.group_scale is missing"),
        (lambda t: t.pop(f"{UP}.channel_scale"), r"up_proj\.channel_scale is missing"),
        (lambda t: t.pop(f"{UP}.codes"), r"up_proj\.\w+ is unexpected"),
        (lambda t: t.update(extra=torch.zeros(1)), "extra is unexpected"),
        (lambda t: t.update({f"{UP}.scale": torch.ones(256)}), r"up_proj\.scale is unexpected"),
        (put(f"{UP}.codes", lambda t: t.to(torch.int8)), r"codes has dtype torch\.int8"),
        (put(f"{UP}.channel_scale", lambda t: t.half()), r"has dtype torch\.float16"),
        (put(f"{UP}.group_scale", lambda t: t.to(torch.int8)), r"must be torch\.uint8"),
        (put(f"{UP}.group_offset", lambda t: t.to(torch.uint8)), r"must be torch\.int8"),
        (put(f"{UP}.codes", lambda t: t[:, :-1]), "no multiple of its groups"),
        (put(f"{UP}.codes", lambda t: t.flatten()), "must be a matrix"),
        (put(f"{UP}.codes", lambda t: t[1:]), r"it must be \[255"),
        (put(f"{UP}.channel_scale", lambda t: t[:, None]), r"it must be \[256\]"),
        (put(f"{UP}.group_scale", lambda t: t.repeat(1, 2)), r"it must be \[256, 1\]"),
        (put("lm_head.codes", lambda t: t.view(torch.uint8)), r"must be torch\.int8"),
        (lambda t: t.update({f"{UP}.bias": torch.zeros(256).half()}), "bias has dtype"),
        (
            put("model.norm.weight", lambda t: t.to(torch.int8)),
            r"must be torch\.float32 or torch\.float16 or torch\.bfloat16",
        ),
    ],
)
def test_names_dtypes_shapes(
    tmp_path: Path, change: Callable[[Tensors], object], match: str
) -> None:
    refuse(rewritten(tmp_path, GROUPS, change), CheckpointTensorError, match)


def test_packed_where_the_scheme_says_float(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c", GROUPS, tiny_tensors(GROUPS))
    edit_json(folder / "config.json", lambda v: v["quantization_config"].update(scheme="w16a16"))
    refuse(folder, CheckpointTensorError, "keeps it in 16 bits")


def test_an_unknown_dtype(good: Path) -> None:
    header = b'{"a":{"dtype":"F8_E4M3","shape":[2],"data_offsets":[0,2]}}'
    (good / SHARD).write_bytes(len(header).to_bytes(8, "little") + header + bytes(2))
    refuse(good, CheckpointTensorError, "'F8_E4M3'; only F32")


# --- values ---


def poke(name: str, value: float) -> Callable[[Tensors], None]:
    """Put a value at a random place of a tensor."""

    def change(tensors: Tensors) -> None:
        flat = tensors[name].reshape(-1)
        flat[int(torch.randint(len(flat), ()))] = value

    return change


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "name",
    [f"{UP}.channel_scale", "lm_head.scale", "model.norm.weight", "model.embed_tokens.weight"],
)
def test_not_finite(tmp_path: Path, name: str, value: float) -> None:
    folder = rewritten(tmp_path, GROUPS, poke(name, value))
    refuse(folder, CheckpointValueError, f"{name.replace('.', '[.]')} holds NaN or infinity")


@pytest.mark.parametrize("value", [0.0, -0.001])
@pytest.mark.parametrize("name", [f"{UP}.channel_scale", "lm_head.scale"])
def test_scales_that_are_not_positive(tmp_path: Path, name: str, value: float) -> None:
    refuse(rewritten(tmp_path, GROUPS, poke(name, value)), CheckpointValueError, "not positive")


def test_per_channel_values(tmp_path: Path) -> None:
    for name, value, match in (
        (f"{UP}.offset", float("nan"), "NaN"),
        (f"{UP}.scale", 0.0, "not positive"),
    ):
        folder = rewritten(tmp_path / name, CHANNELS, poke(name, value))
        refuse(folder, CheckpointValueError, match)


@pytest.mark.parametrize("value", [0, 17, 255])
def test_group_scale_out_of_range(tmp_path: Path, value: int) -> None:
    folder = rewritten(tmp_path, GROUPS, poke(f"{UP}.group_scale", value))
    refuse(folder, CheckpointValueError, r"outside 1\.\.16")


def test_a_group_that_leaves_int8(tmp_path: Path) -> None:
    row, column = 200, 77

    def change(tensors: Tensors) -> None:
        tensors[f"{UP}.codes"][row] = 0
        tensors[f"{UP}.codes"][row, column // 2] = 9 << 4
        tensors[f"{UP}.group_scale"][row] = 16
        tensors[f"{UP}.group_offset"][row] = -16  # 9 * 16 - 16 = 128

    refuse(rewritten(tmp_path, GROUPS, change), CheckpointValueError, "row 200, group 0 .* 128 ex")


def test_a_group_that_just_stays_in_int8(tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors[f"{UP}.codes"][5] = 0x99  # 9 * 16 - 17 = 127, though 15 would leave int8
        tensors[f"{UP}.group_scale"][5] = 16
        tensors[f"{UP}.group_offset"][5] = -17

    PackedCheckpoint.open(rewritten(tmp_path, GROUPS, change))


def test_the_code_minus_128(tmp_path: Path) -> None:
    refuse(rewritten(tmp_path, GROUPS, poke("lm_head.codes", -128)), CheckpointValueError, "-128")


def test_values_can_be_left_unchecked(tmp_path: Path) -> None:
    folder = rewritten(tmp_path, GROUPS, poke(f"{UP}.channel_scale", float("nan")))
    assert PackedCheckpoint.open(folder, values=False).shape(f"{UP}.channel_scale") == (256,)


def test_k_center_must_be_finite(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.k_center"
    center = torch.tensor([[0.0, float("nan")]])
    writer = CheckpointWriter(tmp_path / "o")
    writer.write_shard("a.safetensors", {name: center})
    refuse(writer.finish({}, make_manifest(GROUPS)), CheckpointValueError, "k_center holds NaN")
