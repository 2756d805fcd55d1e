"""dispatch: the fastest twin that says yes, else the oracle, and refusals with their cause."""

import sys
import warnings
from types import ModuleType
from typing import Any

import pytest
import torch

from qoq.errors import BackendUnavailable
from qoq.kernels import act_quant, attention, kv_append, linear, sample
from qoq.kernels.dispatch import TWINS, Twin, describe, resolve

ORACLES = {
    "act_quant": act_quant.act_quant_oracle,
    "rms_norm_quant": act_quant.rms_norm_quant_oracle,
    "silu_mul_quant": act_quant.silu_mul_quant_oracle,
    "linear": linear.linear_oracle,
    "kv_append": kv_append.kv_append_oracle,
    "attention": attention.attention_oracle,
    "sample": sample.sample_oracle,
}


class FakeTwin(ModuleType):
    """A twin of linear that runs where ``reason`` is None."""

    def __init__(self, name: str, reason: str | None) -> None:
        super().__init__(name)
        self.reason = reason
        self.asked: list[dict[str, Any]] = []

    def unsupported(self, device: torch.device, **what: Any) -> str | None:
        assert isinstance(device, torch.device)
        self.asked.append(what)
        return self.reason

    def linear(self, *args: Any) -> str:
        return f"{self.__name__} ran"


@pytest.fixture
def twins(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Twin, ...]]:
    """A cpu twin that refuses, a gpu twin that runs and one whose module does not exist."""
    for name, reason in (("twin_cpu", "no VNNI"), ("twin_gpu", None)):
        monkeypatch.setitem(sys.modules, name, FakeTwin(name, reason))
    return {"linear": (Twin("cpu", "twin_cpu"), Twin("cpu", "twin_lost"), Twin("gpu", "twin_gpu"))}


def test_every_op_has_its_oracle() -> None:
    assert set(TWINS) == set(ORACLES)
    for op, oracle in ORACLES.items():
        assert resolve(op, "oracle", "cpu") is oracle


def test_auto_takes_the_first_that_declares_support(twins: dict[str, tuple[Twin, ...]]) -> None:
    assert resolve("linear", "auto", "cpu", twins=twins, m=3)() == "twin_gpu ran"
    fake = sys.modules["twin_gpu"]
    assert isinstance(fake, FakeTwin)
    assert fake.asked == [{"m": 3}]


def test_auto_falls_back_with_a_warning_that_names_the_cause(
    twins: dict[str, tuple[Twin, ...]],
) -> None:
    twins["linear"] = twins["linear"][:2]
    with pytest.warns(UserWarning, match="linear runs on the slow oracle.*no VNNI.*twin_lost"):
        assert resolve("linear", "auto", "cpu", twins=twins) is linear.linear_oracle


def test_without_twins_auto_is_silent() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve("linear", "auto", "cpu", twins={"linear": ()}) is linear.linear_oracle


def test_a_named_backend_runs_or_says_why(twins: dict[str, tuple[Twin, ...]]) -> None:
    assert resolve("linear", "gpu", "cpu", twins=twins)() == "twin_gpu ran"
    with pytest.raises(BackendUnavailable, match=r"'cpu' cannot run linear .*no VNNI.*twin_lost"):
        resolve("linear", "cpu", "cpu", twins=twins)
    with pytest.raises(BackendUnavailable, match="no such implementation"):
        resolve("linear", "gpu", "cpu", twins={"linear": ()})


def test_oracle_asks_no_twin(twins: dict[str, tuple[Twin, ...]]) -> None:
    assert resolve("linear", "oracle", "cpu", twins=twins) is linear.linear_oracle
    fake = sys.modules["twin_gpu"]
    assert isinstance(fake, FakeTwin)
    assert fake.asked == []


def test_unknown_names() -> None:
    with pytest.raises(BackendUnavailable, match="auto, oracle, cpu, gpu"):
        resolve("linear", "cuda", "cpu")
    with pytest.raises(ValueError, match="no op named"):
        resolve("matmul", "auto", "cpu")


def test_twins_of_other_devices_are_not_imported() -> None:
    twins = {"linear": (Twin("gpu", "twin_lost", "cuda"),)}
    with pytest.raises(BackendUnavailable, match="gpu: it runs on cuda devices only"):
        resolve("linear", "gpu", torch.device("cpu"), twins=twins)
    with pytest.raises(BackendUnavailable, match="No module named 'twin_lost'"):
        resolve("linear", "gpu", torch.device("cuda"), twins=twins)


def test_describe(twins: dict[str, tuple[Twin, ...]]) -> None:
    assert [op for op, _ in describe("cpu")] == list(TWINS)
    assert describe("cpu", twins=twins) == [("linear", "gpu (twin_gpu)")]
    ((_, what),) = describe(torch.device("cpu"), twins={"linear": twins["linear"][:1]})
    assert what == "oracle (cpu: no VNNI)"
