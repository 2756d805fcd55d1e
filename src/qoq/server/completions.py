"""POST /v1/completions: texts that continue prompts."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from qoq.api.checks import check_completion
from qoq.api.logprobs import best
from qoq.api.protocol import DEFAULT_MAX_TOKENS, CompletionRequest
from qoq.api.sampling import Ends, sampling_params
from qoq.server.context import Context, Texts, note, request_id, respond
from qoq.server.errors import bad_request
from qoq.server.generation import Delta, Generation
from qoq.server.sse import DONE, Events, event
from qoq.server.tally import Tally


def routes(context: Context) -> APIRouter:
    """The route, bound to what it serves."""
    router = APIRouter()

    @router.post("/v1/completions", tags=["generate"], response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue each prompt: text, token ids, or a list of either."""
        job = await _Job.make(context, body, request)
        return await respond(context, request, job, stream=body.stream)

    return router


@dataclass
class _Job:
    """One request, its prompts as ids."""

    context: Context
    body: CompletionRequest
    request: Request
    name: str
    prompts: list[list[int]]
    shown: list[str]  # what goes before each prompt's texts (echo)
    texts: Texts
    id: str
    created: int

    @classmethod
    async def make(cls, context: Context, body: CompletionRequest, request: Request) -> "_Job":
        """Check everything that can be checked before the engine sees it."""
        name = context.check_model(body.model)
        check_completion(body)
        # With echo, logprobs are asked for the prompt too, whose tokens are then part of the text.
        asked_of_prompt = [body.prompt_logprobs, body.logprobs if body.echo else None]
        of_prompt = max((count for count in asked_of_prompt if count is not None), default=None)
        asked = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
        if cls._only_echo(body):
            asked = 1  # the engine always gives one; it is left out of the answer
        cut = context.prompts.cut(body, asked)
        prompts: list[list[int]] = []
        shown: list[str] = []
        texts: Texts = []
        asked_for = _as_list(body.prompt)
        context.engine.check_count(len(asked_for) * (body.n or 1))
        for prompt in asked_for:
            ids = await context.prompts.encode_any(prompt, special=body.add_special_tokens, cut=cut)
            params = sampling_params(
                body,
                Ends(body.stop, body.stop_token_ids, body.ignore_eos),
                context.model.sampling,
                max_tokens=context.prompts.room(ids, asked, "max_tokens"),
                vocab=context.prompts.vocab_size,
                logprobs=body.logprobs or None,
                prompt_logprobs=of_prompt,
            )
            texts += [(ids, p) for p in params]
            prompts.append(ids)
            whole = isinstance(prompt, str) and cut is None
            echo = prompt if whole else await context.prompts.decode(ids) if body.echo else ""
            shown.append(str(echo) if body.echo else "")
        made = "cmpl-" + request_id(request)
        return cls(context, body, request, name, prompts, shown, texts, made, int(time.time()))

    def answer(self, texts: Sequence[Delta]) -> dict[str, Any]:
        """The whole answer."""
        tally = Tally(self.prompts)
        choices = []
        for index, text in enumerate(texts):
            text = self._told(text)
            tally.add(self._prompt(index), text)
            choices.append(self._choice(index, text, self._echo(index), 0))
        self._note(tally)
        return {**self._head(), "choices": choices, "usage": tally.usage()}

    async def events(self, generation: Generation) -> Events:
        """The answer as it grows."""
        tally = Tally(self.prompts)
        lengths = [0] * len(self.texts)  # characters sent of each text
        started = [False] * len(self.texts)
        async for index, delta in generation:
            delta = self._told(delta)
            tally.add(self._prompt(index), delta)
            first, started[index] = not started[index], True
            echo = self._echo(index) if first else ""
            choice = self._choice(index, delta, echo, lengths[index], first=first)
            lengths[index] += len(choice["text"])
            chunk = {**self._head(), "choices": [choice]}
            if self.body.usage_at_end:
                chunk["usage"] = tally.usage() if self.body.usage_always else None
            yield event(chunk)
        self._note(tally)
        if self.body.usage_at_end:
            yield event({**self._head(), "choices": [], "usage": tally.usage()})
        yield DONE

    @staticmethod
    def _only_echo(body: CompletionRequest) -> bool:
        """Whether the prompt alone is wanted back, for its logprobs."""
        return body.echo and body.max_tokens == 0

    def _told(self, delta: Delta) -> Delta:
        """What the client hears of it."""
        if not self._only_echo(self.body):
            return delta
        return Delta(prompt=delta.prompt, finish_reason=delta.finish_reason and "length")

    def _head(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.name,
        }

    def _choice(
        self, index: int, delta: Delta, echo: str, offset: int, *, first: bool = True
    ) -> dict[str, Any]:
        logprobs = None
        if self.body.logprobs is not None:
            logprobs = self._logprobs(index, delta, echo, offset)
        choice: dict[str, Any] = {
            "index": index,
            "text": echo + delta.text,
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if self.body.prompt_logprobs is not None and delta.prompt:
            choice["prompt_logprobs"] = self.context.logprobs.ranked(delta.prompt)
        if self.body.return_token_ids:
            choice["token_ids"] = list(delta.token_ids)
            choice["prompt_token_ids"] = self.prompts[self._prompt(index)] if first else None
        return choice

    def _logprobs(self, index: int, delta: Delta, echo: str, offset: int) -> dict[str, Any]:
        """Of the new tokens; before a text's first, of its prompt's where it is echoed."""
        count = self.body.logprobs or 0
        ids, values = list(delta.token_ids), list[float | None](delta.logprobs)
        tops = best(delta.likeliest, count) or [{} for _ in ids]
        if self.body.echo and delta.prompt:
            prompt = self.prompts[self._prompt(index)]
            own = [
                None if top is None else top[i].logprob
                for i, top in zip(prompt, delta.prompt, strict=True)
            ]
            ids, values, tops = prompt + ids, own + values, best(delta.prompt, count) + tops
        else:
            offset += len(echo)
        return self.context.logprobs.completion(ids, values, offset, tops)

    def _prompt(self, index: int) -> int:
        """Which prompt text number ``index`` continues."""
        return index // (len(self.texts) // len(self.prompts))

    def _echo(self, index: int) -> str:
        return self.shown[self._prompt(index)]

    def _note(self, tally: Tally) -> None:
        note(self.request, model=self.name, **tally.counts())


def _as_list(prompt: Any) -> list[str | list[int]]:
    """One prompt or several, told apart: text and a list of ids are one."""
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        return [prompt]
    if not prompt:
        raise bad_request("The prompt is empty; it must have at least one token.", param="prompt")
    return list(prompt)
