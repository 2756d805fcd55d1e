"""The one list of fields we know and cannot honour yet: refused by name, never ignored.

Whoever teaches the engine a field takes its line out of here.
"""

from typing import Any

from pydantic import BaseModel

from qoq.api.protocol import ChatRequest, CompletionRequest
from qoq.api.sampling import check_logprobs
from qoq.errors import RequestError

# Field -> the values that ask for nothing, and so are let through (None always is).
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "length_penalty": (1,),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "suffix": ("",),
    "best_of": (1,),
    "use_beam_search": (False,),
    "documents": ([],),
    "previous_response_id": (),
    "conversation": (),
    "background": (False,),
    "include": ([],),
    "truncation": ("disabled",),
}
# What to send instead.
_INSTEAD = {"functions": "use tools instead", "function_call": "use tool_choice instead"}


def refuse_unsupported(body: BaseModel) -> None:
    """Raise a RequestError that names the first field of ``body`` we cannot honour."""
    values = {**(body.model_extra or {}), **body.__dict__}
    for name, harmless in UNSUPPORTED.items():
        value = values.get(name)
        if value is not None and value not in harmless:
            raise RequestError(
                f"{name} is not supported here; {_INSTEAD.get(name, 'leave it out')}.",
                param=name,
                code="unsupported_parameter",
            )


def check_chat(body: ChatRequest) -> None:
    """Raise RequestError for what a conversation cannot ask."""
    check_logprobs(body.top_logprobs, "top_logprobs")
    check_logprobs(body.prompt_logprobs, "prompt_logprobs")
    if body.top_logprobs and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs to be true.", param="top_logprobs")
    if body.prompt_logprobs is not None and body.stream:
        raise RequestError(
            "prompt_logprobs of a conversation are not streamed; leave out stream.",
            param="prompt_logprobs",
        )
    refuse_unsupported(body)
    if body.echo:
        raise RequestError("echo is not supported for conversations.", param="echo")


def check_completion(body: CompletionRequest) -> None:
    """Raise RequestError for what a completion cannot ask."""
    check_logprobs(body.logprobs, "logprobs")
    check_logprobs(body.prompt_logprobs, "prompt_logprobs")
    refuse_unsupported(body)
