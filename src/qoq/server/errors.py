"""Errors on the wire: one exception for all of them, in OpenAI's shape."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from qoq.api.protocol import complaint
from qoq.errors import RequestError
from qoq.server.wire import JSONAnswer

RETRY_AFTER_S = 5  # how long a client that found no room should stay away
CLIENT_GONE = 499  # what the log says of a request whose client hung up; nobody reads the answer

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    503: "service_unavailable_error",
}


class APIError(Exception):
    """An answer other than 200: ``status``, a sentence for the client, the field it is about.

    ``retry`` adds Retry-After: the same request may pass in a while.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = {"Retry-After": str(RETRY_AFTER_S)} if retry else {}
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"

    def body(self) -> dict[str, Any]:
        """``{"error": {"message", "type", "param", "code"}}``."""
        kind = _TYPES.get(
            self.status, "invalid_request_error" if self.status < 500 else "api_error"
        )
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JSONAnswer:
        """The whole answer, headers included."""
        return JSONAnswer(self.body(), self.status, headers=self.headers)


def bad_request(message: str, *, param: str | None = None, code: str | None = None) -> APIError:
    """A 400."""
    return APIError(400, message, param=param, code=code)


def queue_full() -> APIError:
    """A 503 for a request that found no room."""
    message = "The server's queue is full; try again in a few seconds."
    return APIError(503, message, code="queue_full", retry=True)


def shutting_down() -> APIError:
    """A 503 while the server drains."""
    message = "The server is shutting down; send the request to another one or try again later."
    return APIError(503, message, code="shutting_down", retry=True)


def engine_dead() -> APIError:
    """A 503 once a step has failed: no request can be answered any more."""
    message = "The engine has stopped after an internal error; the server must be restarted."
    return APIError(503, message, code="engine_dead")


def timed_out(seconds: float) -> APIError:
    """A 408 for a request that took longer than the server grants."""
    message = f"The request took longer than {seconds:g} s; ask for fewer tokens or try again."
    return APIError(408, message, code="timeout")


def to_api_error(error: Exception) -> APIError:
    """What a client is told about ``error``; nothing of our insides for those that are bugs."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, RequestError):
        return bad_request(str(error), param=error.param, code=error.code)
    return APIError(500, "Internal error; the server's log has the cause under this request's id.")


def add_handlers(app: FastAPI) -> None:
    """Answer every error of ``app`` in OpenAI's shape, those of the framework included.

    Other exceptions are bugs; the outermost middleware answers them.
    """

    async def known(_: Request, error: Exception) -> JSONAnswer:
        return to_api_error(error).response()

    async def invalid(_: Request, error: Exception) -> JSONAnswer:
        details = error.errors() if isinstance(error, RequestValidationError) else []
        return _validation(details).response()

    async def http(_: Request, error: Exception) -> JSONAnswer:
        if isinstance(error.__cause__, UnicodeDecodeError):  # FastAPI says no more than "an error"
            return bad_request("The body is not UTF-8.", code="invalid_json").response()
        if isinstance(error.__cause__, RecursionError):
            return bad_request("The body is nested too deeply.", code="invalid_json").response()
        status = error.status_code if isinstance(error, HTTPException) else 500
        detail = str(error.detail) if isinstance(error, HTTPException) else "Internal error."
        answer = APIError(status, detail)
        answer.headers.update(getattr(error, "headers", None) or {})
        return answer.response()

    app.add_exception_handler(APIError, known)
    app.add_exception_handler(RequestError, known)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)


def _validation(details: Any) -> APIError:
    """What is wrong with a body."""
    first: dict[str, Any] = next(iter(details), {})
    if first.get("type") == "json_invalid":
        cause = first.get("ctx", {}).get("error", "")
        return bad_request(f"The body is not valid JSON: {cause}.", code="invalid_json")
    return to_api_error(complaint(details))
