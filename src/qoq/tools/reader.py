"""TextReader: one text of an answer, taken apart as it grows."""

from qoq.tools.calls import CallStart, Content, Event
from qoq.tools.request import ToolPlan


class TextReader:
    """Reads one text of an answer as it grows; content alone where the plan looks for no calls."""

    def __init__(self, plan: ToolPlan) -> None:
        self._plan = plan
        self._parser = plan.parser() if plan.parser else None
        self._called = False

    def read(self, piece: str, *, last: bool = False) -> list[Event]:
        """What ``piece`` makes certain, or with ``last`` all that is left. Later calls than the
        first are left out where the plan is not parallel.
        """
        if self._parser is None:
            return [Content(piece)] if piece else []
        events = self._parser.push(piece) + (self._parser.finish() if last else [])
        self._called = self._called or any(isinstance(event, CallStart) for event in events)
        if self._plan.parallel:
            return events
        return [event for event in events if isinstance(event, Content) or event.index == 0]

    def finish_reason(self, reason: str | None) -> str | None:
        """``reason``, or "tool_calls" where the text stopped for its calls; a named function's call
        is the whole text and ends with "stop", as OpenAI has it.
        """
        stopped = reason == "stop" and self._called and self._plan.choice != "named"
        return "tool_calls" if stopped else reason
