"""Feeding an engine from a source of requests of any length, so that it never runs empty."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Generic, NamedTuple, TypeVar

from qoq.engine.engine import Engine
from qoq.engine.request import Output, Request, SamplingParams
from qoq.errors import RequestError

K = TypeVar("K")


class Job(NamedTuple, Generic[K]):
    """A prompt to run; ``key`` says whose it is."""

    key: K
    prompt_ids: Sequence[int]
    params: SamplingParams


class Done(NamedTuple, Generic[K]):
    """A job's answer, or why it cannot be run."""

    key: K
    result: Output | RequestError


def keep_full(engine: Engine, jobs: Iterable[Job[K]], *, ahead: int) -> Iterator[Done[K]]:
    """Run every job and yield each as soon as it is finished.

    New jobs are taken from ``jobs`` while fewer than ``ahead`` are in the engine, so a slow source
    or a huge one costs no more memory than that. Closing the iterator aborts what still runs.
    """
    source = iter(jobs)
    keys: dict[Request, K] = {}
    more = True
    try:
        while more or keys:
            while more and len(keys) < ahead:
                job = next(source, None)
                if job is None:
                    more = False
                    break
                try:
                    keys[engine.add(job.prompt_ids, job.params)] = job.key
                except RequestError as error:
                    yield Done(job.key, error)
            if keys:
                for update in engine.step():
                    if update.request.finish_reason is not None:
                        yield Done(keys.pop(update.request), update.request.output())
    finally:
        for request in keys:
            engine.abort(request)
