"""A whole model through the Triton twins: the oracle's tokens, except where two are as good."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from qoq.bench.gpu.model import compare
from qoq.bench.random_weights import random_decoder
from qoq.bench.shapes import raw_config
from qoq.engine.engine import Engine
from qoq.engine.request import Request, SamplingParams
from qoq.errors import BackendUnavailable
from qoq.formats.scheme import QuantScheme
from qoq.kernels.dispatch import TWINS, Twin
from qoq.kernels.gpu import act_quant, attention, kv_append, linear, sample
from qoq.kvcache.pool import KVPool
from qoq.models.config import ModelConfig

MODULES = (act_quant, attention, kv_append, linear, sample)
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 61}
LLAMA: Mapping[str, Any] = {}
QWEN3: Mapping[str, Any] = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
NEAR = 0.02  # log-probabilities of a model this small
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}

pytestmark = pytest.mark.usefixtures("faithful")


@pytest.fixture
def everywhere(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twins, and none but them, run on ``device``, although it may be no GPU."""
    for op, twins in TWINS.items():
        module = next(twin.module for twin in twins if twin.backend == "gpu")
        monkeypatch.setitem(TWINS, op, (Twin("gpu", module),))
    if device.type != "cuda":
        for module in MODULES:
            monkeypatch.setattr(module, "unsupported_device", lambda where: None)


def run(
    scheme: str,
    device: torch.device,
    backend: str,
    prompts: Sequence[Sequence[int]],
    *,
    family: Mapping[str, Any] = LLAMA,
    enforce_eager: bool = False,
) -> list[Request]:
    config = ModelConfig.from_hf({**raw_config("llama-3.2-1b"), **SIZES, **HEADS, **family})
    parsed = QuantScheme.parse(scheme)
    decoder = random_decoder(config, parsed, backend=backend, device=device)
    pool = KVPool(parsed.kv, 2, 12, 2, 16, 16, device=device)
    engine = Engine(
        decoder,
        pool,
        max_requests=4,
        max_step_tokens=24,
        enforce_eager=enforce_eager,
        backend=backend,
    )
    params = [
        SamplingParams(max_tokens=5, ignore_eos=True, logprobs=2),
        SamplingParams(max_tokens=3, ignore_eos=True, logprobs=2),
        SamplingParams(max_tokens=3, ignore_eos=True, logprobs=2, prompt_logprobs=1),
    ]
    requests = [engine.add(prompt, p) for prompt, p in zip(prompts, params, strict=False)]
    while engine.unfinished:
        engine.step()
    return requests


@pytest.mark.parametrize("scheme", ["w4a8kv4-g32", "w8a8kv8"])
def test_a_whole_model(
    everywhere: None, device: torch.device, scheme: str, recwarn: pytest.WarningsRecorder
) -> None:
    draw = torch.Generator().manual_seed(7)
    prompts = [torch.randint(0, 61, (n,), generator=draw).tolist() for n in (21, 1, 6)]
    truth = run(scheme, device, "oracle", prompts)
    got = run(scheme, device, "gpu", prompts)
    found = compare(got, truth)
    assert found["tokens"] == 11
    assert found["wrong"] == 0, found
    assert found["same_until_parted"] + 3 * found["ties"] >= 11
    for text, want in zip(got, truth, strict=True):
        same = len(want.token_ids) if text.token_ids == want.token_ids else 1
        assert text.logprobs[:same] == pytest.approx(want.logprobs[:same], abs=NEAR)
    assert not [w for w in recwarn if "slow oracle" in str(w.message)]


@pytest.mark.parametrize("family", [LLAMA, QWEN3], ids=["llama", "qwen3"])
def test_neither_graphs_nor_neighbours_change_a_bit(
    everywhere: None,
    cuda: torch.device,
    family: Mapping[str, Any],
    recwarn: pytest.WarningsRecorder,
) -> None:
    draw = torch.Generator().manual_seed(8)
    prompts = [torch.randint(0, 61, (n,), generator=draw).tolist() for n in (21, 1, 6)]
    plain = run("w4a8kv4-g32", cuda, "gpu", prompts, family=family, enforce_eager=True)
    graphed = run("w4a8kv4-g32", cuda, "gpu", prompts, family=family)
    alone = run("w4a8kv4-g32", cuda, "gpu", prompts[:1], family=family)
    for got, want in [*zip(graphed, plain, strict=True), (alone[0], plain[0])]:
        assert got.token_ids == want.token_ids
        assert got.logprobs == want.logprobs
        assert got.prompt_logprobs == want.prompt_logprobs
    assert not [w for w in recwarn if "cannot be recorded" in str(w.message)]


def test_a_model_for_the_gpu_needs_it(device: torch.device) -> None:
    if device.type == "cuda":
        pytest.skip("there is a GPU")
    with pytest.raises(BackendUnavailable, match="'gpu' cannot run linear on cpu"):
        run("w4a8kv4-g32", device, "gpu", [])
