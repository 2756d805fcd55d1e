"""Cut: prompts shortened as requests ask (truncate_prompt_tokens)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from qoq.api.protocol import SamplingFields
from qoq.errors import RequestError

# Where a text is cut before it is read, its first tokens may be others than within the whole text.
_MARGIN = 4096  # characters


@dataclass(frozen=True)
class Cut:
    """At most ``count`` tokens of a prompt stay; ``side`` is where those that go are.

    A BOS in front is kept, for models depend on it.
    """

    count: int
    side: Literal["left", "right"] = "left"

    @classmethod
    def asked(
        cls, body: SamplingFields, *, max_model_len: int, max_tokens: int | None
    ) -> "Cut | None":
        """What a request asks for: -1 keeps as many as leave room for ``max_tokens`` (None: one).

        Raises RequestError for a count that cannot fit, or that keeps nothing.
        """
        count, side = body.truncate_prompt_tokens, body.truncation_side
        room = max_model_len - (max_tokens or 1)
        if count is None or room < 1:  # new tokens that leave no room have an error of their own
            return None
        if count == 0 or count > room:
            raise RequestError(
                f"truncate_prompt_tokens must be -1 or from 1 to {room} (this model's context of "
                f"{max_model_len} without the new tokens), not {count}.",
                param="truncate_prompt_tokens",
            )
        return cls(room if count < 0 else count, side or "left")

    def text(self, text: str, longest: int) -> str:
        """As much of a text as can matter; no token stands for more than ``longest`` characters."""
        most = self.count * longest + _MARGIN
        return text[:most] if self.side == "right" else text[-most:]

    def ids(self, ids: Sequence[int], bos: int | None) -> list[int]:
        """The ids that stay."""
        if len(ids) <= self.count:
            return list(ids)
        if self.side == "right":
            return list(ids[: self.count])
        front = list(ids[:1]) if ids[0] == bos and self.count > 1 else []
        return front + list(ids[len(ids) - self.count + len(front) :])
