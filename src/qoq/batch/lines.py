"""Lines of OpenAI's batch format: what is asked, and the answer as the API would have given it."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from qoq.engine.request import Output, SamplingParams
from qoq.errors import RequestError

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
Messages = Sequence[Mapping[str, Any]]

# What SamplingParams can do and answers here cannot tell yet.
_UNTOLD = {"n", "logprobs", "prompt_logprobs", "structured_outputs"}
# Names of the body that are SamplingParams' own.
_OWN = {field.name for field in fields(SamplingParams)} - {"max_tokens", "stop"} - _UNTOLD
# What changes an answer in ways this program cannot honour here; these values change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "stream": (False,),
    "echo": (False,),
    "logprobs": (False, 0),
    "tools": ([],),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "prompt_logprobs": (),
    "structured_outputs": ({},),
    "suffix": ("",),
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


def line_id(number: int, raw: bytes) -> str:
    """A line's id: the same for the same bytes at the same place, so that a run can be resumed."""
    return "batch_req_" + hashlib.sha256(b"%d:%s" % (number, raw)).hexdigest()[:24]


def read_line(number: int, raw: bytes) -> Line:
    """The request of a line. Raises BadLine."""
    try:
        value = json.loads(raw)
    except ValueError as error:  # no JSON, or no UTF-8
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


def params_of(line: Line, defaults: Mapping[str, Any], context: int) -> SamplingParams:
    """How to sample, by the body, then the model's ``defaults``, then the API's own.

    Chats are as long as the ``context`` allows unless they say otherwise, completions 16 tokens.
    Raises RequestError for bad values and for what cannot be honoured.
    """
    body = {name: value for name, value in line.body.items() if value is not None}
    for name, neutral in _NEUTRAL.items():
        if name in body and name not in _OWN and body[name] not in neutral:
            raise RequestError(f"{name}={body[name]!r} is not supported in a batch.")
    longest = body.get("max_tokens", context if line.url == CHAT else 16)
    if line.url == CHAT:
        longest = body.get("max_completion_tokens", longest)
    wanted = {"temperature": 1.0, **defaults, **{k: v for k, v in body.items() if k in _OWN}}
    if wanted.get("top_k") == -1:  # how many clients say "off"
        wanted["top_k"] = 0
    try:
        if "logit_bias" in wanted:  # the keys of a JSON object are text
            wanted["logit_bias"] = {int(i): bias for i, bias in wanted["logit_bias"].items()}
        return SamplingParams(max_tokens=longest, stop=body.get("stop") or (), **wanted)
    except (TypeError, AttributeError, ValueError) as error:
        raise RequestError(f"The body has a value of a wrong type: {error}.") from error


def prompt_ids(
    line: Line,
    encode: Callable[[str], list[int]],
    encode_chat: Callable[[Messages], list[int]],
) -> list[int]:
    """Ids of the line's prompt or conversation. Raises RequestError."""
    if line.url == CHAT:
        messages = line.body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise RequestError("messages must be a list of at least one message.")
        return encode_chat([_plain(message) for message in messages])
    prompt = line.body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return encode(prompt)
    if isinstance(prompt, list) and all(type(i) is int for i in prompt):
        return prompt
    raise RequestError("prompt must be one text or one list of token ids.")


def answer(line: Line, model: str, output: Output) -> dict[str, Any]:
    """The line of a finished request."""
    counts = {
        "prompt_tokens": len(output.prompt_token_ids),
        "completion_tokens": len(output.token_ids),
        "total_tokens": len(output.prompt_token_ids) + len(output.token_ids),
    }
    choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": output.finish_reason}
    if line.url == CHAT:
        choice["message"] = {"role": "assistant", "content": output.text}
    else:
        choice["text"] = output.text
    body = {
        "id": f"{'chatcmpl' if line.url == CHAT else 'cmpl'}-{line.id.rpartition('_')[2]}",
        "object": "chat.completion" if line.url == CHAT else "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": [choice],
        "usage": counts,
    }
    return _response(line, 200, body)


def refusal(line: Line, error: RequestError) -> dict[str, Any]:
    """The line of a request that the API would have answered with a 400."""
    told = {"message": str(error), "type": "invalid_request_error", "param": None, "code": None}
    return _response(line, 400, {"error": told})


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


def _plain(message: Any) -> Mapping[str, Any]:
    """A message whose content is a string; parts of text are joined."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise RequestError('Every message needs a "role" and a "content".')
    content = message.get("content")
    if not isinstance(content, list):
        return message
    parts = [part.get("text") if isinstance(part, dict) else part for part in content]
    if not all(isinstance(part, str) for part in parts):
        raise RequestError("Content that is not text is not supported.")
    return {**message, "content": "\n".join(map(str, parts))}
