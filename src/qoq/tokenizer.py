"""Text to ids and back: a thin layer over transformers' tokenizers, and text as it grows.

A tokenizer is loaded from a model's folder and never asks the network. ``Detokenizer`` turns ids
into text one by one without splitting a code point; ``StopMatcher`` ends that text before a stop
string.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from qoq.errors import RequestError, SourceError

# A code point has at most four bytes, so at most three of them can wait for their end. Decoders
# show each run of waiting bytes as one or as up to three of these.
_UNFINISHED = "\ufffd"
_MAX_UNFINISHED = 3
# Ids of the prompt that come before the first new one when it is decoded: enough for a decoder to
# know that it is inside a text (and keep the space before a word) and inside a code point.
_CONTEXT_IDS = 6


class Tokenizer:
    """A model's own tokenizer, chat template and end-of-sequence ids.

    hf is a transformers tokenizer; eos_ids end a generation (empty: none is known).
    """

    def __init__(self, hf: Any, eos_ids: Sequence[int] = ()) -> None:
        self.hf = hf
        self.eos_ids = tuple(eos_ids)
        self._single: dict[int, str] = {}  # text of single ids, asked for once per token generated
        self._fast = _rust_decoder(hf)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read the tokenizer files in the folder ``path``. Runs no code that the folder brings.

        End-of-sequence ids are those of generation_config.json, else of config.json, else the
        tokenizer's own. Raises SourceError where there is no tokenizer that can be read.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise SourceError(f"There is no folder {folder} to read a tokenizer from.")
        from transformers import AutoTokenizer  # slow to import, so only when one is needed

        try:
            hf = AutoTokenizer.from_pretrained(
                str(folder.resolve()), local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # each tokenizer class fails in its own way on bad files
            cause = str(error).strip().splitlines() or [type(error).__name__]
            raise SourceError(
                f"The tokenizer in {folder} cannot be read ({cause[0]}). The folder needs "
                "tokenizer.json (or tokenizer.model) and tokenizer_config.json of the model."
            ) from error
        eos = _eos_ids(folder / "generation_config.json") or _eos_ids(folder / "config.json")
        if not eos and hf.eos_token_id is not None:
            eos = (int(hf.eos_token_id),)
        return cls(hf, eos)

    def __len__(self) -> int:
        """The number of ids that stand for something, special ones included."""
        return len(self.hf)

    @cached_property
    def special_ids(self) -> dict[int, str]:
        """The special tokens, which a text leaves out, and how each is written."""
        added = self.hf.added_tokens_decoder.items()
        return {int(i): str(token.content) for i, token in added if token.special}

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Ids of ``text``; ``special`` adds what the model wants around a text (often a BOS)."""
        ids = self.hf(text, add_special_tokens=special, verbose=False)["input_ids"]
        return [int(i) for i in ids]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of ``ids``; bytes that are no UTF-8 become U+FFFD, unknown ids nothing."""
        if not ids:
            return ""
        if len(ids) == 1 and skip_special:
            text = self._single.get(ids[0])
            if text is None:
                text = self._single[ids[0]] = self._decode(ids, True)
            return text
        return self._decode(ids, skip_special)

    def _decode(self, ids: Sequence[int], skip_special: bool) -> str:
        if self._fast is not None:
            return str(self._fast.decode(list(ids), skip_special_tokens=skip_special))
        return str(
            self.hf.decode(
                list(ids), skip_special_tokens=skip_special, clean_up_tokenization_spaces=False
            )
        )

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Ids of a conversation ({"role", "content"} each) in the model's chat template.

        ``tools``: what the model may call, as in OpenAI's requests; templates that know of none
        leave them out. Raises RequestError where the model has no template or the template refuses
        the messages.
        """
        text = self.chat_template(tools=bool(tools)).render(
            messages, add_generation_prompt=add_generation_prompt, tools=tools or None
        )
        return self.encode(text, special=False)  # the template has put the special tokens in

    def chat_template(self, source: str | None = None, *, tools: bool = False) -> "ChatTemplate":
        """The model's chat template, or ``source`` in its place; RequestError where there is none.

        A model with several templates, by name, gives its default one, or with ``tools`` the one
        for conversations with tools.
        """
        try:
            source = source or self.hf.get_chat_template(tools=[] if tools else None)
        except ValueError:  # how transformers says that there is none
            source = None
        if source is None:
            raise RequestError(
                "This model has no chat template; give it plain text instead of messages."
            )
        specials = {name: str(token) for name, token in self.hf.special_tokens_map.items()}
        return ChatTemplate(source, specials)


@dataclass(frozen=True)
class ChatTemplate:
    """A model's chat template, rendered in transformers' sandbox.

    specials: what the template may call ``bos_token``, ``eos_token``, ...
    """

    source: str
    specials: dict[str, str]

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as text, special tokens included; ``variables`` are the template's own.

        Raises RequestError where the template refuses the messages, or is none.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        if not messages:
            raise RequestError("The conversation is empty; it needs at least one message.")
        # Templates test for a key's presence and would print "None" for what is there but empty.
        kept = [{k: v for k, v in m.items() if v is not None} for m in messages]
        taken = {"messages", "conversations", "chat_template", "documents"} & set(variables or ())
        if taken:
            raise RequestError(f"A chat template's variable cannot be called {min(taken)}.")
        try:
            [text], _ = render_jinja_template(
                [kept],
                tools=None if tools is None else [dict(tool) for tool in tools],
                chat_template=self.source,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **{**self.specials, **(variables or {})},
            )
        except Exception as error:  # templates are programs: they raise whatever they like
            raise RequestError(f"The chat template refuses these messages: {error}") from error
        return str(text)

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """The reverse of ``to_json``."""
        return cls(str(value["source"]), dict(value["specials"]))


def _eos_ids(file: Path) -> tuple[int, ...]:
    """``eos_token_id`` of a JSON file, one or several; () where file or entry is missing."""
    if not file.is_file():
        return ()
    try:
        value = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    except (OSError, ValueError, AttributeError) as error:
        raise SourceError(f"{file} is not a readable JSON object: {error}") from error
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(v) is int and v >= 0 for v in values):
        raise SourceError(f"{file}: eos_token_id {value!r} is neither an id nor a list of ids.")
    return tuple(dict.fromkeys(values))


def _rust_decoder(hf: Any) -> Any:
    """What transformers' own ``decode`` ends up calling, or None where a class has its own way.

    Called directly, it takes half the time, which counts: it runs for every token generated.
    """
    from transformers import PreTrainedTokenizerFast

    kind = type(hf)
    plain = (
        isinstance(hf, PreTrainedTokenizerFast)
        and kind.decode is PreTrainedTokenizerFast.decode
        and kind._decode is PreTrainedTokenizerFast._decode
    )
    return hf.backend_tokenizer if plain else None


class Detokenizer:
    """Ids in, text out as soon as it is certain; the pieces joined are the text of all the ids.

    Each step decodes only the last few ids, together with those before them, because a decoder may
    treat the first id of a text differently. Text that ends in U+FFFD may be a code point of which
    bytes are still to come, so those characters wait.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int] = (),
        *,
        skip_special: bool = True,
        shown: Collection[int] = (),
    ) -> None:
        """``prompt_ids``: what the text continues; none of it is returned.

        ``skip_special`` leaves special tokens out of the text, all but those that are ``shown``.
        """
        self._tokenizer = tokenizer
        # A decoder leaves out all special tokens or none, so a choice of them is made before it.
        choose = skip_special and bool(shown)
        self._hidden = frozenset(tokenizer.special_ids) - set(shown) if choose else frozenset()
        self._skip_special = skip_special and not choose
        self._ids = [i for i in prompt_ids[-_CONTEXT_IDS:] if i not in self._hidden]
        self._context = len(self._ids)  # so many of the ids are complete text already
        self._shown = _finished(self._decode(self._ids))  # text of the ids already returned

    def push(self, token_id: int) -> str:
        """The text that ``token_id`` makes certain, often one word, sometimes ""."""
        if token_id in self._hidden:
            return ""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        ready = _finished(text)
        if ready.startswith(self._shown):
            piece = ready[len(self._shown) :]
        elif ready == text:
            # Bytes in a row with those before them that, in the end, made no code point: a decoder
            # may then spoil the whole row. What was returned stays, so decode only what is new.
            piece = self._decode(self._ids[self._context :])
        else:
            return ""
        if piece and ready == text:
            self._ids = self._ids[self._context :]
            self._context = len(self._ids)
            self._shown = self._decode(self._ids)
        else:
            self._shown += piece
        return piece

    def flush(self) -> str:
        """What is left when no id follows: an unfinished code point as U+FFFD."""
        text = self._decode(self._ids)
        rest = text[len(self._shown) :] if text.startswith(self._shown) else ""
        self._shown = text
        return rest

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special=self._skip_special)


def _finished(text: str) -> str:
    """``text`` without trailing characters that may be bytes of an unfinished code point."""
    end = len(text)
    while end and len(text) - end < _MAX_UNFINISHED and text[end - 1] == _UNFINISHED:
        end -= 1
    return text[:end]


class StopMatcher:
    """Passes text on until a stop string appears; what may yet become one waits.

    Example: stop ["\\n\\n"]; push("a\\n") -> "a", push("b") -> "\\nb", push("\\n\\nc") -> "" and
    ``found`` is the stop string. With ``include`` the text ends behind it instead of before it.
    """

    def __init__(self, stop: Sequence[str], *, include: bool = False) -> None:
        self._stop = tuple(stop)
        self._include = include
        self._held = ""
        self.found: str | None = None

    @property
    def matched(self) -> bool:
        """Whether a stop string has appeared."""
        return self.found is not None

    def push(self, piece: str) -> str:
        """The text now certain to come before any stop string (with ``include``, up to its end)."""
        if self.matched:
            return ""
        text = self._held + piece
        places = [(at, s) for at, s in ((text.find(s), s) for s in self._stop) if at >= 0]
        if places:
            at, self.found = min(places, key=lambda place: place[0])
            self._held = ""
            return text[: at + len(self.found)] if self._include else text[:at]
        hold = max((_overlap(text, s) for s in self._stop), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]

    def flush(self) -> str:
        """What waited, when no text follows."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that a longer ``stop`` begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
