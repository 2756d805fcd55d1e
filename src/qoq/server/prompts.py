"""Prompts: text and conversations to ids that fit the model, off the event loop.

Tokenizing a long text takes a while and lets go of the interpreter, so it happens in threads of its
own. A few are enough, and they only read the tokenizer: what changes it on first use is done here
before they start.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from qoq.errors import RequestError
from qoq.server.errors import bad_request
from qoq.server.protocol import Message, TextPart
from qoq.server.templates import TemplateProcess
from qoq.tokenizer import ChatTemplate, Tokenizer

_THREADS = 2
_TEXT_PARTS = ("text", "input_text", "output_text")
T = TypeVar("T")


class Prompts:
    """Makes the ids of prompts and knows which of them fit."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        *,
        max_model_len: int,
        vocab_size: int,
        template_timeout: float,
    ) -> None:
        self._tokenizer = tokenizer
        self.max_model_len = max_model_len
        self.vocab_size = vocab_size
        self._templates = (
            None if template is None else TemplateProcess(template, time_limit=template_timeout)
        )
        tokenizer.encode("a")
        # No token stands for more characters, so a text this many times longer cannot fit.
        self._longest = max((len(token) for token in tokenizer.hf.get_vocab()), default=1)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="qoq-tokenizer")
        # Renderings wait for each other, and for one that is being cut off; tokenizing must not.
        self._renderer = ThreadPoolExecutor(1, thread_name_prefix="qoq-template")

    def start(self) -> None:
        """Have the process that renders chat templates ready."""
        if self._templates is not None:
            self._templates.start()

    def close(self) -> None:
        """End threads and process."""
        for threads in (self._threads, self._renderer):
            threads.shutdown(wait=False, cancel_futures=True)
        if self._templates is not None:
            self._templates.close()

    async def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Ids of a text. Raises APIError 400 for one that cannot fit, before any work."""
        least = -(-len(text) // self._longest)
        if least > self.max_model_len:
            raise self._too_long(f"at least {least}")
        return await self._off_loop(lambda: self._encode(text, special))

    async def encode_any(self, prompt: str | Sequence[int], *, special: bool) -> list[int]:
        """Ids of a text, or the ids given once they are found to be of this vocabulary."""
        if isinstance(prompt, str):
            return await self.encode(prompt, special=special)
        if len(prompt) >= self.max_model_len:  # before each of a million is looked at
            raise self._too_long(str(len(prompt)))
        self.check_ids(prompt, "prompt")
        return list(prompt)

    async def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """A conversation as the model's chat template writes it; APIError 400 where it cannot."""
        templates = self._templates
        if templates is None:
            raise bad_request(
                "This model has no chat template; use /v1/completions, or serve it with "
                "--chat-template.",
                param="messages",
            )
        plain = [plain_message(message) for message in messages]
        return await asyncio.get_running_loop().run_in_executor(
            self._renderer,
            lambda: templates.render(
                plain,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                variables=variables,
            ),
        )

    async def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Text of ids; ``special`` shows those that stand for no text."""
        return await self._off_loop(lambda: self._tokenizer.decode(ids, skip_special=not special))

    def check_ids(self, ids: Sequence[int], name: str) -> None:
        """Raise APIError 400 for an id outside the vocabulary."""
        strange = next((i for i in ids if not 0 <= i < self.vocab_size), None)
        if strange is not None:
            raise bad_request(
                f"{name}: token id {strange} is outside this model's vocabulary of "
                f"{self.vocab_size}.",
                param=name,
            )

    def room(self, ids: Sequence[int], asked: int | None, name: str) -> int:
        """New tokens for this prompt: those asked for, or all that fit (None).

        Raises APIError 400, with both lengths, where they do not fit.
        """
        if not ids:
            raise bad_request("The prompt is empty; it must have at least one token.")
        left = self.max_model_len - len(ids)
        if left < 1:
            raise self._too_long(str(len(ids)))
        if asked is None:
            return left
        if asked > left:
            raise bad_request(
                f"This model's context is {self.max_model_len} tokens. The prompt has {len(ids)}, "
                f"and {name} asks for {asked} more: {len(ids) + asked} together. Shorten the "
                f"prompt or lower {name}.",
                param=name,
                code="context_length_exceeded",
            )
        return asked

    def _too_long(self, count: str) -> Exception:
        return bad_request(
            f"The prompt has {count} tokens; this model's context is {self.max_model_len}, new "
            "tokens included. Shorten the prompt.",
            param="prompt",
            code="context_length_exceeded",
        )

    def _encode(self, text: str, special: bool) -> list[int]:
        try:
            text.encode("utf-8")  # a lone surrogate is valid JSON, and no text
        except UnicodeEncodeError as error:
            raise RequestError(f"The text is not valid Unicode: {error.reason}.") from None
        return self._tokenizer.encode(text, special=special)

    async def _off_loop(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


def plain_message(message: Message) -> dict[str, Any]:
    """A message as templates expect it: content is a string. Text parts are joined by newlines."""
    plain = {"role": message.role, **(message.model_extra or {})}
    if isinstance(message.content, list):
        plain["content"] = "\n".join(_part_text(part) for part in message.content)
    elif message.content is not None:
        plain["content"] = message.content
    return plain


def _part_text(part: TextPart | str) -> str:
    if isinstance(part, str):
        return part
    if part.type not in _TEXT_PARTS:
        raise bad_request(
            f"Content of type {part.type[:40]!r} is not supported; this model reads text only.",
            param="messages",
        )
    return part.text or ""
