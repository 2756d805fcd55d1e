"""Prompts: text and conversations to ids that fit the model, off the event loop.

Tokenizing a long text takes a while and lets go of the interpreter, so it happens in threads of its
own. A few are enough, and they only read the tokenizer: what changes it on first use is done here
before they start.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from qoq.api.cut import Cut
from qoq.api.messages import plain_messages, shown_tools
from qoq.api.protocol import Message, SamplingFields
from qoq.api.room import room, too_long
from qoq.errors import RequestError
from qoq.server.errors import bad_request
from qoq.server.templates import TemplateProcess
from qoq.tokenizer import ChatTemplate, Tokenizer

_THREADS = 2
T = TypeVar("T")


class Prompts:
    """Makes the ids of prompts and knows which of them fit."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        tool_template: ChatTemplate | None,
        *,
        max_model_len: int,
        vocab_size: int,
        template_timeout: float,
        trust_templates: bool = False,
    ) -> None:
        """tool_template: for conversations with tools. trust_templates: requests may bring one."""
        self._tokenizer = tokenizer
        self._template = template
        self._tool_template = tool_template
        self._trust_templates = trust_templates
        self.max_model_len = max_model_len
        self.vocab_size = vocab_size
        self._templates = TemplateProcess(time_limit=template_timeout)
        tokenizer.encode("a")
        # No token stands for more characters, so a text this many times longer cannot fit.
        self._longest = max((len(token) for token in tokenizer.hf.get_vocab()), default=1)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="qoq-tokenizer")
        # Renderings wait for each other, and for one that is being cut off; tokenizing must not.
        self._renderer = ThreadPoolExecutor(1, thread_name_prefix="qoq-template")

    def start(self) -> None:
        """Have the process that renders chat templates ready, if the model has one."""
        if self._template is not None:
            self._templates.start()

    def close(self) -> None:
        """End threads and process."""
        for threads in (self._threads, self._renderer):
            threads.shutdown(wait=False, cancel_futures=True)
        self._templates.close()

    async def encode(self, text: str, *, special: bool = True, cut: Cut | None = None) -> list[int]:
        """Ids of a text, no more than ``cut`` leaves of them.

        Raises RequestError for one that cannot fit, before any work.
        """
        if cut is not None:
            text = cut.text(text, self._longest)
        least = -(-len(text) // self._longest)
        if cut is None and least > self.max_model_len:
            raise too_long(f"at least {least}", self.max_model_len)
        ids = await self._off_loop(lambda: self._encode(text, special))
        return ids if cut is None else cut.ids(ids, self._tokenizer.hf.bos_token_id)

    async def encode_any(
        self, prompt: str | Sequence[int], *, special: bool, cut: Cut | None = None
    ) -> list[int]:
        """Ids of a text, or the ids given once they are found to be of this vocabulary."""
        if isinstance(prompt, str):
            return await self.encode(prompt, special=special, cut=cut)
        if cut is None and len(prompt) >= self.max_model_len:  # before a million are looked at
            raise too_long(str(len(prompt)), self.max_model_len)
        self.check_ids(prompt, "prompt")
        ids = list(prompt)
        return ids if cut is None else cut.ids(ids, self._tokenizer.hf.bos_token_id)

    async def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """A conversation as the model's chat template writes it; APIError 400 where it cannot.

        tools: what the model may call, as in chat completions; template: one that the request
        brings, in place of the model's.
        """
        chosen = self._chosen(template, with_tools=bool(tools))
        plain = plain_messages(messages)
        return await asyncio.get_running_loop().run_in_executor(
            self._renderer,
            lambda: self._templates.render(
                chosen,
                plain,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=shown_tools(tools),
                variables=variables,
            ),
        )

    def _chosen(self, source: str | None, *, with_tools: bool) -> ChatTemplate:
        """The template for a conversation. Raises APIError 400 where there is none."""
        if source is not None and not self._trust_templates:
            raise bad_request(
                "chat_template: this server takes no templates from requests; it would with "
                "--trust-request-chat-template.",
                param="chat_template",
            )
        if source is not None:
            return self._tokenizer.chat_template(source)
        chosen = self._tool_template if with_tools else self._template
        if chosen is None:
            raise bad_request(
                "This model has no chat template; use /v1/completions, or serve it with "
                "--chat-template.",
                param="messages",
            )
        return chosen

    async def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Text of ids; ``special`` shows those that stand for no text."""
        return await self._off_loop(lambda: self._tokenizer.decode(ids, skip_special=not special))

    def cut(self, body: SamplingFields, max_tokens: int | None) -> Cut | None:
        """How ``body`` wants its prompts shortened; APIError 400 where that cannot be."""
        return Cut.asked(body, max_model_len=self.max_model_len, max_tokens=max_tokens)

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
        """``room`` for a prompt of this model; its RequestError is a 400."""
        return room(len(ids), asked, context=self.max_model_len, name=name)

    def _encode(self, text: str, special: bool) -> list[int]:
        try:
            text.encode("utf-8")  # a lone surrogate is valid JSON, and no text
        except UnicodeEncodeError as error:
            raise RequestError(f"The text is not valid Unicode: {error.reason}.") from None
        return self._tokenizer.encode(text, special=special)

    async def _off_loop(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)
