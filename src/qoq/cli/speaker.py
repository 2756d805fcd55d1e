"""Who answers in the terminal: a model loaded here, or a server."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from qoq.cli.terminal import note

if TYPE_CHECKING:
    from qoq.client.answers import Piece
    from qoq.client.api import Endpoint
    from qoq.engine.request import SamplingParams
    from qoq.llm import LLM

Messages = Sequence[dict[str, str]]


@dataclass(frozen=True)
class Choices:
    """How tokens are chosen; None: as the server likes, or the generation_config.json of a model
    loaded here.
    """

    max_tokens: int
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def given(self) -> dict[str, Any]:
        """Those that are given, by name."""
        return {name: value for name, value in vars(self).items() if value not in (None, ())}


class Speaker(Protocol):
    """Answers piece by piece; the last piece counts tokens. All raise QoqError."""

    def check_chat(self) -> None:
        """Refuse now if it is known that conversations will be refused."""

    def chat(self, messages: Messages) -> "Iterator[Piece]":
        """Answer a conversation."""

    def complete(self, prompt: str) -> "Iterator[Piece]":
        """Continue a text."""


def speaker(
    model: str | None,
    base_url: str | None,
    api_key: str | None,
    choices: Choices,
    speculative: Mapping[str, Any] | None = None,
    *,
    device: str = "auto",
    quiet: bool = False,
) -> Speaker:
    """The server at ``base_url`` (``model`` is then a name it knows), or ``model`` loaded here.

    speculative: how a model that is loaded here guesses tokens; device: where that runs.
    """
    from qoq.errors import RequestError

    if base_url is not None:
        if speculative is not None:
            raise RequestError("--speculative-config is for a model loaded here, not for a server.")
        from qoq.client.api import Endpoint, first_model

        endpoint = Endpoint(base_url, api_key)
        name = model or first_model(endpoint)
        if not quiet:
            note(f"{name} at {base_url}")
        return Remote(endpoint, name, choices)
    if model is None:
        raise RequestError("Name a model to load, or a server with --base-url.")
    from qoq.engine.defaults import sampling_defaults, with_defaults
    from qoq.engine.request import SamplingParams
    from qoq.llm import LLM

    SamplingParams(**choices.given())  # bad values are refused before a model is loaded
    llm = LLM(model, speculative_config=speculative, device=device)
    return Local(llm, with_defaults(sampling_defaults(llm.path), **choices.given()))


class Remote:
    """A server, asked over HTTP."""

    def __init__(self, endpoint: "Endpoint", model: str, choices: Choices) -> None:
        self._endpoint = endpoint
        self._body = {"model": model, **choices.given()}
        if "stop" in self._body:
            self._body["stop"] = list(choices.stop)

    def check_chat(self) -> None:
        """Only an answer can tell."""

    def chat(self, messages: Messages) -> "Iterator[Piece]":
        from qoq.client.api import CHAT, stream

        return stream(self._endpoint, CHAT, {**self._body, "messages": list(messages)})

    def complete(self, prompt: str) -> "Iterator[Piece]":
        from qoq.client.api import COMPLETIONS, stream

        return stream(self._endpoint, COMPLETIONS, {**self._body, "prompt": prompt})


class Local:
    """A model in this process."""

    def __init__(self, llm: "LLM", params: "SamplingParams") -> None:
        self.params = params
        self._llm = llm

    def check_chat(self) -> None:
        self._llm.tokenizer.encode_chat([{"role": "user", "content": "?"}])

    def chat(self, messages: Messages) -> "Iterator[Piece]":
        return self._continue(self._llm.tokenizer.encode_chat(messages))

    def complete(self, prompt: str) -> "Iterator[Piece]":
        return self._continue(self._llm.tokenizer.encode(prompt))

    def _continue(self, ids: list[int]) -> "Iterator[Piece]":
        from qoq.client.answers import Piece

        updates = self._llm.stream_updates(ids, self.params)  # refused here if it cannot be run

        def pieces() -> "Iterator[Piece]":
            for update in updates:
                request = update.request
                yield Piece(
                    update.text, request.finish_reason, len(request.prompt_ids), request.num_new
                )

        return pieces()
