"""What clients send to /v1/completions and /v1/chat/completions: OpenAI's fields, and vLLM's.

Fields we do not know are accepted and ignored, as clients of other servers expect. Fields we know
but cannot honour yet are refused by name (``unsupported``); ranges of numbers are the engine's
matter.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from qoq.api.fields import List, Prompt, TokenIds, check_biases
from qoq.errors import RequestError

DEFAULT_MAX_TOKENS = 16  # of completions
_INT64 = 1 << 63


class Body(BaseModel):
    """Base of all requests."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _null_is_left_out(cls, given: Any) -> Any:
        """Clients write null for what they leave to us, in fields of every type."""
        if not isinstance(given, Mapping):
            return given
        known = cls.model_fields
        return {key: value for key, value in given.items() if value is not None or key not in known}

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool):
            wanted = cls.model_fields[str(info.field_name)].annotation
            if bool not in (wanted, *get_args(wanted)):
                raise ValueError("true and false are no values for this")
        return value

    @classmethod
    def of_json(cls, value: Mapping[str, Any]) -> Self:
        """A request from what JSON says; RequestError naming the first field that is wrong."""
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            raise complaint(error.errors(include_input=False, include_url=False)) from None


class StreamOptions(Body):
    """``stream_options``: usage in a last chunk, or in every one."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class QueueFields(Body):
    """Whose turn it is, and with whom cached prompts are shared."""

    priority: Annotated[int, Field(ge=-_INT64, lt=_INT64)] = Field(
        0, description="Lower is served first."
    )
    cache_salt: Annotated[str, Field(max_length=1024)] | None = Field(
        None, description="Only requests with the same one share cached prompts."
    )


class SamplingFields(QueueFields):
    """How tokens are chosen and when to stop; None leaves it to the model's defaults."""

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = Field(None, description="0 or -1: off.")
    min_p: float | None = None
    seed: int | None = Field(None, description="The same seed gives the same text.")
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: str | List[str] | None = None
    stop_token_ids: TokenIds | None = None
    ignore_eos: bool = False
    min_tokens: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    length_penalty: float | None = None
    logit_bias: Annotated[dict[str, float] | None, BeforeValidator(check_biases)] = None
    bad_words: List[str] | None = None
    allowed_token_ids: TokenIds | None = None
    prompt_logprobs: int | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = Field(
        None, description="So many tokens of the prompt are read; -1: as many as fit."
    )
    truncation_side: Literal["left", "right"] | None = Field(
        None, description="Where the prompt is cut; left by default."
    )
    use_beam_search: bool = False
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: List[str] | None = None
    guided_grammar: str | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: str | None = None

    @model_validator(mode="after")
    def _options_need_stream(self) -> "SamplingFields":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed when stream is true")
        return self

    @property
    def usage_at_end(self) -> bool:
        """Whether a stream ends with a chunk that has only the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def usage_always(self) -> bool:
        """Whether every chunk of a stream carries the usage so far."""
        return self.usage_at_end and bool(
            self.stream_options and self.stream_options.continuous_usage_stats
        )


class CompletionRequest(SamplingFields):
    """POST /v1/completions."""

    prompt: Prompt
    suffix: str | None = None
    max_tokens: int | None = 16
    echo: bool = False
    logprobs: int | None = Field(
        None, description="Likeliest tokens to show per token, at most 20."
    )
    best_of: int | None = None
    add_special_tokens: bool = True
    return_token_ids: bool = False


class TextPart(Body):
    """A part of a message's content; text is all we read."""

    type: str
    text: str | None = None


class CalledFunction(Body):
    """What a call calls; arguments are JSON text, as the answer had them."""

    name: str
    arguments: str | dict[str, Any] | None = None


class MessageCall(Body):
    """A call in an earlier answer."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Body):
    """One message of a conversation; what else it has is for the chat template."""

    role: str
    content: str | List[TextPart | str] | None = None
    tool_calls: List[MessageCall] | None = None
    tool_call_id: str | None = None


class ChatFields(Body):
    """What shapes a conversation's prompt."""

    messages: Annotated[List[Message], Field(min_length=1)]
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: List[dict[str, Any]] | None = None
    tools: List[dict[str, Any]] | None = None

    @model_validator(mode="after")
    def _one_ending(self) -> "ChatFields":
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message needs add_generation_prompt to be false")
        return self


class ChatRequest(ChatFields, SamplingFields):
    """POST /v1/chat/completions."""

    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    functions: List[dict[str, Any]] | None = None
    function_call: str | dict[str, Any] | None = None
    echo: bool = False
    return_token_ids: bool = False

    @property
    def new_tokens(self) -> tuple[str, int | None]:
        """The field that says how many new tokens are wanted at most, and what it says."""
        if self.max_completion_tokens is None:
            return "max_tokens", self.max_tokens
        return "max_completion_tokens", self.max_completion_tokens


class TokenizeRequest(Body):
    """POST /tokenize: a prompt, or the fields of a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: List[Message] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool = False
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: List[dict[str, Any]] | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: TokenIds


class ResponsesRequest(QueueFields):
    """POST /v1/responses: text and calls of functions; nothing is stored."""

    model: str | None = None
    input: str | List[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    n: Annotated[int, Field(ge=1, le=1)] | None = None
    stream: bool | None = False
    metadata: dict[str, Any] | None = None
    user: str | None = None
    previous_response_id: str | None = None
    conversation: str | dict[str, Any] | None = None
    background: bool | None = None
    include: List[str] | None = None
    prompt: dict[str, Any] | None = None
    text: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    tools: List[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    top_logprobs: int | None = None
    truncation: Literal["auto", "disabled"] | None = None


def complaint(details: Sequence[Mapping[str, Any]]) -> RequestError:
    """The first of pydantic's complaints; inputs are not repeated, they may be anything."""
    first = details[0] if details else {}
    where = [str(part) for part in first.get("loc", ()) if part != "body"]
    message = str(first.get("msg", "malformed")).removeprefix("Value error, ")
    if where:
        return RequestError(f"{'.'.join(where)}: {message}.", param=where[0])
    if first.get("type") == "value_error":  # fields that do not go together
        return RequestError(f"{message}.")
    return RequestError(f"The body must be a JSON object: {message}.")


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    """The ``usage`` object of completions and chat."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }
