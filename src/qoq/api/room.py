"""Room: how many new tokens fit behind a prompt; both lengths are named where they do not."""

from qoq.errors import RequestError

_CODE = "context_length_exceeded"


def room(length: int, asked: int | None, *, context: int, name: str) -> int:
    """New tokens for a prompt of ``length``: those asked for, or all that fit (None).

    ``name`` is the field that asks. Raises RequestError where they do not fit.
    """
    if length < 1:
        raise RequestError("The prompt is empty; it must have at least one token.")
    left = context - length
    if left < 1:
        raise too_long(str(length), context)
    if asked is None:
        return left
    if asked > left:
        raise RequestError(
            f"This model's context is {context} tokens. The prompt has {length}, and {name} asks "
            f"for {asked} more: {length + asked} together. Shorten the prompt or lower {name}.",
            param=name,
            code=_CODE,
        )
    return asked


def too_long(count: str, context: int) -> RequestError:
    """For a prompt of ``count`` tokens."""
    return RequestError(
        f"The prompt has {count} tokens; this model's context is {context}, new tokens included. "
        "Shorten the prompt.",
        param="prompt",
        code=_CODE,
    )
