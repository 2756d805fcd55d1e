"""keep_full: every job once, never more than ``ahead`` in the engine, aborts when it is left."""

from collections.abc import Iterator

import pytest

from helpers.tiny import write_tiny_llama
from qoq.engine.engine import Engine
from qoq.engine.feed import Done, Job, keep_full
from qoq.engine.request import Output, SamplingParams
from qoq.errors import RequestError
from qoq.llm import LLM


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_llama(folder)
    return LLM(folder, max_requests=3)


def jobs(engine: Engine, count: int, seen: list[int]) -> Iterator[Job[int]]:
    for i in range(count):
        seen.append(engine.unfinished)
        ids = [] if i == 4 else [5 + i] * (1 + i % 4)
        yield Job(i, ids, SamplingParams(max_tokens=1 + i % 5, ignore_eos=True))


def test_every_job_is_answered_as_it_would_be_alone(llm: LLM) -> None:
    engine, seen = llm.new_engine(), []
    done = list(keep_full(engine, jobs(engine, 20, seen), ahead=5))
    assert sorted(key for key, _ in done) == list(range(20))
    assert max(seen) == 4  # asked for the next only while there was room
    assert min(seen[6:]) > 0  # and before the engine ran empty
    assert engine.unfinished == 0
    for key, result in done:
        if key == 4:
            assert isinstance(result, RequestError)
            continue
        assert isinstance(result, Output)
        [alone] = llm.generate(
            [[5 + key] * (1 + key % 4)], SamplingParams(max_tokens=1 + key % 5, ignore_eos=True)
        )
        assert result.token_ids == alone.token_ids


def test_leaving_early_aborts_the_rest(llm: LLM) -> None:
    engine = llm.new_engine()
    running = keep_full(engine, jobs(engine, 20, []), ahead=5)
    assert isinstance(next(running), Done)
    assert engine.unfinished > 0
    running.close()
    assert engine.unfinished == 0


def test_no_jobs(llm: LLM) -> None:
    assert list(keep_full(llm.new_engine(), [], ahead=5)) == []
