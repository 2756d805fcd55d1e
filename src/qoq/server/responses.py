"""POST /v1/responses: OpenAI's newer way to ask, for text and calls; nothing is stored."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from qoq.api.calling import ToolCalling, blame_tools
from qoq.api.checks import refuse_unsupported
from qoq.api.forms import requested_form
from qoq.api.protocol import ResponsesRequest
from qoq.api.sampling import Ends, sampling_params
from qoq.engine.request import SamplingParams
from qoq.errors import RequestError
from qoq.server.context import Context, Texts, note, request_id, respond
from qoq.server.errors import bad_request
from qoq.server.generation import Delta, Generation
from qoq.server.response_input import choice_of, messages_of, tools_of
from qoq.server.response_output import Output
from qoq.server.sse import Events, event
from qoq.server.tally import Tally
from qoq.tools.reader import TextReader
from qoq.tools.request import ToolPlan


def routes(context: Context) -> APIRouter:
    """The route, bound to what it serves."""
    router = APIRouter()

    @router.post("/v1/responses", tags=["generate"], response_model=None)
    async def responses(body: ResponsesRequest, request: Request) -> Response:
        """Answer an input: text, or a list of messages, calls and what came of them."""
        job = await _Job.make(context, body, request)
        try:
            return await respond(context, request, job, stream=body.stream)
        except RequestError as error:
            raise blame_tools(error, job.plan) from error

    return router


@dataclass
class _Job:
    """One input, its prompt as ids."""

    body: ResponsesRequest
    request: Request
    name: str
    prompt: list[int]
    tools: ToolCalling
    plan: ToolPlan
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
        if body.top_logprobs:
            raise bad_request(
                "Responses have no logprobs here; use /v1/chat/completions.", param="top_logprobs"
            )
        calling, tools = context.model.tools, tools_of(body)
        plan = calling.plan(
            tools,
            choice_of(body),
            parallel=body.parallel_tool_calls,
            form=requested_form(vars(body)),
        )
        shown = None if plan.choice == "none" else tools
        text = await context.prompts.render(messages_of(body), tools=shown)
        ids = await context.prompts.encode(text, special=False)
        room = context.prompts.room(ids, body.max_output_tokens, "max_output_tokens")
        [params] = sampling_params(
            body, Ends(), context.model.sampling, max_tokens=room, vocab=context.prompts.vocab_size
        )
        params = calling.shape(params, plan)
        made = request_id(request)
        return cls(body, request, name, ids, calling, plan, params, made, int(time.time()))

    def answer(self, texts: Sequence[Delta]) -> dict[str, Any]:
        """The response object at its end."""
        [text] = texts
        output = self._output()
        list(output.read(TextReader(self.plan).read(text.text, last=True)))
        list(output.finish(_status(text)))
        return self._whole(text, output)

    async def events(self, generation: Generation) -> Events:
        """The response as it grows."""
        numbers = count()

        def say(kind: str, facts: dict[str, Any]) -> str:
            kind = f"response.{kind}"
            return event({"type": kind, "sequence_number": next(numbers), **facts}, kind)

        yield say("created", {"response": self._response("in_progress")})
        yield say("in_progress", {"response": self._response("in_progress")})
        output, reader = self._output(), TextReader(self.plan)
        parts: list[Delta] = []
        async for _, delta in generation:
            parts.append(delta)
            last = delta.finish_reason is not None
            for told in output.read(reader.read(delta.text, last=last)):
                yield say(*told)
        whole = Delta.joined(parts)
        for told in output.finish(_status(whole)):
            yield say(*told)
        final = self._whole(whole, output)
        yield say(final["status"], {"response": final})

    def _output(self) -> Output:
        return Output(self.id, self.tools.new_id)

    def _whole(self, text: Delta, output: Output) -> dict[str, Any]:
        tally = Tally([self.prompt])
        tally.add(0, text)
        note(self.request, model=self.name, **tally.counts())
        status = _status(text)
        return {
            **self._response(status),
            "incomplete_details": None
            if status == "completed"
            else {"reason": "max_output_tokens"},
            "output": output.items,
            "usage": {
                "input_tokens": tally.prompt_tokens,
                "input_tokens_details": {"cached_tokens": tally.cached_tokens},
                "output_tokens": tally.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": tally.prompt_tokens + tally.completion_tokens,
            },
        }

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
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": self.params.temperature,
            "text": {"format": {"type": "text"}, **(body.text or {})},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_p": self.params.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": body.user,
        }


def _status(text: Delta) -> str:
    return "completed" if text.finish_reason == "stop" else "incomplete"
