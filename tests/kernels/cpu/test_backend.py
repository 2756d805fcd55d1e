"""The shared backend: threads that lose no task, callers side by side, forks, settings."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from qoq.errors import BackendUnavailable
from qoq.formats.activation import QuantizedActivation
from qoq.kernels.act_quant import act_quant_oracle
from qoq.kernels.cpu import act_quant, backend, kv_append, sample

needs_extension = pytest.mark.skipif(backend.missing() is not None, reason=str(backend.missing()))


@pytest.fixture(autouse=True)
def _own_settings() -> Iterator[None]:
    """What a test sets, the next one does not see."""
    with patch.dict(os.environ):
        backend.forget()
        yield
    backend.forget()


def right(x: torch.Tensor) -> bool:
    got, want = act_quant.act_quant(x, 8), act_quant_oracle(x, 8)
    assert isinstance(got, QuantizedActivation)
    assert isinstance(want, QuantizedActivation)
    return all(torch.equal(getattr(got, name), tensor) for name, tensor in vars(want).items())


@needs_extension
@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_many_small_runs(threads: int) -> None:
    backend.set_threads(threads)
    assert backend.backend().threads == threads
    assert backend.backend() is backend.backend()
    for i in range(120):
        if i % 40 == 39:
            time.sleep(0.002)  # long enough for workers to fall asleep
        assert right(torch.randn(1 + i % 23, 4000))


@needs_extension
def test_callers_in_many_threads() -> None:
    backend.set_threads(3)
    inputs = [torch.randn(1 + i % 9, 3000 + i) for i in range(60)]
    with ThreadPoolExecutor(4) as callers:
        assert all(callers.map(right, inputs))


@needs_extension
def test_changing_threads_while_ops_run() -> None:
    inputs = [torch.randn(6, 3000) for _ in range(40)]
    with ThreadPoolExecutor(2) as callers:
        running = callers.map(right, inputs)
        for threads in (2, 1, 3):
            backend.set_threads(threads)
        assert all(running)
    assert backend.backend().threads == 3


@needs_extension
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_makes_threads_of_its_own() -> None:
    backend.set_threads(3)
    x = torch.randn(9, 3000)
    assert right(x)
    want = act_quant_oracle(x, 8).codes.numpy().tobytes()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            # Nothing of torch's own runs here: its OpenMP threads do not survive a fork.
            same = act_quant.act_quant(x, 8).codes.numpy().tobytes() == want
            status = 0 if same and backend.backend().threads == 3 else 2
            backend.forget()  # and can end them
        finally:
            os._exit(status)
    for _ in range(600):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.05)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the child hangs")
    assert status == 0
    assert right(torch.randn(9, 3000))


@needs_extension
def test_instruction_set_by_name() -> None:
    names = backend.extension().usable_isas()
    assert names[0] == "portable"
    for name in names:
        os.environ["QOQ_ISA"] = name
        backend.forget()
        assert backend.backend().isa == name
    os.environ["QOQ_ISA"] = "abacus"
    backend.forget()
    with pytest.raises(BackendUnavailable, match=r"abacus.*portable"):
        right(torch.randn(1, 2))


@pytest.mark.parametrize("wanted", ["0", "-1", "two", "1.5"])
def test_thread_counts_that_are_none(wanted: str) -> None:
    os.environ["QOQ_NUM_THREADS"] = wanted
    with pytest.raises(BackendUnavailable, match="QOQ_NUM_THREADS"):
        backend.thread_count()


def test_set_threads_refuses_and_keeps_what_was() -> None:
    backend.set_threads(2)
    with pytest.raises(BackendUnavailable, match="-3"):
        backend.set_threads(-3)
    assert backend.thread_count() == 2


def test_all_cpus_unless_told_otherwise() -> None:
    os.environ.pop("QOQ_NUM_THREADS", None)
    assert 1 <= backend.thread_count() <= (os.cpu_count() or 1)
    for quota, count in ((0.5, 1), (1.9, 1), (1e9, len(os.sched_getaffinity(0)))):
        with patch.object(backend, "cpu_quota", lambda quota=quota: quota):
            assert backend.available_cpus() == count


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_quota_of_cgroups_v2_is_the_tightest_on_the_way_up(tmp_path: Path) -> None:
    membership = tmp_path / "membership"
    membership.write_text("0::/user/job\n")
    assert backend.cpu_quota(tmp_path / "fs", membership) == float("inf")
    put(tmp_path / "fs/user/job/cpu.max", "max 100000\n")
    put(tmp_path / "fs/user/cpu.max", "250000 100000\n")
    put(tmp_path / "fs/cpu.max", "400000 100000\n")
    assert backend.cpu_quota(tmp_path / "fs", membership) == 2.5
    membership.write_text("0::/elsewhere/on/the/host\n")
    assert backend.cpu_quota(tmp_path / "fs", membership) == 4


def test_quota_of_cgroups_v1(tmp_path: Path) -> None:
    membership = tmp_path / "membership"
    membership.write_text("5:memory:/job\n4:cpu,cpuacct:/job\n")
    put(tmp_path / "fs/cpu,cpuacct/cpu.cfs_quota_us", "-1\n")
    put(tmp_path / "fs/cpu,cpuacct/cpu.cfs_period_us", "100000\n")
    assert backend.cpu_quota(tmp_path / "fs", membership) == float("inf")
    put(tmp_path / "fs/cpu,cpuacct/job/cpu.cfs_quota_us", "150000\n")
    put(tmp_path / "fs/cpu,cpuacct/job/cpu.cfs_period_us", "50000\n")
    assert backend.cpu_quota(tmp_path / "fs", membership) == 3
    assert backend.cpu_quota(tmp_path / "fs", tmp_path / "missing") == float("inf")


def test_without_the_extension_every_twin_says_why() -> None:
    caches = (backend.extension, backend.missing)
    for cached in caches:
        cached.cache_clear()
    try:
        with patch.dict(sys.modules, {"qoq._C": None}):
            for twin in (act_quant, kv_append, sample):
                assert "pip install" in str(twin.unsupported(torch.device("cpu")))
    finally:
        for cached in caches:
            cached.cache_clear()
