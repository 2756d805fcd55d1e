"""What a job says it will need, and its refusal where that is not there."""

import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from helpers.families import make_family_model
from helpers.quantizing import model_tensors, write_job
from qoq.errors import ResourceError
from qoq.formats.scheme import QuantScheme
from qoq.models.config import ModelConfig
from qoq.quantize import plan as planning
from qoq.quantize.pipeline import quantize
from qoq.quantize.plan import Plan, check_plan, make_plan
from qoq.quantize.recipe import QOQ, RTN, Recipe

CPU = torch.device("cpu")
G128 = QuantScheme.parse("w4a8kv4-g128")
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 5e5,
}
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def known_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "_flops_per_second", lambda device: 1e11)


def plan_of(recipe: Recipe = QOQ, tokens: int = 131072, **changes: Any) -> Plan:
    return make_plan(ModelConfig.from_hf({**LLAMA_8B, **changes}), G128, recipe, tokens, CPU)


def test_a_real_model_s_needs_are_of_the_right_size() -> None:
    plan = plan_of()
    assert 4e9 < plan.memory < 12e9
    assert 4.5e9 < plan.disk_out < 6e9  # 7e9 weights at 4.2 bits, int8 head, fp16 embedding
    assert 3600 < plan.seconds < 100 * 3600
    assert "GB of memory" in str(plan)
    assert " h" in str(plan)


def test_memory_does_not_grow_with_layers_or_text() -> None:
    plan, deep, long = plan_of(), plan_of(num_hidden_layers=64), plan_of(tokens=1 << 20)
    assert plan.memory == deep.memory == long.memory
    assert deep.disk_out > 1.6 * plan.disk_out
    assert deep.disk_work == plan.disk_work
    assert long.disk_work == 8 * plan.disk_work
    assert deep.seconds > 1.9 * plan.seconds
    assert long.seconds > 4 * plan.seconds


def test_a_recipe_without_data_needs_less() -> None:
    full, none = plan_of(), plan_of(RTN, tokens=0)
    assert none.disk_work == 0
    assert none.memory < full.memory
    assert none.seconds < full.seconds / 10
    one_stream = plan_of(QOQ.without("compensate"))
    assert one_stream.disk_work == full.disk_work / 2
    assert one_stream.seconds < full.seconds


@pytest.mark.parametrize("scheme", ["w4a8kv4-g128", "w4a8kv4", "w8a8", "w16a16"])
def test_disk_estimates_hold(scheme: str, tmp_path: Path) -> None:
    """The checkpoint's size nearly to the byte, and an upper bound of the work files."""
    job = write_job(tmp_path)
    plans: list[Plan] = []
    peak = 0

    def watch(*step: object) -> None:
        nonlocal peak
        sizes = [f.stat().st_size for f in (tmp_path / "out.partial").glob("*.rows")]
        peak = max(peak, sum(sizes))

    out = quantize(
        job[0],
        tmp_path / "out",
        scheme=scheme,
        calibration=str(job[1]),
        samples=4,
        seq_len=64,
        announce=plans.append,
        progress=watch,
    )
    size = sum(f.stat().st_size for f in out.glob("*.safetensors"))
    plan = plans[0]
    # A tiny model's headers weigh something; without 4-bit keys there is no key center.
    assert size - 20_000 < plan.disk_out < size + 1000
    assert 0.5 * plan.disk_work < peak <= plan.disk_work


def memory_of(monkeypatch: pytest.MonkeyPatch, available: float) -> None:
    real = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: real._replace(available=int(available)))


def no_cgroup(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(planning, "_CGROUP", tmp_path / "none")


def test_too_little_memory_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    no_cgroup(monkeypatch, tmp_path)
    plan = Plan(3e9, 1.0, 1.0, 1.0)
    memory_of(monkeypatch, 2.9e9)
    with pytest.raises(ResourceError, match=r"3\.0 GB of memory; 2\.9 GB are free"):
        check_plan(plan, tmp_path / "out", CPU)
    memory_of(monkeypatch, 3.1e9)
    check_plan(plan, tmp_path / "out", CPU)


def write_cgroup(folder: Path, limit: str, used: float, cache: float) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{int(used)}\n")
    lines = ["anon 5", f"inactive_file {int(cache / 2)}", f"active_file {int(cache / 2)}", "x 7"]
    (folder / "memory.stat").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("limit", "used", "cache", "fits"),
    [
        ("max", 90e9, 0, True),
        ("4000000000", 0.5e9, 0, True),
        ("4000000000", 2e9, 0, False),
        ("4000000000", 4e9, 3.5e9, True),  # a full page cache gives way
        ("4000000000", 4e9, 0.5e9, False),
    ],
)
def test_a_container_s_limit_counts(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    limit: str,
    used: float,
    cache: float,
    fits: bool,
) -> None:
    memory_of(monkeypatch, 100e9)
    monkeypatch.setattr(planning, "_CGROUP", tmp_path / "cgroup")
    write_cgroup(tmp_path / "cgroup", limit, used, cache)
    plan = Plan(3e9, 1.0, 1.0, 1.0)
    if fits:
        check_plan(plan, tmp_path / "out", CPU)
    else:
        with pytest.raises(ResourceError, match="GB of memory"):
            check_plan(plan, tmp_path / "out", CPU)


def test_too_little_disk_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan = Plan(0.0, 4e9, 2e9, 1.0)
    asked: list[Path] = []

    def usage(path: Path) -> Usage:
        asked.append(Path(path))
        return Usage(0, 0, 5.9e9)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    with pytest.raises(ResourceError, match=r"6\.00 GB of disk.*5\.90 GB.*--samples"):
        check_plan(plan, tmp_path / "not" / "there" / "out", CPU)
    assert asked == [tmp_path]  # the folder that will hold it
    check_plan(replace(plan, disk_work=3.8e9), tmp_path / "out", CPU)


def test_what_an_interrupted_run_left_is_not_needed_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 900))
    plan = Plan(0.0, 500.0, 500.0, 1.0)
    with pytest.raises(ResourceError):
        check_plan(plan, tmp_path / "out", CPU)
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "layer").write_bytes(bytes(101))
    check_plan(plan, tmp_path / "out", CPU)


def test_a_refused_job_starts_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    job = write_job(tmp_path)
    no_cgroup(monkeypatch, tmp_path)
    memory_of(monkeypatch, 1e6)
    with pytest.raises(ResourceError, match="memory"):
        quantize(job[0], tmp_path / "out", calibration=str(job[1]), samples=2, seq_len=64)
    memory_of(monkeypatch, 1e12)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 1000))
    with pytest.raises(ResourceError, match="disk"):
        quantize(job[0], tmp_path / "out", calibration=str(job[1]), samples=2, seq_len=64)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "text.txt"]


def test_every_family_can_be_planned() -> None:
    for name in ("llama-biased", "qwen2-windows-tied", "qwen3-d256"):
        config, _ = model_tensors(make_family_model(name))
        assert make_plan(config, QuantScheme.parse("w4a8kv4-g32"), QOQ, 512, CPU).memory > 0


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.1, "about 1 s on"), (89, "89 s"), (600, "10 min"), (7200, "2.0 h")]
)
def test_durations(seconds: float, said: str) -> None:
    assert said in str(Plan(1e9, 1e9, 1e9, seconds))
