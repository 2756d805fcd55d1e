"""Structures: forms that requests ask of their texts, compiled beside the loop and the engine.

One at a time, in a thread of its own: a hostile one may take seconds (``engine.grammar_child``),
and neither the streams of others nor structures that are known wait for it.
"""

import asyncio
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from qoq.engine.engine import Engine
from qoq.engine.request import SamplingParams
from qoq.engine.structured import Compiled, Grammars
from qoq.engine.structured_params import StructuredOutputsParams


class Structures:
    """Compiles ahead of ``Engine.add``, which then finds what it needs."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._grammars: Grammars | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="qoq-structures")

    async def compile(self, asked: Iterable[SamplingParams]) -> list[Compiled]:
        """What these texts need; hold it until the engine has taken them.

        Raises RequestError for a structure that is wrong, not supported or too large.
        """
        wanted = {id(p.structured_outputs): p.structured_outputs for p in asked}
        return [await self._compile(form) for form in wanted.values() if form is not None]

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _compile(self, form: StructuredOutputsParams) -> Compiled:
        loop = asyncio.get_running_loop()
        if self._grammars is None:  # reads the vocabulary, which takes a while
            self._grammars = await loop.run_in_executor(self._thread, lambda: self._engine.grammars)
        found = self._grammars.find(form)
        if found is None:
            found = await loop.run_in_executor(self._thread, self._grammars.compile, form)
        return found
