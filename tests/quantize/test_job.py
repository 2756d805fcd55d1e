"""Interrupted jobs: what is finished is kept, the end is the same to the byte, nothing half-done
looks finished."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.quantizing import random_text, write_job
from qoq.checkpoint.packed import PackedCheckpoint
from qoq.errors import CheckpointError, CheckpointIncompleteError, ResourceError, SourceError
from qoq.models.load import load_model
from qoq.quantize import pipeline, replay
from qoq.quantize.block import Block
from qoq.quantize.pipeline import quantize
from qoq.quantize.recipe import QOQ, RTN, Recipe

SMALL: dict[str, Any] = {"samples": 4, "seq_len": 64}
# Quick, and yet with both streams and all stages.
LIGHT = QOQ.without("search-range").without("gptq").without("refine")
CHANGES: tuple[dict[str, Any], ...] = (
    {"scheme": "w8a8"},
    {"recipe": QOQ},
    {"recipe": RTN},
    {"seed": 1},
    {"samples": 3},
    {"seq_len": 32},
    {"dtype": "bfloat16"},
)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_job(tmp_path_factory.mktemp("job"), num_hidden_layers=3)


@pytest.fixture(scope="module")
def whole(job: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an uninterrupted run writes."""
    return contents(run(job, tmp_path_factory.mktemp("whole") / "out"))


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layers that are computed, in order."""
    layers: list[int] = []
    real = pipeline.quantize_block

    def watch(block: Block, *args: Any) -> Any:
        layers.append(block.index)
        return real(block, *args)

    monkeypatch.setattr(pipeline, "quantize_block", watch)
    return layers


def run(job: tuple[Path, Path], out: Path, **changes: Any) -> Path:
    settings = {"calibration": str(job[1]), "recipe": LIGHT, **SMALL, **changes}
    return quantize(job[0], out, **settings)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def stop_at(what: str) -> Callable[[int, int, str], None]:
    """A progress callback that is interrupted as Ctrl-C would, at the step of that name."""

    def progress(done: int, total: int, step: str) -> None:
        if step == what:
            raise KeyboardInterrupt

    return progress


def interrupt(job: tuple[Path, Path], out: Path, what: str, **changes: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(job, out, progress=stop_at(what), **changes)
    assert not out.exists()
    assert (out.parent / f"{out.name}.partial").is_dir()


@pytest.mark.parametrize(
    ("what", "again"),
    [
        ("embedding", [0, 1, 2]),
        ("layer 1/3: statistics", [0, 1, 2]),
        ("layer 1/3: output", [0, 1, 2]),  # its shard is not written yet
        ("layer 2/3: statistics", [1, 2]),
        ("layer 2/3: gate_up_proj", [1, 2]),
        ("layer 3/3: output", [2]),
        ("lm_head", []),
    ],
)
def test_an_interrupted_job_ends_as_if_it_had_not_been(
    job: tuple[Path, Path],
    whole: dict[str, bytes],
    computed: list[int],
    what: str,
    again: list[int],
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    interrupt(job, out, what)
    computed.clear()
    run(job, out)
    assert computed == again
    assert contents(out) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_job_interrupted_again_and_again(
    job: tuple[Path, Path], whole: dict[str, bytes], computed: list[int], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    stops = ("layer 1/3: o_proj", "layer 2/3: qkv_proj", "layer 2/3: output", "layer 3/3: output")
    for what in stops:
        interrupt(job, out, what)
    run(job, out)
    assert computed == [0, 0, 1, 1, 1, 2, 2]
    assert contents(out) == whole


def test_progress_of_a_resumed_job_counts_what_was_finished_before(
    job: tuple[Path, Path], whole: dict[str, bytes], tmp_path: Path
) -> None:
    seen: list[tuple[int, int, str]] = []
    interrupt(job, tmp_path / "out", "layer 2/3: o_proj")
    run(job, tmp_path / "out", progress=lambda *step: seen.append(step))
    total = seen[0][1]
    assert seen[:2] == [
        (1, total, "embedding"),
        (1 + (total - 2) // 3, total, "layer 1/3: finished before"),
    ]
    rest = [done for done, _, _ in seen[1:]]
    assert rest == list(range(rest[0], total + 1))


@pytest.mark.parametrize("recipe", [LIGHT, LIGHT.without("compensate")], ids=["two", "one stream"])
def test_between_a_layer_s_shard_and_tidying_up(
    job: tuple[Path, Path],
    computed: list[int],
    recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = contents(run(job, tmp_path / "wanted", recipe=recipe))
    computed.clear()
    with monkeypatch.context() as patch:

        def stop(self: replay.RowFile) -> None:
            if self.path.name.startswith("hidden-00001"):
                raise KeyboardInterrupt
            self.path.unlink(missing_ok=True)

        patch.setattr(replay.RowFile, "delete", stop)
        with pytest.raises(KeyboardInterrupt):
            run(job, tmp_path / "out", recipe=recipe)
    run(job, tmp_path / "out", recipe=recipe)
    assert computed == [0, 1, 2]
    assert contents(tmp_path / "out") == wanted


@pytest.mark.parametrize("harm", ["gone", "short"])
def test_lost_input_rows_mean_starting_over(
    job: tuple[Path, Path],
    whole: dict[str, bytes],
    computed: list[int],
    harm: str,
    tmp_path: Path,
) -> None:
    interrupt(job, tmp_path / "out", "layer 2/3: statistics")
    rows = tmp_path / "out.partial" / "hidden-00001-float.rows"
    size = rows.stat().st_size
    if harm == "gone":
        rows.unlink()
    else:
        os.truncate(rows, size - 4)
    computed.clear()
    run(job, tmp_path / "out")
    assert computed == [0, 1, 2]
    assert contents(tmp_path / "out") == whole


def test_a_damaged_shard_is_made_again(
    job: tuple[Path, Path], whole: dict[str, bytes], computed: list[int], tmp_path: Path
) -> None:
    interrupt(job, tmp_path / "out", "layer 3/3: statistics")
    shard = tmp_path / "out.partial" / "model-00002-of-00005.safetensors"
    os.truncate(shard, shard.stat().st_size // 2)
    computed.clear()
    run(job, tmp_path / "out")
    assert computed == [0, 1, 2]
    assert contents(tmp_path / "out") == whole


def test_another_job_s_partial_folder_is_refused(
    job: tuple[Path, Path], whole: dict[str, bytes], tmp_path: Path
) -> None:
    interrupt(job, tmp_path / "out", "layer 2/3: statistics")
    before = contents(tmp_path / "out.partial")
    for changes in CHANGES:
        with pytest.raises(CheckpointError, match=r"other settings.*--no-resume"):
            run(job, tmp_path / "out", **changes)
    assert contents(tmp_path / "out.partial") == before
    assert contents(run(job, tmp_path / "out")) == whole  # the first one can still be finished


def test_another_source_of_the_same_name_and_shapes_is_refused(
    job: tuple[Path, Path], tmp_path: Path
) -> None:
    interrupt(job, tmp_path / "out", "layer 2/3: statistics")
    (tmp_path / "other").mkdir()
    other = write_job(tmp_path / "other", num_hidden_layers=3, seed=5)
    assert other[0].name == job[0].name
    with pytest.raises(CheckpointError, match="other settings"):
        run((other[0], job[1]), tmp_path / "out")


def test_another_text_is_refused_and_the_same_text_elsewhere_is_not(
    job: tuple[Path, Path], whole: dict[str, bytes], tmp_path: Path
) -> None:
    interrupt(job, tmp_path / "out", "layer 2/3: statistics")
    other = tmp_path / "text.txt"
    other.write_text(random_text(6000, seed=3))
    with pytest.raises(CheckpointError, match="other settings"):
        run((job[0], other), tmp_path / "out")
    shutil.copyfile(job[1], other)
    assert contents(run((job[0], other), tmp_path / "out")) == whole


def test_starting_over_when_asked(
    job: tuple[Path, Path], computed: list[int], tmp_path: Path
) -> None:
    interrupt(job, tmp_path / "out", "layer 3/3: statistics")
    computed.clear()
    out = run(job, tmp_path / "out", resume=False, seed=1)
    assert computed == [0, 1, 2]
    assert PackedCheckpoint.open(out).manifest["seed"] == 1


def test_an_unfinished_folder_is_no_checkpoint(job: tuple[Path, Path], tmp_path: Path) -> None:
    interrupt(job, tmp_path / "out", "lm_head")
    for opening in (load_model, PackedCheckpoint.open):
        with pytest.raises((CheckpointIncompleteError, CheckpointError, SourceError)):
            opening(tmp_path / "out.partial")


class FullDisk:
    """Writes fail with ENOSPC once ``left`` bytes have gone to files below ``folder``."""

    def __init__(self, folder: Path, left: int) -> None:
        self.folder, self.left = str(folder), left
        self.real_open = open

    def open(self, file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        handle = self.real_open(file, mode, *args, **kwargs)
        if str(file).startswith(self.folder) and set(mode) & set("wa+"):
            return _Limited(handle, self)
        return handle


class _Limited:
    def __init__(self, handle: Any, disk: FullDisk) -> None:
        self._handle, self._disk = handle, disk

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)

    def __enter__(self) -> "_Limited":
        return self

    def __exit__(self, *args: object) -> None:
        self._handle.close()

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        self._disk.left -= size
        if self._disk.left < 0:
            self._handle.write(memoryview(data).cast("B")[: size // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return int(self._handle.write(data))


@pytest.fixture(scope="module")
def written(job: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> int:
    """Bytes that a whole run writes."""
    folder = tmp_path_factory.mktemp("counted")
    with pytest.MonkeyPatch.context() as patch:
        disk = FullDisk(folder, 1 << 60)
        patch.setattr("builtins.open", disk.open)
        patch.setattr("io.open", disk.open)
        run(job, folder / "out")
    return (1 << 60) - disk.left


@pytest.mark.parametrize("share", [0.0, 0.2, 0.6, 0.99])
def test_a_full_disk_leaves_nothing_that_looks_finished(
    job: tuple[Path, Path],
    whole: dict[str, bytes],
    written: int,
    share: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Wherever it fills up: its own sentence, no OUT, and the job can go on with more room."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        disk = FullDisk(tmp_path, int(share * written))
        patch.setattr("builtins.open", disk.open)
        patch.setattr("io.open", disk.open)
        with pytest.raises(ResourceError, match=r"is full.*partial folder"):
            run(job, out)
    assert not out.exists()
    with pytest.raises((CheckpointError, SourceError)):
        load_model(tmp_path / "out.partial")
    assert contents(run(job, out)) == whole


def test_the_partial_folder_tells_whose_it_is(job: tuple[Path, Path], tmp_path: Path) -> None:
    interrupt(job, tmp_path / "out", "layer 1/3: statistics")
    claim = json.loads((tmp_path / "out.partial" / "job.json").read_text())
    assert claim["scheme"] == "w4a8kv4-g128"
    assert claim["recipe"]["name"] == LIGHT.name
