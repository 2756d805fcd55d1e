"""ServerSettings: what the HTTP side is told at start."""

from dataclasses import dataclass

from qoq.errors import RequestError


@dataclass(frozen=True)
class ServerSettings:
    """Names, keys and limits; times in seconds.

    served_model_names: the first is what answers say, all are accepted. api_keys: none lets
    everyone in. max_queued: texts that may wait beside those that run. request_timeout covers the
    whole of a request (None: no limit), body_timeout the arrival of its body, template_timeout the
    rendering of a chat template, step_timeout a step of the engine (0: no limit). Time a stopping
    server waits: shutdown_timeout. trust_request_chat_template lets requests bring a chat template
    of their own.
    """

    served_model_names: tuple[str, ...]
    api_keys: tuple[str, ...] = ()
    max_queued: int = 1024
    max_request_bytes: int = 16 << 20
    request_timeout: float | None = None
    body_timeout: float = 60.0
    template_timeout: float = 5.0
    trust_request_chat_template: bool = False
    step_timeout: float = 600.0
    shutdown_timeout: float = 0.0
    root_path: str = ""
    allowed_origins: tuple[str, ...] = ()
    allowed_methods: tuple[str, ...] = ("*",)
    allowed_headers: tuple[str, ...] = ("*",)
    allow_credentials: bool = False

    def __post_init__(self) -> None:
        """Raises RequestError for a limit that would let nothing through."""
        if not self.served_model_names or not all(self.served_model_names):
            raise RequestError("A served model's name must not be empty.")
        for name in ("max_request_bytes", "request_timeout", "body_timeout", "template_timeout"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise RequestError(f"{name} must be above 0, not {value}.")
        for name in ("max_queued", "shutdown_timeout", "step_timeout"):
            if not getattr(self, name) >= 0:
                raise RequestError(f"{name} must be 0 or more, not {getattr(self, name)}.")

    @property
    def name(self) -> str:
        """The model's name in answers and metrics."""
        return self.served_model_names[0]
