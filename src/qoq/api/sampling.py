"""A request's fields to the engine's SamplingParams, over the model's own defaults."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol

from qoq.api.rules import rules
from qoq.engine.choices import choices
from qoq.engine.defaults import GENERATION_CONFIG, read_generation_config
from qoq.engine.request import SamplingParams
from qoq.errors import RequestError, SourceError

MAX_LOGPROBS = 20
_INT64 = 1 << 63
_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_FIELDS = {field.name for field in fields(SamplingParams)}


class Fields(Protocol):
    """What every kind of request says about sampling; None: the default."""

    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    seed: int | None
    n: int | None


@dataclass(frozen=True)
class Ends:
    """When a text ends, beside its length."""

    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False


def sampling_params(
    body: Fields,
    ends: Ends,
    defaults: Mapping[str, float],
    *,
    max_tokens: int,
    vocab: int,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
) -> list[SamplingParams]:
    """One SamplingParams for each of the ``n`` texts of ``body``.

    logprobs and prompt_logprobs: how many of the likeliest tokens are told beside each.
    With a seed each text gets one of its own (see ``engine.choices``). Raises RequestError
    naming the field.
    """
    stop = ends.stop or ()
    ids = ends.stop_token_ids or []
    strange = next((i for i in ids if not 0 <= i < vocab), None)
    if strange is not None:
        raise RequestError(
            f"stop_token_ids: {strange} is outside the vocabulary of {vocab}.",
            param="stop_token_ids",
        )
    # OpenAI's default is 1.0; a model's generation_config.json may say otherwise.
    temperature = _first(body.temperature, defaults.get("temperature"), 1.0)
    seed = _seed(body.seed if body.seed is not None else defaults.get("seed"))
    more = rules(body, defaults)
    try:
        return choices(
            SamplingParams(
                n=body.n or 1,
                max_tokens=max_tokens,
                temperature=temperature,
                top_k=_top_k(_first(body.top_k, defaults.get("top_k"), 0), vocab),
                top_p=_first(body.top_p, defaults.get("top_p"), 1.0),
                min_p=_first(body.min_p, defaults.get("min_p"), 0.0),
                seed=seed,
                stop=stop,
                stop_token_ids=ids,
                ignore_eos=ends.ignore_eos,
                logprobs=logprobs,
                prompt_logprobs=prompt_logprobs,
                **more,
            )
        )
    except RequestError as error:
        name = str(error).split(" ", 1)[0]  # its messages begin with the field
        raise RequestError(str(error), param=name if name in _FIELDS else None) from error


def sampling_defaults(folder: Path, choice: str = "auto") -> dict[str, float]:
    """temperature, top_p, ... of a folder's generation_config.json, where it has them.

    choice: "auto" for the model's ``folder``, "vllm" for none, else another folder. Raises
    SourceError for a file that cannot be read.
    """
    if choice == "vllm":
        return {}
    file = (folder if choice == "auto" else Path(choice)) / GENERATION_CONFIG
    if not file.is_file():
        if choice == "auto":
            return {}
        raise SourceError(f"--generation-config: there is no {file}.")
    values = read_generation_config(file)
    found = {name: values[name] for name in _DEFAULTS if values.get(name) is not None}
    wrong = [n for n, v in found.items() if isinstance(v, bool) or not isinstance(v, int | float)]
    if wrong:
        raise SourceError(f"{file}: {wrong[0]} is not a number. Mend it or use another folder.")
    return found


def check_logprobs(count: int | None, name: str) -> None:
    """Raise RequestError for more than MAX_LOGPROBS tokens per place, or fewer than none."""
    if count is not None and not 0 <= count <= MAX_LOGPROBS:
        raise RequestError(f"{name} must be from 0 to {MAX_LOGPROBS}, not {count}.", param=name)


def _first(asked: float | None, default: float | None, neutral: float) -> float:
    return asked if asked is not None else default if default is not None else neutral


def _top_k(value: float, vocab: int) -> int:
    """-1 is how many clients say "off"; more than the vocabulary cuts nothing either."""
    return 0 if value == -1 else int(min(value, vocab))


def _seed(seed: float | None) -> int | None:
    """Any int64; the engine's seeds have no sign, so a negative one takes its bits."""
    if seed is None:
        return None
    if not -_INT64 <= seed < _INT64:
        raise RequestError(f"seed must be from -2**63 to 2**63 - 1, not {seed}.", param="seed")
    return int(seed) % _INT64
