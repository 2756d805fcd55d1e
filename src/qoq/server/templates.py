"""Chat templates in a process of their own, so that one that loops or explodes can be killed.

A template is a program that came with the model. The sandbox keeps it from files and from our
objects, not from ``9**9**9`` or nested loops, which no thread can be stopped in. So a child process
renders it: a rendering that takes longer than the limit is refused, the child killed, and the next
conversation gets a fresh one. The child's memory is limited too, where the system can do that.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from qoq.child import Child
from qoq.errors import RequestError
from qoq.tokenizer import ChatTemplate


class TemplateProcess:
    """Renders conversations; ``render`` may be called from any thread.

    One at a time: renderings take well under a millisecond.
    """

    def __init__(self, *, time_limit: float) -> None:
        """``time_limit`` in seconds is for one rendering; the child's start does not count."""
        self._time_limit = time_limit
        hello = {"seconds": time_limit}
        self._child = Child("qoq.server.template_child", lambda: hello)

    def render(
        self, template: ChatTemplate, messages: Sequence[Mapping[str, Any]], **options: Any
    ) -> str:
        """The prompt of a conversation; ``options`` are those of ``ChatTemplate.render``.

        Raises RequestError where the template refuses the messages or is cut off.
        """
        question = {
            "template": template.to_json(),
            "messages": list(messages),
            "options": options,
        }
        try:
            answer = self._child.ask(question, self._time_limit)
        except RecursionError:
            raise RequestError("The conversation is nested too deeply; make it flatter.") from None
        if answer is None:
            raise RequestError(
                f"The chat template took longer than {self._time_limit:g} s or too much memory and "
                "was cut off. Send fewer messages, or serve the model with another --chat-template."
            )
        if "error" in answer:
            raise RequestError(str(answer["error"]))
        return str(answer["text"])

    def start(self) -> None:
        """Have the child ready before the first conversation."""
        self._child.start()

    def close(self) -> None:
        """End the child."""
        self._child.close()
