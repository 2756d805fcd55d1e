"""``qoq eval lm``: lm-evaluation-harness on a model that is served here, or on a running server."""

import contextlib
import json as jsonlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qoq.cli.bench import origin
from qoq.cli.options import API_KEY, DEVICE, JSON, MAYBE_MODEL, SERVER, THREADS, use_threads
from qoq.cli.serve_command import count
from qoq.cli.terminal import as_json, duration, emit, note, verb

if TYPE_CHECKING:
    from qoq.evaluate.harness import Asked

_TASKS, _SERVER, _RESULTS = "Tasks", "Model and server", "Results"
DEFAULT_LENGTH = 2048  # of a server that does not say


@verb()
def lm(
    model: MAYBE_MODEL = None,
    tasks: Annotated[
        str,
        typer.Option(
            help="Names with commas: tasks, groups, patterns such as mmlu_*, YAML files. "
            "`lm-eval ls tasks` lists them.",
            rich_help_panel=_TASKS,
            show_default=False,
        ),
    ] = "",
    limit: Annotated[
        float | None,
        typer.Option(
            help="The first N items of each task, or below 1 a share of them.",
            rich_help_panel=_TASKS,
        ),
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(help="Examples in each prompt. Default: the task's.", rich_help_panel=_TASKS),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="Folder with YAML tasks of yours.", rich_help_panel=_TASKS)
    ] = None,
    apply_chat_template: Annotated[
        bool,
        typer.Option(
            "--apply-chat-template",
            help="Put prompts into the model's chat template.",
            rich_help_panel=_TASKS,
        ),
    ] = False,
    system_instruction: Annotated[
        str | None, typer.Option(help="System message of every prompt.", rich_help_panel=_TASKS)
    ] = None,
    gen_kwargs: Annotated[
        str | None,
        typer.Option(
            help="Sampling of tasks that generate: temperature=0.6,...", rich_help_panel=_TASKS
        ),
    ] = None,
    add_bos_token: Annotated[
        bool | None,
        typer.Option(
            help="Begin contexts with a BOS. Default: as the tokenizer does by itself; chat "
            "templates bring their own.",
            rich_help_panel=_TASKS,
            show_default=False,
        ),
    ] = None,
    base_url: SERVER = None,
    api_key: API_KEY = None,
    backend: Annotated[
        str,
        typer.Option(
            help="openai (/v1/completions), or openai-chat (/v1/chat/completions; only tasks that "
            "generate).",
            rich_help_panel=_SERVER,
        ),
    ] = "openai",
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="With --base-url: a folder with the model's tokenizer. Default: the server's own "
            "/tokenize, which is slower and adds no BOS.",
            rich_help_panel=_SERVER,
        ),
    ] = None,
    max_model_len: Annotated[
        int | None,
        typer.Option(
            parser=count,
            metavar="TOKENS",
            help="Prompt and new tokens at most; longer contexts lose their beginning. Default: "
            "what the model or server allows.",
            rich_help_panel=_SERVER,
        ),
    ] = None,
    num_concurrent: Annotated[
        int, typer.Option(help="Requests in flight.", rich_help_panel=_SERVER)
    ] = 64,
    device: DEVICE = "auto",
    threads: THREADS = None,
    save: Annotated[
        Path | None,
        typer.Option(help="Write what --json prints to this file.", rich_help_panel=_RESULTS),
    ] = None,
    log_samples: Annotated[
        Path | None,
        typer.Option(
            help="Write every item with its answers to this JSONL file.", rich_help_panel=_RESULTS
        ),
    ] = None,
    json: JSON = False,
) -> None:
    """Benchmark tasks of lm-evaluation-harness: hellaswag, arc, mmlu, gsm8k, wikitext, ...

    Serves MODEL on a free port of this machine while it runs, or asks the server at --base-url.
    Needs lm_eval (pip install 'lm_eval[api]') and the tasks' data, which it takes from the Hugging
    Face hub or its cache; tasks over files of your own need no network.

    Examples:

        qoq eval lm OUT --tasks hellaswag,arc_easy --limit 200

        qoq eval lm --base-url http://127.0.0.1:8000 --tasks gsm8k --num-fewshot 5

    --json prints: model, scheme, base_url, backend, settings, seconds, lm_eval's results, groups,
    n-shot, n-samples, versions and higher_is_better as lm_eval writes them; command, commit,
    hardware.
    """
    from qoq.errors import HarnessError, RequestError
    from qoq.evaluate.harness import Protocol, check_chat, evaluate, load_tasks, require, table

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise RequestError("Name a task or several: --tasks hellaswag,arc_easy.")
    if backend not in ("openai", "openai-chat"):
        raise RequestError(f"--backend must be openai or openai-chat, not {backend!r}.")
    if num_concurrent < 1 or (limit is not None and not limit > 0):
        raise RequestError("--num-concurrent must be 1 or more, --limit above 0.")
    if model is None and base_url is None:
        raise RequestError("Name a MODEL, or a running server with --base-url.")
    require()
    # Requests that lm_eval leaves behind when one has failed are no news, a page of traceback each.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    use_threads(threads)
    chat = backend == "openai-chat"
    loaded = load_tasks(names, include_path, quiet=json)
    if chat:
        check_chat(loaded)
    limit = int(limit) if limit is not None and limit >= 1 else limit
    protocol = Protocol(limit, num_fewshot, system_instruction, gen_kwargs)
    start = time.monotonic()
    with contextlib.ExitStack() as stack:
        if base_url is None:
            asked, scheme = stack.enter_context(
                _served(str(model), max_model_len, num_concurrent, device)
            )
        else:
            asked, scheme = _running(base_url, api_key, model, max_model_len, num_concurrent)
        asked = _prepared(asked, tokenizer, chat, apply_chat_template, add_bos_token)
        if not json:
            note(f"{asked.model} at {asked.endpoint.base_url}, {asked.max_length} tokens at most")
        results, items = evaluate(loaded, asked, protocol, quiet=json)
    if not items:
        raise HarnessError("The tasks have no items.")
    seconds = time.monotonic() - start
    facts: dict[str, Any] = {
        "model": asked.model,
        "scheme": scheme,
        "base_url": base_url,
        "backend": backend,
        "settings": {
            **vars(protocol),
            "max_model_len": asked.max_length,
            "add_bos_token": asked.add_bos,
            "apply_chat_template": asked.chat or asked.chat_template,
        },
        "seconds": round(seconds, 3),
        **results,
        **origin(),
    }
    if save is not None:
        save.write_text(as_json(facts) + "\n", encoding="utf-8")
    if log_samples is not None:
        lines = (jsonlib.dumps(item, ensure_ascii=False) + "\n" for item in items)
        log_samples.write_text("".join(lines), encoding="utf-8")
    if json:
        emit(facts)
        return
    print(table(results))
    note(f"{len(items)} items in {duration(seconds)}")


@contextlib.contextmanager
def _served(
    model: str, length: int | None, at_once: int, device: str
) -> Iterator[tuple["Asked", str | None]]:
    """MODEL behind a server of this process."""
    from qoq.client.api import Endpoint
    from qoq.evaluate.harness import Asked
    from qoq.server.background import background
    from qoq.server.model import EngineOptions, load_served_model
    from qoq.server.settings import ServerSettings

    options = EngineOptions(
        max_model_len=length, max_num_seqs=at_once, generation_config="vllm", device=device
    )
    served = load_served_model(model, options)
    with background(served, ServerSettings((model,), max_queued=at_once)) as server:
        asked = Asked(
            Endpoint(server.url), model, served.max_model_len, served.path, num_concurrent=at_once
        )
        yield asked, str(served.scheme)


def _running(
    base_url: str, api_key: str | None, model: str | None, length: int | None, at_once: int
) -> tuple["Asked", str | None]:
    """A server that runs already, and what it says of its model."""
    from qoq.client.api import Endpoint, first_model, model_cards
    from qoq.evaluate.harness import Asked

    endpoint = Endpoint(base_url, api_key)
    name = model or first_model(endpoint)
    card = next((card for card in model_cards(endpoint) if card["id"] == name), {})
    allowed = card.get("max_model_len") or DEFAULT_LENGTH
    return Asked(endpoint, name, length or allowed, num_concurrent=at_once), card.get("scheme")


def _prepared(
    asked: "Asked",
    tokenizer: Path | None,
    chat: bool,
    chat_template: bool,
    add_bos: bool | None,
) -> "Asked":
    """``asked`` with what its tokenizer does by itself, or is told to do."""
    from dataclasses import replace

    from qoq.errors import RequestError
    from qoq.tokenizer import Tokenizer

    folder = tokenizer or asked.tokenizer
    if chat:
        return replace(asked, tokenizer=None, chat=True)
    if folder is None:
        if add_bos or chat_template:
            raise RequestError(
                "--add-bos-token and --apply-chat-template need the model's tokenizer here: add "
                "--tokenizer FOLDER."
            )
        return asked
    own = Tokenizer.load(folder)
    if chat_template:
        own.chat_template()  # raises where there is none
    bos = own.hf.bos_token_id
    adds = bos is not None and own.encode("a")[:1] == [bos]
    if add_bos and not adds:
        raise RequestError("This model's tokenizer puts no BOS before texts: no --add-bos-token.")
    if add_bos is None:
        add_bos = adds and not chat_template
    return replace(asked, tokenizer=folder, add_bos=add_bos, chat_template=chat_template)
