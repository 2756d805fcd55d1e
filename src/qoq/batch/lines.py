"""Lines of OpenAI's batch format: what is asked, and the answer as the API would have given it."""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qoq.api.calling import ToolCalling
from qoq.api.checks import check_chat, check_completion
from qoq.api.cut import Cut
from qoq.api.forms import requested_form
from qoq.api.logprobs import LogprobWriter, best
from qoq.api.messages import plain_messages, shown_tools
from qoq.api.protocol import DEFAULT_MAX_TOKENS, ChatRequest, CompletionRequest, SamplingFields
from qoq.api.room import room
from qoq.api.sampling import Ends, sampling_params
from qoq.engine.request import Output, SamplingParams
from qoq.errors import RequestError
from qoq.tokenizer import Tokenizer
from qoq.tools.calls import collect
from qoq.tools.reader import TextReader
from qoq.tools.request import ToolPlan

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"

# What the server honours and a batch does not; these values change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "stream": (False,),
    "echo": (False,),
}


@dataclass(frozen=True)
class Line:
    """A sound line: its own id, the client's, the route and the body."""

    id: str
    custom_id: str
    url: str
    body: dict[str, Any]


class BadLine(Exception):
    """A line that is no request; ``custom_id`` where one could be read."""

    def __init__(self, message: str, custom_id: str | None = None) -> None:
        super().__init__(message)
        self.custom_id = custom_id


@dataclass(frozen=True)
class Model:
    """What lines are read with: the name in answers, sampling defaults, the context in tokens."""

    name: str
    tokenizer: Tokenizer
    tools: ToolCalling
    defaults: Mapping[str, float]
    context: int
    vocab_size: int


@dataclass(frozen=True)
class Asked:
    """A line's request: its prompt, and one SamplingParams for each of its texts."""

    line: Line
    body: ChatRequest | CompletionRequest
    plan: ToolPlan
    prompt: list[int]
    params: list[SamplingParams]


def line_id(number: int, raw: bytes) -> str:
    """A line's id: the same for the same bytes at the same place, so that a run can be resumed."""
    return "batch_req_" + hashlib.sha256(b"%d:%s" % (number, raw)).hexdigest()[:24]


def read_line(number: int, raw: bytes) -> Line:
    """The request of a line. Raises BadLine."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:  # no JSON, or no UTF-8
        raise BadLine(f"Line {number} is not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise BadLine(f"Line {number} must be a JSON object.")
    custom_id = value.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        raise BadLine(f"Line {number} needs a custom_id, a string.")
    if value.get("method", "POST") != "POST":
        raise BadLine(f"Line {number}: method must be POST.", custom_id)
    if value.get("url") not in (CHAT, COMPLETIONS):
        raise BadLine(f"Line {number}: url must be {CHAT} or {COMPLETIONS}.", custom_id)
    if not isinstance(value.get("body"), dict):
        raise BadLine(f"Line {number}: body must be an object.", custom_id)
    return Line(line_id(number, raw), custom_id, value["url"], value["body"])


def asked(line: Line, model: Model) -> Asked:
    """What a line asks of the engine, read as the server reads it.

    Chats are as long as the context allows unless they say otherwise. Raises RequestError for bad
    values and for what cannot be honoured.
    """
    for name, neutral in _NEUTRAL.items():
        value = line.body.get(name)
        if value is not None and value not in neutral:
            raise RequestError(f"{name} is not supported in a batch; leave it out.", param=name)
    try:
        return _chat(line, model) if line.url == CHAT else _completion(line, model)
    except RecursionError:
        raise RequestError("The body is nested too deeply; make it flatter.") from None


def _chat(line: Line, model: Model) -> Asked:
    body = ChatRequest.of_json(line.body)
    check_chat(body)
    plan = model.tools.plan(
        body.tools,
        body.tool_choice,
        parallel=body.parallel_tool_calls,
        form=requested_form(vars(body)),
    )
    tools = None if plan.choice == "none" else shown_tools(body.tools)
    text = model.tokenizer.chat_template(body.chat_template, tools=bool(tools)).render(
        plain_messages(body.messages),
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        tools=tools,
        variables=body.chat_template_kwargs,
    )
    ids = model.tokenizer.encode(text, special=body.add_special_tokens)
    name, longest = body.new_tokens
    ids = _cut(ids, body, longest, model)
    new = room(len(ids), longest, context=model.context, name=name)
    params = _params(body, body.top_logprobs, new, model)
    return Asked(line, body, plan, ids, [model.tools.shape(p, plan) for p in params])


def _completion(line: Line, model: Model) -> Asked:
    body = CompletionRequest.of_json(line.body)
    check_completion(body)
    prompt = body.prompt
    if prompt and len(prompt) == 1 and isinstance(prompt[0], list | str):
        prompt = prompt[0]
    if isinstance(prompt, str):
        ids = model.tokenizer.encode(prompt, special=body.add_special_tokens)
    else:
        ids = [i for i in prompt if isinstance(i, int)]
        if len(ids) < len(prompt):
            raise RequestError("prompt must be one text or one list of token ids.", param="prompt")
    longest = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    ids = _cut(ids, body, longest, model)
    new = room(len(ids), longest, context=model.context, name="max_tokens")
    return Asked(line, body, ToolPlan(), ids, _params(body, body.logprobs, new, model))


def _cut(ids: list[int], body: SamplingFields, longest: int | None, model: Model) -> list[int]:
    cut = Cut.asked(body, max_model_len=model.context, max_tokens=longest)
    return ids if cut is None else cut.ids(ids, model.tokenizer.hf.bos_token_id)


def _params(
    body: ChatRequest | CompletionRequest, logprobs: int | None, longest: int, model: Model
) -> list[SamplingParams]:
    return sampling_params(
        body,
        Ends(body.stop, body.stop_token_ids, body.ignore_eos),
        model.defaults,
        max_tokens=longest,
        vocab=model.vocab_size,
        logprobs=logprobs or None,
        prompt_logprobs=body.prompt_logprobs,
    )


def answer(
    request: Asked, outputs: Sequence[Output], model: Model, writer: LogprobWriter
) -> dict[str, Any]:
    """The line of a finished request, all of its texts."""
    line, body, first = request.line, request.body, outputs[0]
    is_chat = line.url == CHAT
    choices = [_choice(request, index, text, model, writer) for index, text in enumerate(outputs)]
    new = sum(len(text.token_ids) for text in outputs)
    made: dict[str, Any] = {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{line.id.rpartition('_')[2]}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": int(time.time()),
        "model": body.model or model.name,
        "choices": choices,
        "usage": {
            "prompt_tokens": len(request.prompt),
            "completion_tokens": new,
            "total_tokens": len(request.prompt) + new,
        },
    }
    if first.prompt_logprobs is not None:
        told = writer.ranked(first.prompt_logprobs)
        (made if is_chat else choices[0])["prompt_logprobs"] = told
    if body.return_token_ids:
        for choice in choices if not is_chat else [made]:
            choice["prompt_token_ids"] = request.prompt
    return _response(line, 200, made)


def _choice(
    request: Asked, index: int, text: Output, model: Model, writer: LogprobWriter
) -> dict[str, Any]:
    body, reason = request.body, text.finish_reason
    count = body.top_logprobs if isinstance(body, ChatRequest) else body.logprobs
    tops = best(text.top_logprobs or (), count or 0)
    choice: dict[str, Any] = {
        "index": index,
        "logprobs": None,
        "finish_reason": reason,
        "stop_reason": text.stop_reason,
    }
    if body.return_token_ids:
        choice["token_ids"] = text.token_ids
    if isinstance(body, ChatRequest):
        reader = TextReader(request.plan)
        choice["message"] = model.tools.message(collect(reader.read(text.text, last=True)))
        choice["finish_reason"] = reader.finish_reason(reason)
        if body.logprobs:
            choice["logprobs"] = writer.chat(text.token_ids, text.logprobs, tops)
    else:
        choice["text"] = text.text
        if body.logprobs is not None:
            choice["logprobs"] = writer.completion(text.token_ids, text.logprobs, 0, tops)
    return choice


def refusal(line: Line, error: RequestError) -> dict[str, Any]:
    """The line of a request that the API would have answered with a 400."""
    told = {"message": str(error), "param": error.param, "code": error.code}
    return _response(line, 400, {"error": {**told, "type": "invalid_request_error"}})


def malformed(own_id: str, error: BadLine) -> dict[str, Any]:
    """The line of what is no request at all."""
    return {
        "id": own_id,
        "custom_id": error.custom_id,
        "response": None,
        "error": {"code": "invalid_request", "message": str(error)},
    }


def _response(line: Line, status: int, body: dict[str, Any]) -> dict[str, Any]:
    request_id = f"req_{line.id.rpartition('_')[2]}"
    return {
        "id": line.id,
        "custom_id": line.custom_id,
        "response": {"status_code": status, "request_id": request_id, "body": body},
        "error": None,
    }
