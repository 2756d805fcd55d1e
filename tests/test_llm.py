"""LLM: the float models answer as transformers does, packed ones the same in every batch."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers.packed import random_packed_tensors
from helpers.tiny import write_tiny_llama
from qoq import LLM, SamplingParams
from qoq.checkpoint.manifest import make_manifest
from qoq.checkpoint.writer import CheckpointWriter, companion_files
from qoq.engine.engine import Engine
from qoq.engine.structured_params import StructuredOutputsParams
from qoq.errors import RequestError, ResourceError, SourceError
from qoq.formats.scheme import QuantScheme
from qoq.models.config import ModelConfig

BUNDLED = Path(__file__).parents[1] / "examples" / "books-llama"
PROMPTS = ["hello world", "t", "the hell, the well; 你好 " * 2, "w" * 70]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[LLM, Any]:
    """A tiny float model, loaded by us and by transformers."""
    folder = tmp_path_factory.mktemp("tiny")
    reference = write_tiny_llama(folder, seed=11)
    return LLM(folder), reference


@pytest.fixture(scope="module", params=["w4a8kv4-g32", "w4a8k8v4", "w8a8"])
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed checkpoint of random codes, with the tiny model's shape and tokenizer."""
    base = tmp_path_factory.mktemp("packed")
    write_tiny_llama(base / "source")
    raw = json.loads((base / "source" / "config.json").read_text())
    scheme = QuantScheme.parse(request.param)
    writer = CheckpointWriter(base / "out")
    with torch.random.fork_rng():
        torch.manual_seed(7)  # a near tie of two tokens would fall either way; this one has none
        tensors = random_packed_tensors(ModelConfig.from_hf(raw), scheme)
    writer.write_shard("model.safetensors", tensors)
    return writer.finish(raw, make_manifest(scheme), companion_files(base / "source"))


def reference_greedy(model: Any, ids: list[int], count: int) -> list[int]:
    out = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        do_sample=False,
        max_new_tokens=count,
        pad_token_id=2,
    )
    return out[0, len(ids) :].tolist()


def test_greedy_is_what_transformers_generates(tiny: tuple[LLM, Any]) -> None:
    llm, reference = tiny
    outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=24))
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert output.prompt_token_ids == llm.tokenizer.encode(prompt)
        assert output.token_ids == reference_greedy(reference, output.prompt_token_ids, 24)
        assert output.finish_reason == ("stop" if output.token_ids[-1] == 1 else "length")
        assert output.text == llm.tokenizer.decode(output.token_ids)
        assert len(output.logprobs) == len(output.token_ids)


def test_logprobs_are_those_of_the_model(tiny: tuple[LLM, Any]) -> None:
    llm, reference = tiny
    output = llm.generate("hello", SamplingParams(max_tokens=5, temperature=2.0, seed=3))[0]
    ids = output.prompt_token_ids + output.token_ids
    with torch.no_grad():
        logits = reference(torch.tensor([ids])).logits[0].float()
    first = len(output.prompt_token_ids) - 1
    wanted = logits.log_softmax(-1)[range(first, len(ids) - 1), output.token_ids]
    torch.testing.assert_close(torch.tensor(output.logprobs), wanted, atol=1e-3, rtol=1e-3)


def test_bundled_model_continues_prose_like_transformers() -> None:
    from transformers import AutoModelForCausalLM

    llm = LLM(BUNDLED)
    prompts = ["It was a dark and stormy night", "“My dear Watson,” said he, “"]
    outputs = llm.generate(prompts, SamplingParams(max_tokens=24))
    reference = AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32).eval()
    for output in outputs:
        assert output.token_ids == reference_greedy(reference, output.prompt_token_ids, 24)
        assert output.text.isprintable() or "\n" in output.text


def test_one_prompt_or_many_text_or_ids(tiny: tuple[LLM, Any]) -> None:
    llm, _ = tiny
    params = SamplingParams(max_tokens=6)
    ids = llm.tokenizer.encode("hello")
    [single] = llm.generate("hello", params)
    assert llm.generate(["hello"], params) == [single]
    assert llm.generate(ids, params) == [single]
    pair = llm.generate([ids, "hello"], params)
    assert [o.token_ids for o in pair] == [single.token_ids] * 2
    assert llm.generate([], params) == []
    mixed = llm.generate(["hello", ids], [params, SamplingParams(max_tokens=2)])
    assert [len(o.token_ids) for o in mixed] == [len(single.token_ids), 2]
    with pytest.raises(RequestError, match="1 sampling parameters for 2 prompts"):
        llm.generate(["a", "b"], [params])


def test_stream_gives_the_same_text(tiny: tuple[LLM, Any]) -> None:
    llm, _ = tiny
    for params in (
        SamplingParams(max_tokens=30),
        SamplingParams(max_tokens=30, temperature=1.5, seed=5),
        SamplingParams(max_tokens=30, temperature=1.5, seed=5, stop=["e", "l"]),
    ):
        whole = llm.generate("hello w", params)[0].text
        pieces = list(llm.stream("hello w", params))
        assert "".join(pieces) == whole
        assert all(pieces)


def test_streams_can_interleave(tiny: tuple[LLM, Any]) -> None:
    llm, _ = tiny
    params = SamplingParams(max_tokens=10, ignore_eos=True)
    alone = [llm.generate(p, params)[0].text for p in ("hello", "well")]
    texts = ["", ""]
    streams = [llm.stream("hello", params), llm.stream("well", params)]
    for _ in range(12):
        for i, pieces in enumerate(streams):
            texts[i] += next(pieces, "")
    assert texts == alone


def test_chat_uses_the_template(tiny: tuple[LLM, Any]) -> None:
    llm, _ = tiny
    params = SamplingParams(max_tokens=4)
    conversation = [{"role": "user", "content": "hello"}]
    [answer] = llm.chat(conversation, params)
    assert answer.prompt_token_ids == llm.tokenizer.encode_chat(conversation)
    several = llm.chat([conversation, conversation], params)
    assert [o.text for o in several] == [answer.text] * 2
    assert llm.chat([], params) == []


def test_seeds_repeat_and_differ(tiny: tuple[LLM, Any]) -> None:
    llm, _ = tiny

    def text(seed: int | None) -> list[int]:
        params = SamplingParams(max_tokens=12, temperature=2.0, seed=seed, ignore_eos=True)
        return llm.generate("hello", params)[0].token_ids

    assert text(1) == text(1)
    assert len({tuple(text(seed)) for seed in (1, 2, None, None)}) == 4


def test_prompt_too_long_names_both_lengths(tiny: tuple[LLM, Any]) -> None:
    llm, _ = tiny
    with pytest.raises(RequestError, match=r"200 tokens.*context is 128"):
        llm.generate(["a", [5] * 200])
    with pytest.raises(RequestError, match="empty"):
        llm.generate("")
    with pytest.raises(RequestError, match="vocabulary"):
        llm.stream([10**6])
    output = llm.generate([5] * 120, SamplingParams(max_tokens=99, ignore_eos=True))[0]
    assert (len(output.token_ids), output.finish_reason) == (8, "length")


def test_small_cache_makes_requests_wait_and_changes_nothing(tiny: tuple[LLM, Any]) -> None:
    llm, _ = tiny
    params = SamplingParams(max_tokens=12)
    wanted = llm.generate(PROMPTS, params)
    small = LLM(llm.path, kv_tokens=128, max_requests=2)
    got = small.generate(PROMPTS, params)
    assert [o.text for o in got] == [o.text for o in wanted]
    with pytest.raises(RequestError, match="KV pages"):
        LLM(llm.path, kv_tokens=1).generate("w" * 70)


def test_packed_model_answers_the_same_in_every_batch(packed: Path) -> None:
    """Integers are exact, so not even a log-probability moves."""
    asked = [
        (prompt, SamplingParams(max_tokens=9 + 5 * i, temperature=0.9 * (i % 2), seed=i))
        for i, prompt in enumerate([*PROMPTS, "hello", "a"])
    ]
    prompts, params = zip(*asked, strict=True)
    llm = LLM(packed)
    alone = [llm.generate(p, q)[0] for p, q in asked]
    assert len({tuple(o.token_ids) for o in alone}) == len(alone)
    assert llm.generate(prompts, params) == alone
    assert llm.generate(prompts[::-1], params[::-1]) == alone[::-1]
    assert LLM(packed, kv_tokens=150, max_requests=3).generate(prompts, params) == alone


def test_packed_model_reads_its_prompt_as_it_generates(packed: Path) -> None:
    """The cache holds the same after prefill as after decode: greedy text can be cut anywhere."""
    llm = LLM(packed)
    whole = llm.generate("hello well", SamplingParams(max_tokens=20, ignore_eos=True))[0]
    for cut in (1, 7, 19):
        prompt = whole.prompt_token_ids + whole.token_ids[:cut]
        rest = llm.generate(prompt, SamplingParams(max_tokens=20 - cut, ignore_eos=True))[0]
        assert rest.token_ids == whole.token_ids[cut:]


def test_cache_that_memory_cannot_hold(
    tiny: tuple[LLM, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = 2 * 2 * 64 * (64 + 64) * 4  # layers, KV heads, tokens, K and V channels, bytes

    def generate(available: float) -> None:
        monkeypatch.setattr(
            "qoq.kvcache.budget.psutil.virtual_memory", lambda: SimpleNamespace(available=available)
        )
        LLM(tiny[0].path).generate("w" * 100, SamplingParams(max_tokens=5))

    generate(2 * page / 0.8 + 10)
    with pytest.raises(ResourceError, match=r"needs 128 tokens of KV cache.* holds 64"):
        generate(2 * page / 0.8 - 10)
    with pytest.raises(ResourceError, match="KV"):
        generate(10)


@pytest.mark.parametrize("options", [{"kv_tokens": 0}, {"max_requests": 0}])
def test_bad_limits(tiny: tuple[LLM, Any], options: dict[str, int]) -> None:
    with pytest.raises(RequestError, match="must be 1 or more"):
        LLM(tiny[0].path, **options)


def test_interrupt_leaves_the_model_usable(
    tiny: tuple[LLM, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm, _ = tiny
    params = SamplingParams(max_tokens=8)
    wanted = llm.generate("hello", params)
    step, calls = Engine.step, iter([False, True])

    def interrupted(self: Engine) -> Any:
        if next(calls):
            raise KeyboardInterrupt
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["hello", "t"], params)
    assert llm.generate("hello", params) == wanted


def test_calls_share_an_engine_and_its_prefix_cache(tiny: tuple[LLM, Any]) -> None:
    llm = LLM(tiny[0].path)
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    wanted = llm.generate("w" * 90, params)
    engine = llm._engine
    assert engine is not None
    assert llm.generate("w" * 90, params) == wanted
    assert llm._engine is engine
    assert engine.stats().prefix_hits == 64
    with pytest.raises(RequestError, match="vocabulary"):
        llm.generate([[1, 2], [10**6]])
    stream = llm.stream("hello", params)
    next(stream)
    stream.close()
    assert engine.unfinished == 0
    llm.generate(["w" * 90] * 3, params)  # more than its pages hold
    assert llm._engine is not engine
    cold = LLM(tiny[0].path, enable_prefix_caching=False)
    assert cold.generate("w" * 90, params) == cold.generate("w" * 90, params) == wanted


def test_a_bar_on_stderr_unless_it_is_not_wanted(
    tiny: tuple[LLM, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    llm, params = tiny[0], SamplingParams(max_tokens=3)
    llm.generate(["hello", "t"], sampling_params=params, use_tqdm=False)
    assert capsys.readouterr() == ("", "")
    llm.generate(["hello", "t"], sampling_params=params)
    out, err = capsys.readouterr()
    assert out == ""
    assert "generating" in err


def test_missing_model(tmp_path: Path) -> None:
    with pytest.raises(SourceError):
        LLM(tmp_path / "nowhere")
    with pytest.raises(SourceError):
        LLM(tmp_path)


def test_eos_ids_of_generation_config_end_a_text(tiny: tuple[LLM, Any], tmp_path: Path) -> None:
    llm, _ = tiny
    wanted = llm.generate("hello", SamplingParams(max_tokens=6))[0]
    folder = tmp_path / "model"
    shutil.copytree(llm.path, folder)
    ends = {"eos_token_id": [1, wanted.token_ids[2]]}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    output = LLM(folder).generate("hello", SamplingParams(max_tokens=6))[0]
    assert output.finish_reason == "stop"
    assert output.token_ids == wanted.token_ids[: wanted.token_ids.index(wanted.token_ids[2]) + 1]


def test_prompt_logprobs_are_those_of_the_model(
    tiny: tuple[LLM, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm, reference = tiny
    params = SamplingParams(max_tokens=3, prompt_logprobs=2, logprobs=1)
    plain = llm.generate(["hello", PROMPTS[2]], SamplingParams(max_tokens=3))
    outputs = llm.generate(["hello", PROMPTS[2]], [SamplingParams(max_tokens=3), params])
    assert [o.token_ids for o in outputs] == [o.token_ids for o in plain]
    assert (outputs[0].prompt_logprobs, outputs[0].top_logprobs) == (None, None)
    output = outputs[1]
    ids = output.prompt_token_ids
    with torch.no_grad():
        wanted = reference(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    scores = output.prompt_logprobs
    assert scores is not None
    assert scores[0] is None
    assert len(scores) == len(ids)
    for at, score in enumerate(scores[1:]):
        assert score is not None
        ranking = wanted[at].sort(descending=True).indices.tolist()
        assert next(iter(score)) == ids[at + 1]
        assert set(score) == {ids[at + 1], *ranking[:2]}
        for i, one in score.items():
            assert one.rank == ranking.index(i) + 1
            assert one.logprob == pytest.approx(float(wanted[at, i]), abs=1e-3)
    # However few rows of logits fit at a time.
    monkeypatch.setattr("qoq.engine.logprobs._SCORED_BYTES", 4 * llm.config.vocab_size * 3)
    pieces = llm.generate([PROMPTS[2]], params)[0].prompt_logprobs
    assert pieces is not None
    assert [list(p or ()) for p in pieces] == [list(s or ()) for s in scores]


def test_prompt_logprobs_do_not_depend_on_chunks_and_neighbours(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = LLM(packed)
    params = SamplingParams(max_tokens=4, prompt_logprobs=3, logprobs=3, min_tokens=2)
    alone = [llm.generate(p, params)[0] for p in PROMPTS]
    assert llm.generate(PROMPTS, params) == alone
    monkeypatch.setattr("qoq.llm.Engine", partial(Engine, max_step_tokens=7))
    assert LLM(packed, max_requests=3).generate(PROMPTS, params) == alone


def test_several_texts_for_a_prompt(tiny: tuple[LLM, Any]) -> None:
    llm, _ = tiny
    params = SamplingParams(max_tokens=8, temperature=2.0, seed=5, ignore_eos=True)
    one = llm.generate("hello", params)[0]
    outputs = llm.generate(["hello", "t"], [replace(params, n=3), params])
    assert [o.index for o in outputs] == [0, 1, 2, 0]
    assert outputs[0].token_ids == one.token_ids
    assert len({tuple(o.token_ids) for o in outputs[:3]}) == 3
    again = llm.generate("hello", replace(params, n=3))
    assert [o.token_ids for o in again] == [o.token_ids for o in outputs[:3]]
    with pytest.raises(RequestError, match="n must be 1 for a stream"):
        llm.stream("hello", replace(params, n=2))


def test_structured_text_in_a_mixed_batch(packed: Path) -> None:
    llm = LLM(packed)
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer", "maximum": 99}, "b": {"enum": ["x", "y"]}},
        "required": ["a", "b"],
    }
    form = StructuredOutputsParams(json=schema)
    params = [
        SamplingParams(max_tokens=60, structured_outputs=form),
        SamplingParams(max_tokens=60, structured_outputs=form, temperature=1.0, seed=3, logprobs=2),
        SamplingParams(max_tokens=20, repetition_penalty=1.3, frequency_penalty=0.5),
        SamplingParams(max_tokens=20),
    ]
    outputs = llm.generate(["hello"] * 4, params)
    for output in outputs[:2]:
        if output.finish_reason == "stop":
            value = json.loads(output.text)
            assert value["a"] <= 99
            assert value["b"] in ("x", "y")
    assert [llm.generate("hello", p)[0] for p in params] == outputs


def test_defaults_of_generation_config(tiny: tuple[LLM, Any], tmp_path: Path) -> None:
    assert LLM(BUNDLED).get_default_sampling_params() == SamplingParams(temperature=0.8, top_p=0.95)


@pytest.fixture(autouse=True)
def _quiet_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
