"""lm-evaluation-harness on an OpenAI-compatible server: its tasks and metrics, our numbers.

Only lm_eval's own client talks with the server, so that results compare with those of other
engines: prompts as token ids to /v1/completions, log-likelihoods from ``echo`` with ``logprobs``.
"""

import contextlib
import difflib
import json
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qoq.client.answers import error_text
from qoq.client.api import CHAT, COMPLETIONS, Endpoint
from qoq.errors import HarnessError, ServerError

# lm_eval itself and what its extra `api` adds.
_PACKAGES = ("lm_eval", "aiohttp", "tenacity", "requests")
_INSTALL = "pip install 'lm_eval[api]>=0.4.13,<0.5'"
_REQUEST_SECONDS = 24 * 3600  # a slow machine is no failure
# Resamples behind a standard error that has no formula: lm_eval's 100,000 take minutes on one core.
_BOOTSTRAPS = 1000
_RESULTS = (
    *("results", "groups", "group_subtasks", "n-shot", "n-samples"),
    *("versions", "higher_is_better", "lm_eval_version"),
)


@dataclass(frozen=True)
class Asked:
    """Whom lm_eval asks, and how.

    model: its name there. chat: by /v1/chat/completions (generative tasks only), else by
    /v1/completions, where prompts are token ids of the ``tokenizer`` in a folder (None: the server
    is asked for them by /tokenize). max_length: prompt and new tokens at most. num_concurrent:
    requests in flight. add_bos: begin contexts with a BOS. chat_template: put prompts into the
    tokenizer's chat template.
    """

    endpoint: Endpoint
    model: str
    max_length: int
    tokenizer: Path | None = None
    num_concurrent: int = 64
    add_bos: bool = False
    chat: bool = False
    chat_template: bool = False

    def client_arguments(self) -> dict[str, Any]:
        """Arguments of lm_eval's client."""
        backend = None if self.chat else "huggingface" if self.tokenizer else "remote"
        return {
            "model": self.model,
            "base_url": self.endpoint.url(CHAT if self.chat else COMPLETIONS),
            "tokenizer_backend": backend,
            "tokenizer": None if self.tokenizer is None or self.chat else str(self.tokenizer),
            "tokenized_requests": not self.chat,
            "add_bos_token": self.add_bos,
            "max_length": self.max_length,
            "num_concurrent": self.num_concurrent,
            "timeout": _REQUEST_SECONDS,
            "header": self.endpoint.headers or None,
            "auth_token": self.endpoint.api_key,
        }


@dataclass(frozen=True)
class Protocol:
    """What lm_eval is told about the tasks: the same words as its own options'."""

    limit: float | None = None
    num_fewshot: int | None = None
    system_instruction: str | None = None
    gen_kwargs: str | None = None


def require() -> None:
    """Raise HarnessError where lm_eval is not installed."""
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise HarnessError(
            f"lm-evaluation-harness is not installed here ({missing[0]} is missing): {_INSTALL}"
        )


def load_tasks(
    names: Sequence[str], include: Path | None = None, *, quiet: bool = False
) -> list[Any]:
    """lm_eval's tasks, groups and tags by name, pattern or YAML file, their data read.

    ``include``: a folder with tasks of one's own. What lm_eval and its libraries print goes to
    stderr, or nowhere if ``quiet``. Raises HarnessError naming the task.
    """
    if include is not None and not include.is_dir():
        raise HarnessError(f"--include-path: there is no folder {include}.")
    with _to_stderr(quiet):
        return _load(names, include)


def _load(names: Sequence[str], include: Path | None) -> list[Any]:
    from lm_eval.tasks import TaskManager

    folder = None if include is None else str(include)
    manager = TaskManager(include_path=folder, include_defaults=False)
    if any(set("*?[") & set(name) or not _matches(manager, name) for name in names):
        manager = TaskManager(include_path=folder)  # reads thousands of files: not for nothing
    wanted: list[str] = []
    for name in names:
        found = _matches(manager, name)
        if not found:
            raise HarnessError(_unknown(name, manager.all_tasks))
        wanted += found
    loaded: dict[str, Any] = {}
    inner: set[str] = set()  # what a group brings along is not asked for once more
    for name in dict.fromkeys(wanted):
        try:
            parts = manager.load([name])
        except Exception as error:  # a task's own code and its data's libraries raise anything
            raise HarnessError(_unreadable(name, error)) from error
        loaded |= parts["tasks"] | parts["groups"]
        inner |= {child for children in parts["group_map"].values() for child in children}
    return [task for name, task in loaded.items() if name not in inner]


def check_chat(tasks: Sequence[Any]) -> None:
    """Raise HarnessError for tasks that need log-likelihoods, which conversations do not give."""
    for task in tasks:
        for leaf in task.get_all_tasks() if hasattr(task, "get_all_tasks") else [task]:
            if leaf.OUTPUT_TYPE != "generate_until":
                raise HarnessError(
                    f"The task {leaf.task_name} compares log-likelihoods, which "
                    "/v1/chat/completions does not give; use --backend openai, with "
                    "--apply-chat-template for the model's template."
                )


def evaluate(
    tasks: Sequence[Any], asked: Asked, protocol: Protocol, *, quiet: bool = False
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Results in lm_eval's own layout, and what was asked and answered, item by item.

    Progress goes to stderr, unless ``quiet``. Raises ServerError where the server fails,
    HarnessError where it is needed as a tokenizer and is none.
    """
    import aiohttp
    import requests
    from lm_eval.evaluator import simple_evaluate

    with _to_stderr(quiet), _one_process(), _failures() as failures:
        try:
            found = simple_evaluate(
                model=_client(asked),
                tasks=list(tasks),
                limit=protocol.limit,
                num_fewshot=protocol.num_fewshot,
                system_instruction=protocol.system_instruction,
                gen_kwargs=protocol.gen_kwargs,
                apply_chat_template=asked.chat or asked.chat_template,
                bootstrap_iters=_BOOTSTRAPS,
            )
        except (aiohttp.ClientError, requests.RequestException, TimeoutError) as error:
            cause = failures.said or str(error) or type(error).__name__
            raise ServerError(
                f"{asked.endpoint.base_url} failed a request of lm_eval: {cause}", "harness"
            ) from error
    found = _plain(found)
    items = [{"task": name, **item} for name, task in found.pop("samples").items() for item in task]
    return {name: found[name] for name in _RESULTS if name in found}, items


def _client(asked: Asked) -> Any:
    from qoq.evaluate.harness_client import make_client

    try:
        return make_client(asked.client_arguments(), chat=asked.chat)
    except RuntimeError as error:  # how lm_eval says that there is no /tokenizer_info
        raise HarnessError(
            f"{asked.endpoint.base_url} does not give its tokenizer by /tokenizer_info and "
            "/tokenize; name a folder that holds the model's with --tokenizer."
        ) from error


def table(results: dict[str, Any]) -> str:
    """Results as lm_eval prints them: a Markdown table of tasks, and one of groups."""
    from lm_eval.utils import make_table

    parts = [make_table(results)]
    if results.get("groups"):
        parts.append(make_table(results, "groups"))
    return "\n".join(part.strip() for part in parts)


def _matches(manager: Any, name: str) -> list[str]:
    """The tasks, groups and tags that a name, pattern or file stands for."""
    return [name] if Path(name).is_file() else list(manager.match_tasks([name]))


def _unknown(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    return f"lm_eval has no task {name!r}.{hint} `lm-eval ls tasks` lists them all."


def _unreadable(name: str, error: Exception) -> str:
    cause = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    if isinstance(error, ImportError):
        return f"The task {name} needs another package ({cause})."
    return (
        f"The data of the task {name} cannot be read ({cause}). lm_eval takes data sets from the "
        "Hugging Face hub: run this once where the hub can be reached, or set HF_HOME to a cache "
        "that holds them; --include-path adds tasks over files of your own."
    )


def _plain(value: Any) -> Any:
    """JSON's own types; lm_eval leaves numpy numbers and functions in its results."""
    from lm_eval.utils import handle_non_serializable

    return json.loads(json.dumps(value, default=handle_non_serializable))


@contextlib.contextmanager
def _to_stderr(quiet: bool) -> Iterator[None]:
    """What lm_eval prints is no answer of ours."""
    with contextlib.ExitStack() as stack:
        sink = stack.enter_context(open(os.devnull, "w")) if quiet else sys.stderr
        stack.enter_context(contextlib.redirect_stdout(sink))
        stack.enter_context(contextlib.redirect_stderr(sink))
        yield


class _Failures(logging.Filter):
    """Keeps the first thing a failing server said; lm_eval prints it with every retry."""

    said = ""

    def filter(self, record: logging.LogRecord) -> bool:
        """Only what is no failed request passes."""
        message = record.getMessage()
        answer = re.search(r"(?:Response text|error message): (.*)\. Retrying", message, re.DOTALL)
        if answer:
            self.said = self.said or error_text(answer[1])
        return not answer and record.levelno < logging.ERROR


@contextlib.contextmanager
def _failures() -> Iterator[_Failures]:
    heard = _Failures()
    logger = logging.getLogger("lm_eval.models.api_models")
    logger.addFilter(heard)
    try:
        yield heard
    finally:
        logger.removeFilter(heard)


@contextlib.contextmanager
def _one_process() -> Iterator[None]:
    """lm_eval would fork to bootstrap, in a process whose other threads serve a model."""
    name = "DISABLE_MULTIPROC"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
