"""HFSource: folders of every kind read or refused, each with its own sentence."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from qoq.checkpoint.hf import INDEX_NAME, SINGLE_NAME, HFSource, resolve_source
from qoq.errors import SourceError


def write_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama"}')


def write_sharded(folder: Path) -> dict[str, Tensor]:
    """Three tensors in two shards with an index."""
    write_config(folder)
    tensors = {
        "a.weight": torch.randn(3, 5),
        "b.weight": torch.randn(7, dtype=torch.float64).to(torch.bfloat16),
        "c.bias": torch.randn(2).to(torch.float16),
    }
    files = {"a.weight": "x-1.safetensors", "b.weight": "x-2.safetensors"}
    files["c.bias"] = files["a.weight"]
    for file in set(files.values()):
        save_file({n: t for n, t in tensors.items() if files[n] == file}, folder / file)
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": files}))
    return tensors


def point_index_at(folder: Path, name: object) -> None:
    index = json.loads((folder / INDEX_NAME).read_text())
    index["weight_map"]["a.weight"] = name
    (folder / INDEX_NAME).write_text(json.dumps(index))


def check_reads(source: HFSource, tensors: dict[str, Tensor]) -> None:
    assert source.names() == sorted(tensors)
    for name, tensor in tensors.items():
        assert source.shape(name) == tuple(tensor.shape)
        got = source.get(name)
        assert got.dtype == tensor.dtype
        assert torch.equal(got, tensor)


def test_shards(tmp_path: Path) -> None:
    tensors = write_sharded(tmp_path)
    source = HFSource(tmp_path)
    assert source.path == tmp_path
    assert source.config == {"model_type": "llama"}
    assert "a.weight" in source
    assert "d.weight" not in source
    check_reads(source, tensors)


def test_single_file(tmp_path: Path) -> None:
    write_config(tmp_path)
    tensors = {"a.weight": torch.randn(1), "rotary.inv_freq": torch.randn(0)}
    save_file(tensors, tmp_path / SINGLE_NAME)
    check_reads(HFSource(str(tmp_path)), tensors)


def test_tensors_outlive_the_files(tmp_path: Path) -> None:
    tensors = write_sharded(tmp_path)
    got = HFSource(tmp_path).get("a.weight")
    for file in tmp_path.glob("*.safetensors"):
        file.write_bytes(b"\0" * file.stat().st_size)
    assert torch.equal(got, tensors["a.weight"])


def test_unknown_tensor(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    source = HFSource(tmp_path)
    with pytest.raises(SourceError, match="no tensor d"):
        source.get("d")
    with pytest.raises(SourceError, match="no tensor d"):
        source.shape("d")


def test_no_folder_and_no_config(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no model folder"):
        HFSource(tmp_path / "nowhere")
    with pytest.raises(SourceError, match=r"no config\.json"):
        HFSource(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "3", "", "[" * 100_000, "\udcff"])
def test_damaged_config(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(SourceError, match=r"config\.json"):
        HFSource(tmp_path)


@pytest.mark.parametrize(
    ("file", "hint"),
    [
        ("pytorch_model.bin", "pickled"),
        ("consolidated.00.pth", "pickled"),
        ("adapter_model.safetensors", "adapter"),
        ("model.Q4_K_M.gguf", "GGUF"),
        ("README.md", "neither"),
    ],
)
def test_no_safetensors(tmp_path: Path, file: str, hint: str) -> None:
    write_config(tmp_path)
    (tmp_path / file).write_bytes(b"x")
    with pytest.raises(SourceError, match=hint):
        HFSource(tmp_path)


def test_truncated_at_any_byte(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    shard = tmp_path / "x-1.safetensors"
    whole = shard.read_bytes()
    for cut in {0, 1, 7, 8, 9, len(whole) // 2, len(whole) - 1}:
        shard.write_bytes(whole[:cut])
        with pytest.raises(SourceError, match=r"x-1\.safetensors.*(truncated|damaged)"):
            HFSource(tmp_path)
    shard.write_bytes(b"\xff" * 8 + whole[8:])  # a header longer than the file
    with pytest.raises(SourceError, match="damaged"):
        HFSource(tmp_path)


def test_truncated_after_opening(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    source = HFSource(tmp_path)
    shard = tmp_path / "x-1.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(SourceError, match="truncated"):
        source.get("a.weight")
    shard.unlink()
    with pytest.raises(SourceError, match="0 bytes"):
        source.get("a.weight")


def test_missing_shard(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    (tmp_path / "x-2.safetensors").unlink()
    with pytest.raises(SourceError, match=r"names 1 of 2 files .*x-2\.safetensors"):
        HFSource(tmp_path)


def test_index_disagrees_with_the_shards(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    point_index_at(tmp_path, "x-2.safetensors")
    with pytest.raises(SourceError, match=r"a\.weight is in x-2.*it is in x-1"):
        HFSource(tmp_path)


def test_tensor_missing_from_its_shard(tmp_path: Path) -> None:
    tensors = write_sharded(tmp_path)
    save_file({"a.weight": tensors["a.weight"]}, tmp_path / "x-1.safetensors")
    with pytest.raises(SourceError, match=r"c\.bias is in x-1.*not"):
        HFSource(tmp_path)


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    tensors = write_sharded(tmp_path)
    save_file({n: tensors[n] for n in ("a.weight", "b.weight")}, tmp_path / "x-2.safetensors")
    with pytest.raises(SourceError, match=r"a\.weight is in both"):
        HFSource(tmp_path)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"weight_map": {}}', "nonsense"])
def test_damaged_index(tmp_path: Path, content: str) -> None:
    write_sharded(tmp_path)
    (tmp_path / INDEX_NAME).write_text(content)
    with pytest.raises(SourceError, match="index"):
        HFSource(tmp_path)


@pytest.mark.parametrize(
    "trick",
    [
        "../x-1.safetensors",
        "/etc/x.safetensors",
        "sub/x-1.safetensors",
        "..\\x-1.safetensors",
        "C:x-1.safetensors",
        "x-1.safetensors\0",
        "..",
        ".",
        "",
        3,
        None,
        ["x-1.safetensors"],
    ],
)
def test_path_tricks(tmp_path: Path, trick: object) -> None:
    inside = tmp_path / "inside"
    (inside / "sub").mkdir(parents=True)
    tensors = write_sharded(inside)
    # The file the trick points at exists, so only the check can refuse it.
    for place in (tmp_path, inside / "sub"):
        save_file({"a.weight": tensors["a.weight"]}, place / "x-1.safetensors")
    point_index_at(inside, trick)
    with pytest.raises(SourceError, match="must be a plain name"):
        HFSource(inside)


def test_index_naming_pickles(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    point_index_at(tmp_path, "x-1.bin")
    with pytest.raises(SourceError, match="no safetensors file"):
        HFSource(tmp_path)


def test_weights_of_other_dtypes(tmp_path: Path) -> None:
    write_config(tmp_path)
    save_file({"a.weight": torch.zeros(2, dtype=torch.int8)}, tmp_path / SINGLE_NAME)
    with pytest.raises(SourceError, match=r"a\.weight has dtype I8"):
        HFSource(tmp_path)


def test_resolve_folder(tmp_path: Path) -> None:
    assert resolve_source(tmp_path) == tmp_path
    assert resolve_source(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "a/b/c", "~nobody/x", "a//b", ""])
def test_resolve_what_is_no_hub_id(name: str) -> None:
    with pytest.raises(SourceError, match="no folder"):
        resolve_source(name)


def test_resolve_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(SourceError, match="is a file"):
        resolve_source(tmp_path / "model.safetensors")


def test_resolve_hub_id_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match=r"could not be downloaded.*network"):
        resolve_source("someone/some-model")


def test_resolve_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def download(name: str, allow_patterns: list[str]) -> str:
        asked[name] = allow_patterns
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve_source("someone/some-model") == tmp_path
    assert not any(p.endswith((".bin", ".py", ".pt", "*")) for p in asked["someone/some-model"])
