"""POST /v1/responses: OpenAI's newer way to ask, for text; nothing is stored."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import ValidationError

from qoq.engine.request import SamplingParams
from qoq.server.context import Context, Texts, note, request_id, respond
from qoq.server.errors import bad_request
from qoq.server.generation import Delta, Generation
from qoq.server.protocol import Message, ResponsesRequest
from qoq.server.sampling import Ends, sampling_params
from qoq.server.sse import Events, event
from qoq.server.tally import Tally
from qoq.server.unsupported import refuse_unsupported


def routes(context: Context) -> APIRouter:
    """The route, bound to what it serves."""
    router = APIRouter()

    @router.post("/v1/responses", tags=["generate"], response_model=None)
    async def responses(body: ResponsesRequest, request: Request) -> Response:
        """Answer an input: text, or a list of messages."""
        job = await _Job.make(context, body, request)
        return await respond(context, request, job, stream=body.stream)

    return router


@dataclass
class _Job:
    """One input, its prompt as ids."""

    body: ResponsesRequest
    request: Request
    name: str
    prompt: list[int]
    params: SamplingParams
    id: str
    created: int

    @property
    def texts(self) -> Texts:
        """What the engine is asked."""
        return [(self.prompt, self.params)]

    @classmethod
    async def make(cls, context: Context, body: ResponsesRequest, request: Request) -> "_Job":
        """Check everything that can be checked before the engine sees it."""
        name = context.check_model(body.model)
        refuse_unsupported(body)
        if body.prompt is not None:
            raise bad_request("Stored prompts are not supported.", param="prompt")
        text = await context.prompts.render(_messages(body))
        ids = await context.prompts.encode(text, special=False)
        room = context.prompts.room(ids, body.max_output_tokens, "max_output_tokens")
        [params] = sampling_params(
            body, Ends(), context.model.sampling, max_tokens=room, vocab=context.prompts.vocab_size
        )
        return cls(body, request, name, ids, params, request_id(request), int(time.time()))

    def answer(self, texts: Sequence[Delta]) -> dict[str, Any]:
        """The response object at its end."""
        [text] = texts
        tally = Tally([self.prompt])
        tally.add(0, text)
        note(self.request, model=self.name, **tally.counts())
        done = text.finish_reason == "stop"
        return {
            **self._response("completed" if done else "incomplete"),
            "incomplete_details": None if done else {"reason": "max_output_tokens"},
            "output": [self._item(text.text, "completed" if done else "incomplete")],
            "usage": {
                "input_tokens": tally.prompt_tokens,
                "input_tokens_details": {"cached_tokens": tally.cached_tokens},
                "output_tokens": tally.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": tally.prompt_tokens + tally.completion_tokens,
            },
        }

    async def events(self, generation: Generation) -> Events:
        """The response as it grows: one message with one part of text."""
        numbers = count()

        def say(kind: str, **facts: Any) -> str:
            return event({"type": kind, "sequence_number": next(numbers), **facts}, kind)

        place = {"item_id": f"msg_{self.id}", "output_index": 0, "content_index": 0}
        yield say("response.created", response=self._response("in_progress"))
        yield say("response.in_progress", response=self._response("in_progress"))
        item = {**self._item("", "in_progress"), "content": []}
        yield say("response.output_item.added", output_index=0, item=item)
        yield say("response.content_part.added", **place, part=_part(""))
        parts: list[Delta] = []
        async for _, delta in generation:
            parts.append(delta)
            if delta.text:
                yield say("response.output_text.delta", **place, delta=delta.text, logprobs=[])
        whole = Delta.joined(parts)
        final = self.answer([whole])
        yield say("response.output_text.done", **place, text=whole.text, logprobs=[])
        yield say("response.content_part.done", **place, part=_part(whole.text))
        yield say("response.output_item.done", output_index=0, item=final["output"][0])
        yield say(f"response.{final['status']}", response=final)

    def _response(self, status: str) -> dict[str, Any]:
        """The response object without its results."""
        body = self.body
        return {
            "id": f"resp_{self.id}",
            "object": "response",
            "created_at": self.created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self.name,
            "output": [],
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": self.params.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": "none",
            "tools": [],
            "top_p": self.params.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": body.user,
        }

    def _item(self, text: str, status: str) -> dict[str, Any]:
        return {
            "id": f"msg_{self.id}",
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": [_part(text)],
        }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _messages(body: ResponsesRequest) -> list[Message]:
    """Instructions and input as the messages of a conversation."""
    first = [Message(role="system", content=body.instructions)] if body.instructions else []
    if isinstance(body.input, str):
        return [*first, Message(role="user", content=body.input)]
    return [*first, *_read(body.input)]


def _read(items: Sequence[Mapping[str, Any]]) -> list[Message]:
    messages = []
    for item in items:
        kind = item.get("type", "message")
        if kind != "message":
            raise bad_request(
                f"Input of type {str(kind)[:40]!r} is not supported; send messages.", param="input"
            )
        kept = {key: item[key] for key in ("role", "content", "name") if key in item}
        try:
            messages.append(Message.model_validate(kept))
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise bad_request(f"input: {where}: {first['msg']}.", param="input") from None
    return messages
