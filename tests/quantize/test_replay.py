"""Replaying a block stage by stage, through files, equals running it."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers.families import make_family_model
from helpers.quantizing import block_of, hidden_rows, model_tensors
from qoq.formats.kv import KVPages
from qoq.models.anatomy import EMBED
from qoq.models.batch import Batch
from qoq.models.decoder import DecoderLayer
from qoq.models.rope import cos_sin
from qoq.quantize import replay as replaying
from qoq.quantize.replay import FLOAT_KV, STAGES, Replay, RowFile, StreamReplay, values

CPU = torch.device("cpu")


def run_layer(layer: DecoderLayer, x: Tensor) -> Tensor:
    """Rows [windows, length, H] after a layer, as the decoder would run them."""
    config, (windows, length, _) = layer.config, x.shape
    batch = Batch.prefill([torch.zeros(length)] * windows, 8)
    cos, sin = cos_sin(config.rope, batch.positions)
    pages = KVPages.empty(FLOAT_KV, batch.num_pages, config.num_kv_heads, 8, config.head_dim)
    out, residual = layer(x.flatten(0, 1), None, cos, sin, batch, pages)
    return out + residual


@pytest.mark.parametrize("tokens", [4096, 60, 1])  # windows of a chunk: all, two, one at least
@pytest.mark.parametrize("name", ["llama-biased", "qwen2-windows-tied", "qwen3-d256"])
def test_a_replayed_layer_gives_what_the_layer_gives(
    name: str, tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replaying, "CHUNK_TOKENS", tokens)
    config, tensors = model_tensors(make_family_model(name))
    ids = torch.randint(0, config.vocab_size, (5, 27))
    replay = hidden_rows(config, tensors, ids, tmp_path)
    x = tensors[EMBED][ids]
    for index in range(2):
        layer = block_of(config, tensors, index).float_layer()
        stream = StreamReplay(replay, "float", layer, FLOAT_KV)
        for stage in STAGES.values():
            for chunk in replay.chunks():
                stage(stream, chunk)
        for chunk in replay.chunks():
            stream.finish(chunk)
        wanted = run_layer(layer, x)
        got = replay.hidden("float", index + 1).read(slice(0, ids.numel()), CPU)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
        x = got.reshape(*ids.shape, -1)


def test_stages_give_what_enters_each_linear(tmp_path: Path) -> None:
    config, tensors = model_tensors(make_family_model("llama-mha"))
    ids = torch.randint(0, config.vocab_size, (2, 20))
    replay = hidden_rows(config, tensors, ids, tmp_path)
    layer = block_of(config, tensors).float_layer()
    stream = StreamReplay(replay, "float", layer, FLOAT_KV)
    (chunk,) = replay.chunks()
    entering = {}
    before = {}
    for tap, stage in STAGES.items():
        x, residual = stage(stream, chunk)
        entering[tap], before[tap] = values(x), residual
    after_attention = before["o_proj"] + layer.o(entering["o_proj"])
    torch.testing.assert_close(before["gate_up_proj"], after_attention, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(before["down_proj"], after_attention, rtol=1e-4, atol=1e-5)
    gate, up = layer.gate_up(entering["gate_up_proj"]).chunk(2, dim=1)
    hidden = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(entering["down_proj"], hidden, rtol=1e-4, atol=1e-5)
    assert torch.equal(before["qkv_proj"], tensors[EMBED][ids.flatten()])


def test_files_of_a_stream_are_tidied(tmp_path: Path) -> None:
    config, tensors = model_tensors(make_family_model("llama-mha"))
    replay = hidden_rows(config, tensors, torch.zeros(2, 20, dtype=torch.int64), tmp_path)
    stream = StreamReplay(replay, "float", block_of(config, tensors).float_layer(), FLOAT_KV)
    for chunk in replay.chunks():
        for stage in STAGES.values():
            stage(stream, chunk)
        stream.finish(chunk)
    stream.clean()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["hidden-00000-float.rows", "hidden-00001-float.rows"]


def test_chunks_hold_whole_windows_and_every_row_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _ = model_tensors(make_family_model("llama-mha"))
    for tokens, windows, length in ((100, 7, 30), (10, 3, 30), (4096, 1, 5)):
        monkeypatch.setattr(replaying, "CHUNK_TOKENS", tokens)
        replay = Replay(config, torch.zeros(windows, length, dtype=torch.int64), tmp_path, CPU)
        chunks = list(replay.chunks())
        rows = [row for chunk in chunks for row in range(chunk.rows.start, chunk.rows.stop)]
        assert rows == list(range(windows * length))
        assert replay.tokens == windows * length
        most = replay.pages(FLOAT_KV).num_pages
        for chunk in chunks:
            assert (chunk.rows.stop - chunk.rows.start) % length == 0
            assert chunk.rows.stop - chunk.rows.start <= max(tokens, length)
            assert chunk.batch.num_pages <= most


def test_row_files(tmp_path: Path) -> None:
    file = RowFile(tmp_path / "a.rows", 6)
    rows = torch.randn(10, 6)
    assert not file.holds(10)
    file.write(0, rows[:4])
    assert not file.holds(10)
    file.write(7, rows[7:])
    file.write(4, rows[4:7])
    assert file.holds(10)
    assert torch.equal(file.read(slice(3, 9), CPU), rows[3:9])
    file.write(2, rows[:1].to(torch.float64))  # overwritten in place, whatever its dtype
    assert torch.equal(file.read(slice(1, 4), CPU), rows[[1, 0, 3]])
    file.sync()
    file.delete()
    file.delete()
    assert not file.path.exists()
