"""Writing and reading packed checkpoints: round trips, atomicity, resuming, full disks."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save
from torch import Tensor

from helpers.checkpoints import tiny_tensors, write_checkpoint
from qoq.checkpoint import files, partial
from qoq.checkpoint.card import AccuracyRow, model_card
from qoq.checkpoint.manifest import make_manifest, parse_manifest
from qoq.checkpoint.packed import PackedCheckpoint
from qoq.checkpoint.shard import DTYPE_NAMES, read_header, write_tensors
from qoq.checkpoint.writer import INDEX_NAME, CheckpointWriter, companion_files
from qoq.errors import (
    CheckpointError,
    CheckpointIncompleteError,
    CheckpointPathError,
    CheckpointTensorError,
    ResourceError,
)
from qoq.formats.scheme import QuantScheme

GROUPS = QuantScheme.parse("w4a8kv4-g128")
MANIFEST = make_manifest(GROUPS)
EMBED = "model.embed_tokens.weight"


def embed() -> dict[str, Tensor]:
    return {EMBED: torch.randn(5, 8)}


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("name", ["w4a8kv4-g128", "w4a8kv4-g32", "w4a8kv4", "w8a8", "w4a16"])
def test_round_trip(tmp_path: Path, name: str) -> None:
    scheme = QuantScheme.parse(name)
    tensors = tiny_tensors(scheme, half=False, bias=True)
    made = write_checkpoint(tmp_path / "out", scheme, tensors, recipe={"passes": ["a"]}, seed=3)
    checkpoint = PackedCheckpoint.open(made)
    assert checkpoint.scheme == scheme
    assert checkpoint.names() == sorted(tensors)
    assert checkpoint.raw_config["tie_word_embeddings"] is False
    assert "quantization_config" not in checkpoint.raw_config
    assert checkpoint.manifest["seed"] == 3
    assert checkpoint.manifest["recipe"] == {"passes": ["a"]}
    for key, tensor in tensors.items():
        assert key in checkpoint
        got = checkpoint.get(key)
        assert got.dtype == tensor.dtype == checkpoint.dtype(key)
        assert torch.equal(got, tensor)
        assert checkpoint.nbytes(key) == tensor.numel() * tensor.element_size()
    checkpoint.verify({n: (tuple(t.shape), t.dtype) for n, t in tensors.items()})
    checkpoint.verify({n: (checkpoint.shape(n), _any_float(t)) for n, t in tensors.items()})
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def _any_float(tensor: Tensor) -> torch.dtype | None:
    return None if tensor.is_floating_point() else tensor.dtype


@given(
    sizes=st.lists(
        st.tuples(
            st.sampled_from(sorted(DTYPE_NAMES, key=str)),
            st.lists(st.integers(0, 5), max_size=3),
        ),
        max_size=6,
    )
)
def test_shard_bytes_are_those_of_the_library(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[tuple[torch.dtype, list[int]]]
) -> None:
    path = tmp_path_factory.mktemp("shard") / "x.safetensors"
    tensors = {f"t{i}": torch.randint(0, 99, s).to(d) for i, (d, s) in enumerate(sizes)}
    write_tensors(path, tensors)
    assert path.read_bytes() == save(tensors, metadata={"format": "pt"})
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys() == read_header(path).keys()
    assert all(torch.equal(loaded[n], t) and loaded[n].dtype == t.dtype for n, t in tensors.items())


def test_a_view_is_written_as_what_it_shows(tmp_path: Path) -> None:
    base = torch.arange(12, dtype=torch.uint8).reshape(3, 4)
    write_tensors(tmp_path / "x.safetensors", {"t": base.T, "s": base[1:, ::2]})
    loaded = load_file(tmp_path / "x.safetensors")
    assert torch.equal(loaded["t"], base.T)
    assert torch.equal(loaded["s"], base[1:, ::2])


def test_other_dtypes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointTensorError, match="int64"):
        write_tensors(tmp_path / "x.safetensors", {"t": torch.arange(3)})
    assert not list(tmp_path.iterdir())


def test_same_input_same_bytes(tmp_path: Path) -> None:
    tensors = tiny_tensors(GROUPS)
    first = write_checkpoint(tmp_path / "a", GROUPS, tensors)
    backwards = dict(reversed(tensors.items()))
    second = write_checkpoint(tmp_path / "b", GROUPS, backwards)
    assert contents(first) == contents(second)


def test_big_shards_are_split_and_replaced(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "out", max_shard_bytes=100)
    tensors = {f"{c}.weight": torch.randn(n) for c, n in zip("abcd", (20, 4, 60, 1), strict=True)}
    writer.write_shard("x.safetensors", tensors)
    # a and b fit together; c alone exceeds the bound; d would not fit beside it.
    names = sorted(p.name for p in writer.partial.glob("*.safetensors"))
    assert names == ["x.part1.safetensors", "x.part2.safetensors", "x.safetensors"]
    assert writer.shards() == ["x.safetensors"]
    writer.write_shard("x.safetensors", {"d.weight": torch.randn(1)})
    assert [p.name for p in writer.partial.glob("*.safetensors")] == ["x.safetensors"]
    writer.write_shard("x.safetensors", tensors)
    out = writer.finish({}, MANIFEST)
    checkpoint = PackedCheckpoint.open(out)
    assert all(torch.equal(checkpoint.get(n), t) for n, t in tensors.items())
    index = json.loads((out / INDEX_NAME).read_text())
    assert index["metadata"]["total_size"] == 4 * 85


def test_resume_keeps_finished_shards(tmp_path: Path) -> None:
    first = CheckpointWriter(tmp_path / "out")
    first.write_shard("a.safetensors", embed())
    first.write_shard("b.safetensors", {"model.norm.weight": torch.ones(8)})
    (first.partial / "state.json").write_text("{}")
    (first.partial / "c.safetensors.tmp").write_bytes(b"half")
    torn = first.partial / "b.safetensors"
    torn.write_bytes(torn.read_bytes()[:-3])
    second = CheckpointWriter(tmp_path / "out", resume=True)
    assert second.shards() == ["a.safetensors"]
    assert (second.partial / "state.json").exists()
    assert not list(second.partial.glob("*.tmp"))
    second.write_shard("b.safetensors", {"model.norm.weight": torch.ones(8)})
    out = second.finish({}, MANIFEST)
    assert PackedCheckpoint.open(out).names() == [EMBED, "model.norm.weight"]
    assert sorted(contents(out)) == ["a.safetensors", "b.safetensors", "config.json", INDEX_NAME]
    assert CheckpointWriter(tmp_path / "other").shards() == []


def test_a_fresh_start_empties_what_was_unfinished(tmp_path: Path) -> None:
    CheckpointWriter(tmp_path / "out").write_shard("a.safetensors", embed())
    assert CheckpointWriter(tmp_path / "out").shards() == []


def test_a_foreign_partial_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.tex").write_text("precious")
    for resume in (False, True):
        with pytest.raises(CheckpointError, match="no unfinished output"):
            CheckpointWriter(tmp_path / "out", resume=resume)
    assert (tmp_path / "out.partial" / "thesis.tex").exists()


def test_an_unfinished_checkpoint_does_not_open(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "out")
    writer.write_shard("a.safetensors", embed())
    with pytest.raises(CheckpointIncompleteError, match="never finished"):
        PackedCheckpoint.open(writer.partial)
    with pytest.raises(CheckpointIncompleteError, match="no checkpoint folder"):
        PackedCheckpoint.open(tmp_path / "out")


def test_an_existing_folder_is_not_overwritten_silently(tmp_path: Path) -> None:
    out = write_checkpoint(tmp_path / "out", GROUPS, tiny_tensors(GROUPS))
    before = contents(out)
    with pytest.raises(CheckpointError, match="exists already"):
        CheckpointWriter(out)
    assert contents(out) == before
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(CheckpointError, match="no model folder"):
        CheckpointWriter(tmp_path / "home", overwrite=True)
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(out)
    for name in ("file", "link"):
        with pytest.raises(CheckpointError, match="is no folder"):
            CheckpointWriter(tmp_path / name, overwrite=True)


@pytest.mark.parametrize("exchange", [True, False])
def test_overwrite_swaps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    if not exchange:
        monkeypatch.setattr(partial, "_exchange", lambda a, b: False)
    out = write_checkpoint(tmp_path / "out", GROUPS, tiny_tensors(GROUPS))
    old = contents(out)
    writer = CheckpointWriter(out, overwrite=True)
    writer.write_shard("a.safetensors", embed())
    assert contents(out) == old  # untouched until the end
    writer.finish({}, MANIFEST)
    assert PackedCheckpoint.open(out).names() == [EMBED]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_empty_out_folder_is_used(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    writer = CheckpointWriter(tmp_path / "out")
    writer.write_shard("a.safetensors", embed())
    assert PackedCheckpoint.open(writer.finish({}, MANIFEST)).names() == [EMBED]


def test_out_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "out")
    writer.write_shard("a.safetensors", embed())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(CheckpointError, match="exists already"):
        writer.finish({}, MANIFEST)
    assert sorted(contents(tmp_path / "out")) == ["mine"]


class _FullDisk:
    """A file on a disk with ``room`` bytes left."""

    def __init__(self, file: Any, room: int) -> None:
        self._file, self._room = file, room

    def __enter__(self) -> "_FullDisk":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: Any) -> int:
        data = bytes(data)
        self._file.write(data[: self._room])
        self._room -= len(data)
        if self._room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return len(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@pytest.mark.parametrize("room", [0, 5, 60, 200])
def test_full_disk_while_writing_a_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    writer = CheckpointWriter(tmp_path / "out")
    writer.write_shard("a.safetensors", embed())

    def full(*args: Any) -> _FullDisk:
        return _FullDisk(open(*args), room)

    monkeypatch.setattr(files, "open", full, raising=False)
    with pytest.raises(ResourceError, match="full"):
        writer.write_shard("b.safetensors", {"b.weight": torch.randn(100)})
    monkeypatch.undo()
    assert sorted(p.name for p in writer.partial.iterdir()) == [".unfinished", "a.safetensors"]
    assert CheckpointWriter(tmp_path / "out", resume=True).shards() == ["a.safetensors"]


@pytest.mark.parametrize("call", ["fsync", "replace", "rename"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_failures_at_the_end_leave_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    writer = CheckpointWriter(tmp_path / "out")
    writer.write_shard("a.safetensors", embed())

    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(CheckpointError if code == errno.EIO else ResourceError):
        writer.finish({}, MANIFEST)
    assert not (tmp_path / "out").exists()


def test_extra_files_and_their_names(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "secret.txt").write_text("no")
    companions = companion_files(tmp_path)
    assert companions == {"tokenizer.json": tmp_path / "tokenizer.json"}
    writer = CheckpointWriter(tmp_path / "out")
    writer.write_shard("a.safetensors", embed())
    for bad in ("../x", "config.json", INDEX_NAME, "a.safetensors", "", "b.safetensors"):
        with pytest.raises(CheckpointPathError):
            writer.finish({}, MANIFEST, {bad: b"x"})
    out = writer.finish({}, MANIFEST, {**companions, "README.md": b"hello"})
    assert (out / "README.md").read_bytes() == b"hello"
    assert (out / "tokenizer.json").read_bytes() == b"{}"


@pytest.mark.parametrize(
    "name", ["../a.safetensors", "a.bin", "", "a.part1.safetensors", "x/y.safetensors"]
)
def test_shard_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointPathError):
        CheckpointWriter(tmp_path / "out").write_shard(name, embed())


def test_finish_refuses_nonsense(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "out")
    with pytest.raises(CheckpointTensorError, match="no tensor"):
        writer.finish({}, MANIFEST)
    writer.write_shard("a.safetensors", embed())
    writer.write_shard("b.safetensors", embed())
    with pytest.raises(CheckpointTensorError, match="both"):
        writer.finish({}, MANIFEST)
    with pytest.raises(CheckpointError, match="scheme"):
        writer.finish({}, {**MANIFEST, "scheme": "w5a8"})


@pytest.mark.parametrize("name", ["w4a8kv4-g128", "w4a8k8v4", "w8a8kv8", "w16a16kv4"])
@pytest.mark.parametrize("bits", [8, 16])
def test_manifest_round_trip(name: str, bits: int) -> None:
    scheme = QuantScheme.parse(name, bits)
    manifest = make_manifest(scheme, k_rotation="hadamard", calibration={"samples": 2})
    assert parse_manifest(json.loads(json.dumps(manifest))) == scheme
    with pytest.raises(CheckpointError, match="k_rotation"):
        make_manifest(scheme, k_rotation="fourier")


def test_verify_names_what_differs(tmp_path: Path) -> None:
    tensors = tiny_tensors(GROUPS)
    checkpoint = PackedCheckpoint.open(write_checkpoint(tmp_path / "o", GROUPS, tensors))
    expected = {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()}
    name = "model.layers.1.mlp.up_proj.codes"
    with pytest.raises(CheckpointTensorError, match="lacks 1 of"):
        checkpoint.verify({**expected, "model.layers.2.x.codes": ((1,), torch.uint8)})
    with pytest.raises(CheckpointTensorError, match=r"holds 1 .*up_proj\.codes"):
        checkpoint.verify({n: e for n, e in expected.items() if n != name})
    with pytest.raises(CheckpointTensorError, match=r"up_proj\.codes has shape"):
        checkpoint.verify({**expected, name: ((1, 2), torch.uint8)})
    with pytest.raises(CheckpointTensorError, match=r"up_proj\.codes has dtype"):
        checkpoint.verify({**expected, name: (expected[name][0], None)})
    with pytest.raises(CheckpointTensorError, match="holds no tensor nope"):
        checkpoint.get("nope")


def test_the_check_of_values_reads_one_shard_at_a_time(tmp_path: Path) -> None:
    out = write_checkpoint(tmp_path / "o", GROUPS, tiny_tensors(GROUPS))
    checkpoint = PackedCheckpoint.open(out)
    (out / "layer-0.safetensors").unlink()  # nothing stays mapped or cached
    with pytest.raises(CheckpointIncompleteError, match="cannot be read"):
        checkpoint.get("model.layers.0.mlp.up_proj.codes")
    checkpoint.get("model.layers.1.mlp.up_proj.codes")


def test_card() -> None:
    manifest = make_manifest(GROUPS, recipe={"passes": ["rotate", "a|b"]}, seed=1)
    rows = [AccuracyRow("full precision", 20.25), AccuracyRow("a|b", 20.5, 0.001, 0.02, 0.987)]
    card = model_card(
        "my\nmodel", manifest, rows, base_model='x/"y', measured_on="books", command="make demo"
    )
    assert card.startswith('---\nbase_model: "x/\\"y"\nlibrary_name: qoq\n')
    assert "# my model\n" in card
    assert "| full precision | 20.2500 | - | - | - |" in card
    assert "| a\\|b | 20.5000 | 0.00100 | 0.0200 | 98.70% |" in card
    assert '| recipe.passes | ["rotate", "a\\|b"] |' in card
    assert "| seed | 1 |" in card
    assert "calibration" not in card
    assert "make demo" in card
    assert "## Accuracy" not in model_card("m", manifest)
