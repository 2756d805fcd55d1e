"""``qoq serve``: a model behind OpenAI's HTTP interface."""

import logging
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from qoq.cli.options import ANY_MODEL, SPECULATIVE_HELP, THREADS_HELP, mapping, use_threads
from qoq.cli.serve_command import count, several
from qoq.cli.terminal import verb
from qoq.errors import RequestError

KEY_VARIABLE = "QOQ_API_KEY"
LogFormat = Literal["text", "json"]
LogLevel = Literal["debug", "info", "warning", "error", "critical"]
_ENGINE, _HTTP, _LOGS = "Engine", "HTTP", "Configuration and logs"


@verb()
def serve(
    model: ANY_MODEL,
    host: Annotated[
        str, typer.Option(help="Address; 0.0.0.0 for all.", rich_help_panel=_HTTP)
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(min=0, max=65535, help="Port; 0 takes a free one.", rich_help_panel=_HTTP),
    ] = 8000,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(help="Names for clients (several). Default: MODEL.", rich_help_panel=_HTTP),
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Let in only who has one of these (several). Also from {KEY_VARIABLE}.",
            rich_help_panel=_HTTP,
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="A file with a key per line.", rich_help_panel=_HTTP)
    ] = None,
    max_model_len: Annotated[
        int | None,
        typer.Option(
            parser=count,
            metavar="TOKENS",
            help="Prompt and new tokens of a request at most. Default: the model's context.",
            rich_help_panel=_ENGINE,
        ),
    ] = None,
    max_num_seqs: Annotated[
        int, typer.Option(help="Requests that run at a time.", rich_help_panel=_ENGINE)
    ] = 64,
    max_num_batched_tokens: Annotated[
        int, typer.Option(help="Rows of a step's batch.", rich_help_panel=_ENGINE)
    ] = 2048,
    kv_cache_memory_bytes: Annotated[
        int | None,
        typer.Option(
            parser=count,
            metavar="BYTES",
            help="Memory for the KV cache: 2G, 500M. Default: what --max-num-seqs requests may "
            "need, within the fraction below.",
            rich_help_panel=_ENGINE,
        ),
    ] = None,
    kv_cache_memory_fraction: Annotated[
        float, typer.Option(help="Share of free memory it may take.", rich_help_panel=_ENGINE)
    ] = 0.8,
    enable_prefix_caching: Annotated[
        bool,
        typer.Option(
            "--enable-prefix-caching/--no-enable-prefix-caching",
            hidden=True,  # its two names would squeeze the table; the text above has it
        ),
    ] = True,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Seed of requests that name none; each then always gives the same text. "
            "Default: random.",
            rich_help_panel=_ENGINE,
        ),
    ] = None,
    max_num_queued_reqs: Annotated[
        int,
        typer.Option(help="Requests that may wait; more get a 503.", rich_help_panel=_ENGINE),
    ] = 1024,
    generation_config: Annotated[
        str,
        typer.Option(
            help="Sampling defaults: auto (the model's generation_config.json), vllm (neutral), or "
            "a folder with such a file.",
            rich_help_panel=_ENGINE,
        ),
    ] = "auto",
    chat_template: Annotated[
        str | None,
        typer.Option(help="A jinja file in place of the model's own.", rich_help_panel=_ENGINE),
    ] = None,
    chat_template_timeout: Annotated[
        float, typer.Option(help="Seconds one rendering may take.", rich_help_panel=_ENGINE)
    ] = 5.0,
    speculative_config: Annotated[
        dict[str, Any] | None,
        typer.Option(
            parser=mapping, metavar="JSON", help=SPECULATIVE_HELP, rich_help_panel=_ENGINE
        ),
    ] = None,
    trust_request_chat_template: Annotated[
        bool,
        typer.Option(
            "--trust-request-chat-template",
            help="Let requests bring chat templates of their own.",
            rich_help_panel=_ENGINE,
        ),
    ] = False,
    tool_call_parser: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="How the model writes calls of tools: hermes, llama3_json, mistral, or auto, as "
            "its chat template shows.",
            rich_help_panel=_ENGINE,
        ),
    ] = "auto",
    enable_auto_tool_choice: Annotated[
        bool | None,
        typer.Option(
            "--enable-auto-tool-choice/--no-enable-auto-tool-choice",
            hidden=True,  # its two names would squeeze the table; the text above has it
        ),
    ] = None,
    engine_step_timeout: Annotated[
        float,
        typer.Option(
            help="Seconds after which a step that has not returned counts as hung: requests get a "
            "503, the process ends with status 1. 0: never.",
            rich_help_panel=_ENGINE,
        ),
    ] = 600.0,
    device: Annotated[
        str,
        typer.Option(
            help="cpu, cuda, cuda:N or auto: a GPU that our kernels run on, if there is one.",
            rich_help_panel=_ENGINE,
        ),
    ] = "auto",
    enforce_eager: Annotated[
        bool,
        typer.Option("--enforce-eager", help="No CUDA graphs.", rich_help_panel=_ENGINE),
    ] = False,
    backend: Annotated[
        str, typer.Option(help="auto, cpu, gpu or oracle.", rich_help_panel=_ENGINE)
    ] = "auto",
    threads: Annotated[int | None, typer.Option(help=THREADS_HELP, rich_help_panel=_ENGINE)] = None,
    shutdown_timeout: Annotated[
        float,
        typer.Option(
            help="Seconds that open requests get after SIGTERM or Ctrl-C.", rich_help_panel=_HTTP
        ),
    ] = 0.0,
    request_timeout: Annotated[
        float | None, typer.Option(help="Seconds for a whole request.", rich_help_panel=_HTTP)
    ] = None,
    body_timeout: Annotated[
        float, typer.Option(help="Seconds for a body to arrive.", rich_help_panel=_HTTP)
    ] = 60.0,
    max_request_bytes: Annotated[
        int,
        typer.Option(
            parser=count,
            metavar="BYTES",
            help="Largest body. All streams wait while one is parsed, up to 0.1 s a megabyte.",
            rich_help_panel=_HTTP,
        ),
    ] = 16 << 20,
    root_path: Annotated[
        str, typer.Option(help="Path a proxy puts before ours.", rich_help_panel=_HTTP)
    ] = "",
    allowed_origins: Annotated[
        list[str] | None,
        typer.Option(
            help="CORS: origins of browser pages, or *. None by default.", rich_help_panel=_HTTP
        ),
    ] = None,
    allowed_methods: Annotated[
        list[str] | None, typer.Option(help="CORS: methods. Default *.", rich_help_panel=_HTTP)
    ] = None,
    allowed_headers: Annotated[
        list[str] | None, typer.Option(help="CORS: headers. Default *.", rich_help_panel=_HTTP)
    ] = None,
    allow_credentials: Annotated[
        bool, typer.Option("--allow-credentials", help="CORS: cookies.", rich_help_panel=_HTTP)
    ] = False,
    ssl_keyfile: Annotated[
        str | None, typer.Option(help="TLS: private key.", rich_help_panel=_HTTP)
    ] = None,
    ssl_certfile: Annotated[
        str | None, typer.Option(help="TLS: certificate.", rich_help_panel=_HTTP)
    ] = None,
    ssl_ca_certs: Annotated[
        str | None, typer.Option(help="TLS: authorities of clients.", rich_help_panel=_HTTP)
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML file with any of these options by name; the command line wins.",
            rich_help_panel=_LOGS,
        ),
    ] = None,
    log_format: Annotated[
        LogFormat, typer.Option(help="How lines on stderr look.", rich_help_panel=_LOGS)
    ] = "text",
    uvicorn_log_level: Annotated[
        LogLevel, typer.Option(help="The least that is logged.", rich_help_panel=_LOGS)
    ] = "info",
) -> None:
    """Serve a model over HTTP, as OpenAI's clients speak it; see /docs on the running server.

    Option names are vLLM's; dashes and underscores are the same, and options that take several
    values take them in a row. What prompts begin with alike is computed once, unless
    --no-enable-prefix-caching is given. Where it is known how a model writes calls of tools, it may
    decide by itself to call them, unless --no-enable-auto-tool-choice is given.

    Examples:

        qoq serve OUT --port 8000 --max-num-seqs 32

        qoq serve OUT --served-model-name books --api-key secret --shutdown-timeout 30
    """
    from qoq.engine.speculative import SpeculativeConfig
    from qoq.server.app import create_app
    from qoq.server.model import EngineOptions, load_served_model
    from qoq.server.report import announce
    from qoq.server.run import Transport, bind, configure_logs, make_server
    from qoq.server.settings import ServerSettings

    settings = ServerSettings(
        served_model_names=tuple(served_model_name or [model]),
        api_keys=_keys(api_key or [], api_key_file),
        max_queued=max_num_queued_reqs,
        max_request_bytes=max_request_bytes,
        request_timeout=request_timeout,
        body_timeout=body_timeout,
        template_timeout=chat_template_timeout,
        trust_request_chat_template=trust_request_chat_template,
        step_timeout=engine_step_timeout,
        shutdown_timeout=shutdown_timeout,
        root_path=root_path,
        allowed_origins=several(allowed_origins, ()),
        allowed_methods=several(allowed_methods, ("*",)),
        allowed_headers=several(allowed_headers, ("*",)),
        allow_credentials=allow_credentials,
    )
    options = EngineOptions(
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        enable_prefix_caching=enable_prefix_caching,
        kv_memory_bytes=kv_cache_memory_bytes,
        kv_memory_fraction=kv_cache_memory_fraction,
        generation_config=generation_config,
        seed=seed,
        chat_template=_template(chat_template),
        speculative=SpeculativeConfig.of(speculative_config),
        tool_call_parser=tool_call_parser,
        enable_auto_tool_choice=enable_auto_tool_choice,
        device=device,
        enforce_eager=enforce_eager,
        backend=backend,
    )
    transport = Transport(
        ssl_keyfile=ssl_keyfile,
        ssl_certfile=ssl_certfile,
        ssl_ca_certs=ssl_ca_certs,
        log_format=log_format,
        log_level=uvicorn_log_level,
    )
    transport.check()
    use_threads(threads)
    with bind(host, port) as sock:
        configure_logs(transport.log_format, transport.log_level)
        served = load_served_model(model, options)
        announce(served, transport.log_format)
        server = make_server(create_app(served, settings), settings, transport)
        server.run(sockets=[sock])
    if server.stuck:
        logging.shutdown()
        os._exit(server.status)  # an orderly end would wait for the engine's thread
    raise typer.Exit(server.status)


def _keys(given: list[str], file: Path | None) -> tuple[str, ...]:
    """All keys, from the options, the environment and the file."""
    keys = [*given, *os.environ.get(KEY_VARIABLE, "").replace(",", " ").split()]
    if file is not None:
        lines = file.read_text(encoding="utf-8").splitlines()
        from_file = [line.strip() for line in lines if line.strip() and line.lstrip()[0] != "#"]
        if not from_file:
            raise RequestError(f"--api-key-file {file} holds no key; put one on a line.")
        keys += from_file
    if any(not key.strip() for key in keys):
        raise RequestError("An API key is empty; give a text, or leave --api-key out.")
    return tuple(keys)


def _template(given: str | None) -> str | None:
    """The template itself: a file's content, or the text where it is clearly no path."""
    if given is None or "{" in given:
        return given
    return Path(given).read_text(encoding="utf-8")
