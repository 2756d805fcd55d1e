"""POST /v1/chat/completions: answers to conversations."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from qoq.server.context import Context, Texts, note, request_id, respond
from qoq.server.errors import bad_request
from qoq.server.generation import Delta, Generation
from qoq.server.logprobs import best
from qoq.server.protocol import ChatRequest
from qoq.server.sampling import Ends, check_logprobs, sampling_params
from qoq.server.sse import DONE, Events, event
from qoq.server.tally import Tally
from qoq.server.unsupported import refuse_unsupported


def routes(context: Context) -> APIRouter:
    """The route, bound to what it serves."""
    router = APIRouter()

    @router.post("/v1/chat/completions", tags=["generate"], response_model=None)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation, through the model's chat template."""
        job = await _Job.make(context, body, request)
        return await respond(context, request, job, stream=body.stream)

    return router


@dataclass
class _Job:
    """One conversation, its prompt as ids."""

    context: Context
    body: ChatRequest
    request: Request
    name: str
    prompt: list[int]
    texts: Texts
    id: str
    created: int

    @classmethod
    async def make(cls, context: Context, body: ChatRequest, request: Request) -> "_Job":
        """Check everything that can be checked before the engine sees it."""
        name = context.check_model(body.model)
        check_logprobs(body.top_logprobs, "top_logprobs")
        if body.top_logprobs and not body.logprobs:
            raise bad_request("top_logprobs needs logprobs to be true.", param="top_logprobs")
        refuse_unsupported(body, echo=None)
        if body.echo:
            raise bad_request("echo is not supported for conversations.", param="echo")
        text = await context.prompts.render(
            body.messages,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            variables=body.chat_template_kwargs,
        )
        ids = await context.prompts.encode(text, special=body.add_special_tokens)
        field = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        asked = body.max_tokens if field == "max_tokens" else body.max_completion_tokens
        params = sampling_params(
            body,
            Ends(body.stop, body.stop_token_ids, body.ignore_eos),
            context.model.sampling,
            max_tokens=context.prompts.room(ids, asked, field),
            vocab=context.prompts.vocab_size,
            logprobs=body.top_logprobs or None,
        )
        made = "chatcmpl-" + request_id(request)
        texts: Texts = [(ids, p) for p in params]
        return cls(context, body, request, name, ids, texts, made, int(time.time()))

    def answer(self, texts: Sequence[Delta]) -> dict[str, Any]:
        """The whole answer."""
        tally = Tally([self.prompt])
        choices = []
        for index, text in enumerate(texts):
            tally.add(0, text)
            message = {"role": "assistant", "content": text.text, "refusal": None}
            choices.append(self._choice(index, {"message": message}, text))
        self._note(tally)
        return {**self._head("chat.completion"), "choices": choices, "usage": tally.usage()}

    async def events(self, generation: Generation) -> Events:
        """The answer as it grows; the first chunk of each text has the role."""
        tally = Tally([self.prompt])
        for index in range(len(self.texts)):
            first = {"delta": {"role": "assistant", "content": ""}}
            yield self._chunk(self._choice(index, first, Delta()), tally)
        async for index, delta in generation:
            tally.add(0, delta)
            piece = {"delta": {"content": delta.text} if delta.text else {}}
            if delta.text or delta.finish_reason or self.body.logprobs:
                yield self._chunk(self._choice(index, piece, delta), tally)
        self._note(tally)
        if self.body.usage_at_end:
            head = self._head("chat.completion.chunk")
            yield event({**head, "choices": [], "usage": tally.usage()})
        yield DONE

    def _chunk(self, choice: dict[str, Any], tally: Tally) -> str:
        chunk = {**self._head("chat.completion.chunk"), "choices": [choice]}
        if self.body.usage_at_end:
            chunk["usage"] = tally.usage() if self.body.usage_always else None
        return event(chunk)

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.name}

    def _choice(self, index: int, content: dict[str, Any], delta: Delta) -> dict[str, Any]:
        logprobs = None
        if self.body.logprobs and delta.token_ids:
            tops = best(delta.likeliest, self.body.top_logprobs or 0)
            logprobs = self.context.logprobs.chat(delta.token_ids, delta.logprobs, tops)
        choice: dict[str, Any] = {
            "index": index,
            **content,
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
            "stop_reason": None,
        }
        if self.body.return_token_ids:
            choice["token_ids"] = list(delta.token_ids)
        return choice

    def _note(self, tally: Tally) -> None:
        note(self.request, model=self.name, **tally.counts())
