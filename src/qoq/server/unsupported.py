"""The one list of fields we know and cannot honour yet: refused by name, never ignored.

Whoever teaches the engine a field takes its line out of here.
"""

from typing import Any

from pydantic import BaseModel

from qoq.server.errors import bad_request

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


def refuse_unsupported(body: BaseModel, **more: Any) -> None:
    """Raise a 400 that names the first field of ``body`` (or of ``more``) we cannot honour."""
    values = {**(body.model_extra or {}), **body.__dict__, **more}
    for name, harmless in UNSUPPORTED.items():
        value = values.get(name)
        if value is not None and value not in harmless:
            raise bad_request(
                f"{name} is not supported by this server; {_INSTEAD.get(name, 'leave it out')}.",
                param=name,
                code="unsupported_parameter",
            )
