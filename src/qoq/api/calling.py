"""Tool calls between OpenAI's API and a model: plans for requests, calls in answers."""

import json
import secrets
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from qoq.engine.request import SamplingParams
from qoq.engine.structured_params import StructuredOutputsParams
from qoq.errors import RequestError
from qoq.tokenizer import Tokenizer
from qoq.tools.calls import CallStart, Content, Event, ToolText
from qoq.tools.choose import choose_parser
from qoq.tools.parsers import PARSERS
from qoq.tools.request import ToolPlan, plan_tools

_ALPHABET = string.ascii_letters + string.digits
AUTO = "auto"


@dataclass(frozen=True)
class ToolCalling:
    """How one model's calls are found.

    parser: the name in PARSERS of its way of writing them, None where none is known; auto: whether
    the model may decide by itself to call, which needs a parser; marks: the special tokens that the
    parser has to see.
    """

    parser: str | None = None
    auto: bool = False
    marks: Mapping[int, str] = field(default_factory=dict)

    @classmethod
    def of_model(
        cls,
        tokenizer: Tokenizer,
        model_type: str,
        *,
        template: str | None = None,
        parser: str = AUTO,
        auto: bool | None = None,
    ) -> "ToolCalling":
        """That of a model, by its chat template or the ``template`` in that one's place.

        parser: a name in PARSERS, or "auto": as the template shows. ``auto`` None: where there is a
        parser. Raises RequestError for an unknown parser, and for ``auto`` without one.
        """
        check_parser(parser)
        name: str | None = parser
        if parser == AUTO:
            try:
                source = tokenizer.chat_template(template, tools=True).source
            except RequestError:  # there is none
                source = None
            name = choose_parser(source, model_type)
        if auto and name is None:
            raise RequestError(
                "The chat template does not show how this model writes calls; name it with "
                f"--tool-call-parser ({', '.join(PARSERS)})."
            )
        wanted = PARSERS[name].tokens if name else ()
        marks = {i: text for i, text in tokenizer.special_ids.items() if text in wanted}
        return cls(name, name is not None if auto is None else auto, marks)

    def plan(
        self,
        tools: Sequence[Mapping[str, Any]] | None,
        tool_choice: str | Mapping[str, Any] | None,
        *,
        parallel: bool | None = None,
        form: StructuredOutputsParams | None = None,
    ) -> ToolPlan:
        """What a request's tools (in the shape of chat completions) and its choice mean here.

        ``form`` is what the request wants its text to look like. JSON is for answers without calls;
        other forms are for the text as a whole, whatever is then found in it, and leave no room for
        forms of calls. Raises RequestError naming the field.
        """
        kind, text = ("", "") if form is None else form.spec()
        answer = json.loads(text) if kind in ("json", "json_object") else None
        if answer is True:
            answer = {}
        plan = plan_tools(
            tools,
            tool_choice,
            parser=self.parser if self.auto else None,
            hidden=tuple(self.marks.values()),
            parallel=parallel is not False,
            answer=answer,
        )
        forced = plan.choice in ("required", "named")
        if plan.structure is not None and form is not None and (forced or answer is None):
            raise RequestError(
                "A forced call and a strict function say what the text looks like, and so does "
                "response_format (or structured_outputs); leave one of them out.",
                param="tools",
            )
        if plan.choice == "auto" and plan.parser is None:
            raise RequestError(
                'tools: "auto" tool choice is off here; it needs --enable-auto-tool-choice and '
                '--tool-call-parser. Ask for "required", "none" or one function by name.',
                param="tool_choice",
            )
        return plan

    def shape(self, params: SamplingParams, plan: ToolPlan) -> SamplingParams:
        """``params`` for a text by ``plan``, whose form takes the place of any other."""
        if plan.structure is not None:
            form = StructuredOutputsParams(**plan.structure)
            params = replace(params, structured_outputs=form)
        if plan.choice == "auto":
            params = replace(params, shown_special_ids=tuple(self.marks))
        return params

    def new_id(self) -> str:
        """An id for a call. Mistral's templates take nine letters and digits, and no others."""
        if self.parser == "mistral":
            return _random(9)
        return f"call_{_random(24)}"

    def message(self, found: ToolText) -> dict[str, Any]:
        """An answer as chat completions have it."""
        message: dict[str, Any] = {
            "role": "assistant",
            "content": found.content,
            "refusal": None,
        }
        if found.calls:
            message["content"] = found.content or None
            message["tool_calls"] = [
                {
                    "id": self.new_id(),
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in found.calls
            ]
        return message

    def deltas(self, events: Iterable[Event]) -> list[dict[str, Any]]:
        """Events of a text as chat completions stream them, each a delta of its own."""
        return [self._delta(event) for event in events]

    def _delta(self, event: Event) -> dict[str, Any]:
        if isinstance(event, Content):
            return {"content": event.text}
        call: dict[str, Any] = {"index": event.index}
        if isinstance(event, CallStart):
            call |= {"id": self.new_id(), "type": "function"}
            call["function"] = {"name": event.name, "arguments": ""}
        else:
            call["function"] = {"arguments": event.text}
        return {"tool_calls": [call]}


def check_parser(name: str) -> None:
    """Raise RequestError for what ``ToolCalling.of_model`` does not know."""
    if name not in (AUTO, *PARSERS):
        known = ", ".join(PARSERS)
        raise RequestError(f"There is no tool call parser {name!r}; there are auto, {known}.")


def blame_tools(error: RequestError, plan: ToolPlan) -> RequestError:
    """``error``, as one about tools where it is about the form that they have led to."""
    name, _, reason = str(error).partition(": ")
    if plan.structure is None or name != "structured_outputs":
        return error
    return RequestError(f"tools, as the form of the answer: {reason}", param="tools")


def _random(length: int) -> str:
    return "".join(secrets.choice(_ALPHABET) for _ in range(length))
