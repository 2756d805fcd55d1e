"""choose_device: what was asked for or a sentence why not; auto takes a GPU that can."""

import pytest
import torch

from qoq.errors import BackendUnavailable
from qoq.kernels import device
from qoq.kernels.device import choose_device

CPU = torch.device("cpu")


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the GPUs that torch sees; which of them is current comes behind."""
    names: list[str] = ["A", "B"]
    cuda = torch.cuda
    monkeypatch.setattr(cuda, "is_available", lambda: bool(names))
    monkeypatch.setattr(cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(cuda, "get_device_name", lambda where: names[where.index])
    monkeypatch.setattr(cuda, "set_device", lambda where: names.append(f"current {where.index}"))
    monkeypatch.setattr(device, "missing", lambda: None)
    monkeypatch.setattr(device, "too_old", lambda index: None)
    return names


def test_the_cpu_by_name(gpus: list[str]) -> None:
    assert choose_device("cpu").device == CPU
    assert "asked for" in str(choose_device("cpu"))


def test_a_gpu_by_name(gpus: list[str]) -> None:
    assert str(choose_device("cuda")) == "cuda:0 (A)"
    assert gpus.pop() == "current 0"
    assert choose_device("cuda:1").device == torch.device("cuda", 1)
    assert gpus.pop() == "current 1"
    with pytest.raises(BackendUnavailable, match="'cuda:2' cannot be used here: torch sees 2 CUDA"):
        choose_device("cuda:2")
    gpus.clear()
    with pytest.raises(BackendUnavailable, match="torch sees no CUDA GPU"):
        choose_device("cuda")


def test_auto(gpus: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_device().device == torch.device("cuda", 0)
    assert choose_device("auto", "gpu").device == torch.device("cuda", 0)
    assert "the CPU's" in str(choose_device("auto", "cpu"))
    assert choose_device("auto", "cpu").device == CPU
    for name, reason in (("missing", "no Triton"), ("too_old", "7.5 is below 8.0")):
        with monkeypatch.context() as patch:
            patch.setattr(device, name, lambda *_, reason=reason: reason)
            assert choose_device().device == CPU
            assert reason in str(choose_device())
    gpus.clear()
    assert str(choose_device()) == "cpu (torch sees no CUDA GPU)"


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "mps", ""])
def test_other_names(name: str) -> None:
    with pytest.raises(BackendUnavailable, match="use auto, cpu, cuda or cuda:N"):
        choose_device(name)
