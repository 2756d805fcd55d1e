"""What a soak sends: good requests to every route, and every kind of bad one."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from soak.wire import Answer, Leave, get, post

COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}
Body = dict[str, Any]


@dataclass(frozen=True)
class Ask:
    """A message, and ``check``: what is wrong with an answer to it (None: nothing)."""

    name: str
    message: bytes
    check: Callable[[Answer], str | None]
    texts: int = 0  # how many the engine is asked for
    leave: Leave | None = None


class Asks:
    """Draws requests for one model. ``context`` and ``vocab`` are its own."""

    def __init__(self, rng: random.Random, *, context: int, vocab: int, words: str) -> None:
        self._rng = rng
        self._context = context
        self._vocab = vocab
        self._words = words
        self._plain = (
            *("/v1/models", "/health", "/ping", "/version", "/metrics", "/docs", "/openapi.json"),
            *("/tokenizer_info", "/", "/static/app.js", "/static/style.css"),
        )

    def good(self) -> Ask:
        """A request that must be answered."""
        rng = self._rng
        draw = rng.random()
        if draw < 0.08:
            path = rng.choice(self._plain)
            return Ask(path, get(path), _is_ok)
        if draw < 0.14:
            return self._tokenizing()
        path = rng.choices((COMPLETIONS, CHAT, RESPONSES), (5, 4, 1))[0]
        return self.ask(path, self._body(path))

    def leaving(self) -> Ask:
        """A request for texts whose client hangs up, in any phase."""
        rng = self._rng
        path = rng.choices((COMPLETIONS, CHAT, RESPONSES), (5, 4, 1))[0]
        ask = self.ask(path, {**self._body(path), "stream": rng.random() < 0.8})
        phase = rng.choice(("in our own words", "unread", "before an answer", "within", "within"))
        leave = {
            "in our own words": Leave(sent=rng.random(), seconds=rng.random() / 5),
            "unread": Leave(),
            "before an answer": Leave(nbytes=1, seconds=rng.random() / 10),
            "within": Leave(nbytes=rng.randint(200, 8000), seconds=60),
        }[phase]
        leave = Leave(leave.sent, leave.nbytes, leave.seconds, rng.random() < 0.5)
        return Ask(f"hung up {phase}", ask.message, ask.check, ask.texts, leave)

    def bad(self) -> Ask:
        """A request that must be refused."""
        rng = self._rng
        name = rng.choice(sorted(self._bad))
        message = self._bad[name]()
        return Ask(f"bad: {name}", message, _is_refused)

    def reference(self) -> tuple[str, Body]:
        """A request whose texts hang on nothing but itself."""
        rng = self._rng
        body = self._body(path := rng.choice((COMPLETIONS, CHAT)))
        for name in ("logprobs", "top_logprobs", "stream_options"):
            body.pop(name, None)
        return path, {**body, "seed": rng.randrange(2**40), "stream": False}

    def ask(self, path: str, body: Body, wanted: list[str] | None = None) -> Ask:
        """A request for texts; ``wanted``: what they must be."""
        if not body.get("stream"):
            body = {name: value for name, value in body.items() if name != "stream_options"}
        prompts = body.get("prompt")
        count = len(prompts) if isinstance(prompts, list) and not _is_ids(prompts) else 1
        texts = count * body.get("n", 1)
        stream = bool(body.get("stream"))
        name = f"{path}{' stream' if stream else ''}"

        def check(answer: Answer) -> str | None:
            if answer.status != 200:
                return f"status {answer.status}: {answer.body[:300]!r} to {json.dumps(body)[:300]}"
            if path == RESPONSES:
                return _check_response(answer, stream)
            got = _streamed(answer) if stream else _whole(answer)
            if isinstance(got, str):
                return got
            if len(got) != texts:
                return f"{len(got)} texts instead of {texts}"
            if wanted is not None and got != wanted:
                return f"{got} instead of {wanted}"
            return None

        return Ask(name, post(path, json.dumps(body).encode()), check, texts)

    def _tokenizing(self) -> Ask:
        text = self._text()

        def check(answer: Answer) -> str | None:
            return None if answer.status == 200 and answer.json()["count"] > 0 else "no tokens"

        return Ask("/tokenize", post("/tokenize", json.dumps({"prompt": text}).encode()), check)

    def _body(self, path: str) -> Body:
        rng = self._rng
        # Some texts outgrow several pages, so that pools that are too small throw them out.
        new = rng.randint(1, max(2, min(48 if rng.random() < 0.9 else 200, self._context // 3)))
        body: Body = {"temperature": rng.choice((0, 0.7, 1.0, 1.5)), "top_p": rng.choice((1, 0.9))}
        body["stream"] = rng.random() < 0.6
        if path == RESPONSES:
            return {**body, "input": self._text(), "max_output_tokens": new}
        body |= rng.choice(
            (
                {},
                {},
                {"n": rng.randint(2, 4)},
                {"seed": rng.randrange(2**63), "top_k": rng.randint(-1, 50)},
                {"stop": ["e", "the "], "min_tokens": 1},
                {"presence_penalty": 1.0, "frequency_penalty": -0.5, "repetition_penalty": 1.2},
                {"logit_bias": {str(rng.randrange(self._vocab)): 5}, "min_p": 0.1},
                {"ignore_eos": True, "stream_options": {"include_usage": True}, "stream": True},
                {"guided_regex": f"[a-z]{{1,{rng.randint(2, 40)}}}"},
                {"guided_choice": ["yes", "no", "maybe"]},
                {"response_format": {"type": "json_object"}},
                {"structured_outputs": {"json": PERSON}},
                {"allowed_token_ids": [rng.randrange(3, self._vocab) for _ in range(20)]},
            )
        )
        if path == CHAT:
            count = rng.randint(1, 3)
            talk = [{"role": "user", "content": self._text(3 * count)} for _ in range(count)]
            more: Body = rng.choice(({}, {}, {"logprobs": True, "top_logprobs": 3}))
            return {**body, **more, "messages": talk, "max_tokens": new}
        prompt: Any = self._text()
        draw = rng.random()
        if draw < 0.2:  # a long one
            prompt = self._ids(rng.randint(self._context // 3, self._context - new - 1))
        elif draw < 0.4:
            prompt = self._ids(rng.randint(1, self._context // 8))
        elif draw < 0.5:
            prompt = [self._text() for _ in range(rng.randint(1, 3))]
        more = rng.choice(({}, {}, {"logprobs": 2}, {"logprobs": 1, "echo": True}, {"echo": True}))
        return {**body, **more, "prompt": prompt, "max_tokens": new}

    def _text(self, parts: int = 3) -> str:
        length = self._rng.randint(1, max(2, min(400, self._context // (4 * parts))))
        # Some begin alike, so that there are prefixes to be found.
        at = self._rng.choice((0, 1000, self._rng.randrange(len(self._words) - length)))
        return self._words[at : at + length] or "a"

    def _ids(self, count: int) -> list[int]:
        return [self._rng.randrange(3, self._vocab) for _ in range(count)]

    @property
    def _bad(self) -> dict[str, Callable[[], bytes]]:
        rng = self._rng
        path = rng.choice((COMPLETIONS, CHAT, RESPONSES))
        good: Body = {**self._body(path), "stream": rng.random() < 0.5}
        for name in ("stream_options", "min_tokens"):
            good.pop(name, None)

        def body(raw: bytes) -> Callable[[], bytes]:
            return lambda: post(path, raw)

        def fields(where: str = path, **wrong: Any) -> Callable[[], bytes]:
            return lambda: post(where, json.dumps({**good, **wrong}).encode())

        whole = json.dumps(good).encode()
        return {
            "empty": body(b""),
            "half": body(whole[: len(whole) // 2]),
            "bytes": body(rng.randbytes(200)),
            "a list": body(b"[" + whole + b"]"),
            "invalid UTF-8": body(
                b'{"prompt": "\xff\xc3\x28", "messages": "\xff", "input": "\xff"}'
            ),
            "a lone surrogate": body(
                b'{"prompt": "\\ud800", "input": "\\ud800", '
                b'"messages": [{"role": "user", "content": "\\ud800"}]}'
            ),
            "deep": body(b"[" * rng.randint(2000, 90_000)),
            "deep inside": body(b'{"prompt": ' + b"[" * 3000 + b"]" * 3000 + b"}"),
            "a huge number": body(b'{"seed": ' + b"9" * 5000 + b"}"),
            "seed": fields(seed=rng.choice((2**63, -(2**63) - 1, 2**70, 1.5, "x"))),
            "temperature": fields(temperature=rng.choice((float("nan"), float("inf"), -1, "hot"))),
            "top_p": fields(top_p=rng.choice((0, 1.1, float("nan"), []))),
            "n": fields(n=rng.choice((0, -1, 129, 10**30, 1.5))),
            "max_tokens": fields(
                max_tokens=rng.choice((-1, 10**9, 2**70, "many")),
                max_output_tokens=rng.choice((0, -1, 10**9)),
            ),
            "ids": fields(COMPLETIONS, prompt=rng.choice(([-1], [10**9], [2**70], [True], [1.5]))),
            "stop ids": fields(
                rng.choice((COMPLETIONS, CHAT)), stop_token_ids=rng.choice(([-1], [10**9], [True]))
            ),
            "bias": fields(COMPLETIONS, logit_bias=rng.choice(({"x": 1}, {"-1": 1}, {"5": 1e3}))),
            "logprobs": fields(COMPLETIONS, logprobs=rng.choice((21, -1, 10**20))),
            "regex": fields(COMPLETIONS, guided_regex=rng.choice(("(", "(?=a)b", "[^\\s\\S]"))),
            "schema": fields(CHAT, response_format={"type": "json_schema", "json_schema": {}}),
            "a large schema": fields(COMPLETIONS, guided_json={"enum": ["x" * 100] * 4000}),
            "too long": fields(COMPLETIONS, prompt=self._ids(self._context)),
            "too long a text": fields(COMPLETIONS, prompt="word " * 100_000),
            "no messages": fields(CHAT, messages=[]),
            "a model": fields(model="nobody"),
            "a kind": lambda: post(path, whole, "text/plain"),
            "a path": lambda: post("/v1/nothing", whole),
            "a method": lambda: get(path, rng.choice(("GET", "DELETE", "PUT", "BREW"))),
            "detokenize": lambda: post("/detokenize", b'{"tokens": [-5]}'),
            "not HTTP": lambda: rng.randbytes(300) + b"\r\n\r\n",
            "a head without end": lambda: b"GET / HTTP/1.1\r\n" + b"x: " + b"y" * 200_000,
            "two lengths": lambda: post(path, whole, Content_length="1"),
            "a bad length": lambda: post(path, whole, Content_Length="-5"),
        }


def _is_ids(prompt: list[Any]) -> bool:
    return bool(prompt) and isinstance(prompt[0], int)


def _is_ok(answer: Answer) -> str | None:
    return None if answer.status == 200 else f"status {answer.status}"


def _is_refused(answer: Answer) -> str | None:
    if not 400 <= answer.status < 500:
        return f"status {answer.status}: {answer.body[:300]!r}"
    if "json" not in answer.headers.get("content-type", ""):
        return None  # the HTTP library's own refusal of what is no HTTP
    error = answer.json().get("error", {})
    return None if set(error) == {"message", "type", "param", "code"} else "no error object"


def _whole(answer: Answer) -> list[str] | str:
    choices = answer.json()["choices"]
    if any(choice["finish_reason"] not in ("stop", "length") for choice in choices):
        return "a text without an end"
    return [_text_of(choice, "message") for choice in choices]


def _streamed(answer: Answer) -> list[str] | str:
    events = _events(answer)
    if not events or events[-1] != "[DONE]":
        return "a stream without an end"
    texts: dict[int, str] = {}
    ends: dict[int, str] = {}
    for data in events[:-1]:
        event = json.loads(data)
        if "error" in event:
            return f"an error in a stream: {event['error']}"
        for choice in event["choices"]:
            at = choice["index"]
            if at in ends:
                return "a text goes on after its end"
            texts[at] = texts.get(at, "") + _text_of(choice, "delta")
            if choice["finish_reason"]:
                ends[at] = choice["finish_reason"]
    if set(ends) != set(texts) or not set(ends.values()) <= {"stop", "length"}:
        return "a text without an end"
    return [texts[at] for at in sorted(texts)]


def _text_of(choice: dict[str, Any], key: str) -> str:
    return str(choice["text"] if "text" in choice else choice[key].get("content") or "")


def _check_response(answer: Answer, stream: bool) -> str | None:
    if not stream:
        done = answer.json()["status"]
        return None if done in ("completed", "incomplete") else f"status {done}"
    last = json.loads(_events(answer)[-1])
    return (
        None if last.get("type", "").endswith(("completed", "incomplete")) else f"ends with {last}"
    )


def _events(answer: Answer) -> list[str]:
    return [x[6:] for x in answer.body.decode().split("\n") if x.startswith("data: ")]
