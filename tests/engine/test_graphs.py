"""An engine that replays its decode steps gives the same bits as one that does not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qoq.bench.random_weights import random_decoder
from qoq.bench.shapes import raw_config
from qoq.engine import engine as module
from qoq.engine.engine import Engine
from qoq.engine.request import Request, SamplingParams
from qoq.engine.speculative import SpeculativeConfig, guesser
from qoq.formats.scheme import QuantScheme
from qoq.kvcache.pool import KVPool
from qoq.models.batch import Batch
from qoq.models.config import ModelConfig
from qoq.models.decoder import Decoder

SCHEME = QuantScheme.parse("w4a8kv4-g32")
SIZES = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 97, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every step that was replayed; on a GPU it would be a graph."""
    rows: list[int] = []

    def record(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        out = run()

        def replay() -> Tensor:
            rows.append(len(out))
            return out.copy_(run())

        return replay

    monkeypatch.setattr(module, "recorder", lambda device: record)
    return rows


def run(**options: Any) -> list[Request]:
    config = ModelConfig.from_hf({**raw_config("llama-3.2-1b"), **SIZES, **HEADS})
    decoder = random_decoder(config, SCHEME)
    pool = KVPool(SCHEME.kv, 2, 60, 2, 4, 16)
    engine = Engine(decoder, pool, max_requests=3, max_step_tokens=20, **options)
    engine.record()
    params = [
        SamplingParams(max_tokens=9, ignore_eos=True),
        SamplingParams(max_tokens=5, temperature=1.0, seed=3, top_p=0.9, ignore_eos=True),
        SamplingParams(max_tokens=7, ignore_eos=True, logprobs=2, prompt_logprobs=1),
        SamplingParams(max_tokens=4, ignore_eos=True, frequency_penalty=1.0, logit_bias={5: 9.0}),
    ]
    lengths = (3, 31, 12, 1)
    draw = torch.Generator().manual_seed(0)
    requests = [
        engine.add(torch.randint(0, 97, (n,), generator=draw).tolist(), p)
        for n, p in zip(lengths, params, strict=True)
    ]
    while engine.unfinished:
        engine.step()
    return requests


@pytest.mark.parametrize("guess", [False, True])
def test_replayed_steps_change_no_bit(replays: list[int], guess: bool) -> None:
    options: dict[str, Any] = {}
    if guess:
        config = SpeculativeConfig.of({"method": "ngram", "num_speculative_tokens": 3})
        options["guess"] = guesser(config)
    plain = run(enforce_eager=True, **options)
    assert replays == []
    graphed = run(**options)
    assert len(replays) > 3
    assert set(replays) <= {1, 2, 3}
    for a, b in zip(plain, graphed, strict=True):
        assert a.token_ids == b.token_ids
        assert a.logprobs == b.logprobs
        assert a.top_logprobs == b.top_logprobs
        assert a.prompt_logprobs == b.prompt_logprobs


def test_prompts_of_padding_compile_and_write_nothing(
    replays: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ModelConfig.from_hf({**raw_config("llama-3.2-1b"), **SIZES, **HEADS})
    pool = KVPool(SCHEME.kv, 2, 60, 2, 4, 16)
    for layer in pool.layers:
        layer.k_codes.fill_(7)
    engine = Engine(
        random_decoder(config, SCHEME), pool, max_requests=3, max_step_tokens=40, max_model_len=100
    )
    seen: list[tuple[int, ...]] = []
    hidden = Decoder.hidden

    def watched(decoder: Decoder, batch: Batch, *args: Any, **named: Any) -> Tensor:
        if batch.num_tokens > 3:
            seen.append((batch.num_tokens, *batch.page_table.shape))
        return hidden(decoder, batch, *args, **named)

    monkeypatch.setattr(Decoder, "hidden", watched)
    engine.record()
    assert seen == [(tokens, 1, pages) for tokens in (16, 32, 40) for pages in (1, 25)]
    assert all(layer.k_codes.eq(7).all() for layer in pool.layers)
