"""POST /v1/chat/completions: answers to conversations."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from qoq.api.calling import ToolCalling, blame_tools
from qoq.api.checks import check_chat
from qoq.api.forms import requested_form
from qoq.api.logprobs import best
from qoq.api.protocol import ChatRequest
from qoq.api.sampling import Ends, sampling_params
from qoq.errors import RequestError
from qoq.server.context import Context, Texts, note, request_id, respond
from qoq.server.generation import Delta, Generation
from qoq.server.sse import DONE, Events, event
from qoq.server.tally import Tally
from qoq.tools.calls import collect
from qoq.tools.reader import TextReader
from qoq.tools.request import ToolPlan


def routes(context: Context) -> APIRouter:
    """The route, bound to what it serves."""
    router = APIRouter()

    @router.post("/v1/chat/completions", tags=["generate"], response_model=None)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation, through the model's chat template."""
        job = await _Job.make(context, body, request)
        try:
            return await respond(context, request, job, stream=body.stream)
        except RequestError as error:
            raise blame_tools(error, job.plan) from error

    return router


@dataclass
class _Job:
    """One conversation, its prompt as ids."""

    context: Context
    body: ChatRequest
    request: Request
    name: str
    prompt: list[int]
    plan: ToolPlan
    texts: Texts
    id: str
    created: int

    @classmethod
    async def make(cls, context: Context, body: ChatRequest, request: Request) -> "_Job":
        """Check everything that can be checked before the engine sees it."""
        name = context.check_model(body.model)
        check_chat(body)
        plan = context.model.tools.plan(
            body.tools,
            body.tool_choice,
            parallel=body.parallel_tool_calls,
            form=requested_form(vars(body)),
        )
        text = await context.prompts.render(
            body.messages,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            tools=None if plan.choice == "none" else body.tools,
            template=body.chat_template,
            variables=body.chat_template_kwargs,
        )
        field, asked = body.new_tokens
        cut = context.prompts.cut(body, asked)
        ids = await context.prompts.encode(text, special=body.add_special_tokens, cut=cut)
        params = sampling_params(
            body,
            Ends(body.stop, body.stop_token_ids, body.ignore_eos),
            context.model.sampling,
            max_tokens=context.prompts.room(ids, asked, field),
            vocab=context.prompts.vocab_size,
            logprobs=body.top_logprobs or None,
            prompt_logprobs=body.prompt_logprobs,
        )
        made = "chatcmpl-" + request_id(request)
        texts: Texts = [(ids, context.model.tools.shape(p, plan)) for p in params]
        return cls(context, body, request, name, ids, plan, texts, made, int(time.time()))

    @property
    def tools(self) -> ToolCalling:
        """How the model calls."""
        return self.context.model.tools

    def answer(self, texts: Sequence[Delta]) -> dict[str, Any]:
        """The whole answer."""
        tally = Tally([self.prompt])
        choices = []
        for index, text in enumerate(texts):
            tally.add(0, text)
            reader = TextReader(self.plan)
            message = self.tools.message(collect(reader.read(text.text, last=True)))
            reason = reader.finish_reason(text.finish_reason)
            choices.append(self._choice(index, {"message": message}, text, reason))
        self._note(tally)
        whole = {**self._head("chat.completion"), "choices": choices, "usage": tally.usage()}
        if self.body.prompt_logprobs is not None:
            whole["prompt_logprobs"] = self.context.logprobs.ranked(texts[0].prompt)
        if self.body.return_token_ids:
            whole["prompt_token_ids"] = self.prompt
        return whole

    async def events(self, generation: Generation) -> Events:
        """The answer as it grows; the first chunk of each text has the role."""
        tally = Tally([self.prompt])
        readers = [TextReader(self.plan) for _ in self.texts]
        for index in range(len(self.texts)):
            first = {"delta": {"role": "assistant", "content": ""}}
            yield self._chunk(self._choice(index, first, Delta(), None), tally, first=index == 0)
        async for index, delta in generation:
            tally.add(0, delta)
            for choice in self._pieces(index, delta, readers[index]):
                yield self._chunk(choice, tally)
        self._note(tally)
        if self.body.usage_at_end:
            head = self._head("chat.completion.chunk")
            yield event({**head, "choices": [], "usage": tally.usage()})
        yield DONE

    def _pieces(self, index: int, delta: Delta, reader: TextReader) -> list[dict[str, Any]]:
        """What is new of a text as choices: the first tells its tokens, the last how it ended."""
        last = delta.finish_reason is not None
        found = self.tools.deltas(reader.read(delta.text, last=last))
        if not found and (last or self.body.logprobs or self.body.return_token_ids):
            found = [{}]
        reason = reader.finish_reason(delta.finish_reason)
        return [
            self._choice(
                index,
                {"delta": piece},
                delta if at == 0 else Delta(stop_reason=delta.stop_reason),
                reason if at == len(found) - 1 else None,
            )
            for at, piece in enumerate(found)
        ]

    def _chunk(self, choice: dict[str, Any], tally: Tally, *, first: bool = False) -> str:
        chunk = {**self._head("chat.completion.chunk"), "choices": [choice]}
        if first and self.body.return_token_ids:
            chunk["prompt_token_ids"] = self.prompt
        if self.body.usage_at_end:
            chunk["usage"] = tally.usage() if self.body.usage_always else None
        return event(chunk)

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.name}

    def _choice(
        self, index: int, content: dict[str, Any], delta: Delta, reason: str | None
    ) -> dict[str, Any]:
        logprobs = None
        if self.body.logprobs and delta.token_ids:
            tops = best(delta.likeliest, self.body.top_logprobs or 0)
            logprobs = self.context.logprobs.chat(delta.token_ids, delta.logprobs, tops)
        choice: dict[str, Any] = {
            "index": index,
            **content,
            "logprobs": logprobs,
            "finish_reason": reason,
            "stop_reason": delta.stop_reason if reason else None,
        }
        if self.body.return_token_ids:
            choice["token_ids"] = list(delta.token_ids)
        return choice

    def _note(self, tally: Tally) -> None:
        note(self.request, model=self.name, **tally.counts())
