"""Types of fields that may hold a million values: told apart, and refused, by the first of them.

pydantic by itself tries every kind of a union and collects an error per item, which takes seconds
for a few megabytes, and nobody else is served meanwhile.
"""

from typing import Annotated, Any, TypeVar

from pydantic import Discriminator, Field, StrictInt, Tag

MAX_BIASES = 20_000
T = TypeVar("T")
List = Annotated[list[T], Field(fail_fast=True)]
TokenIds = List[StrictInt]


def check_biases(given: Any) -> Any:
    """``logit_bias`` before its numbers are read; ValueError for one that is no such thing."""
    if isinstance(given, dict):
        if len(given) > MAX_BIASES:
            raise ValueError(f"at most {MAX_BIASES} tokens can be named, not {len(given)}")
        if any(isinstance(bias, bool) for bias in given.values()):
            raise ValueError("true and false are no biases")
    return given


def _kind(prompt: Any) -> str:
    """Which of the four kinds of prompt a value means to be, by its first item alone."""
    if not isinstance(prompt, list):
        return "text"
    first = prompt[0] if prompt else 0
    return "texts" if isinstance(first, str) else "many ids" if isinstance(first, list) else "ids"


Prompt = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[TokenIds, Tag("ids")]
    | Annotated[List[str], Tag("texts")]
    | Annotated[List[TokenIds], Tag("many ids")],
    Discriminator(_kind),
]
