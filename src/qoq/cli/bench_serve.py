"""``qoq bench serve``: load on a running OpenAI-compatible server, and how it bears it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qoq.cli.bench_serve_report import show, title
from qoq.cli.options import API_KEY, BASE_URL, JSON
from qoq.cli.terminal import as_json, bar, emit, verb

if TYPE_CHECKING:
    from qoq.bench.load import Ramp
    from qoq.bench.prompts import Ask
    from qoq.tokenizer import Tokenizer

RANDOM, SHARED, FILES = "Random dataset", "Shared prefixes", "Datasets in files"
RAMP, ANSWERS = "A growing rate", "Answers"


@verb()
def serve(
    base_url: BASE_URL = "http://127.0.0.1:8000",
    model: Annotated[
        str | None, typer.Option(help="Name to ask for. Default: the first of /v1/models.")
    ] = None,
    api_key: API_KEY = None,
    backend: Annotated[
        str, typer.Option(help="openai (/v1/completions) or openai-chat (/v1/chat/completions).")
    ] = "openai",
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Folder whose tokenizer measures prompts. Default: words count."),
    ] = None,
    num_prompts: Annotated[int, typer.Option(help="Requests in all.")] = 100,
    request_rate: Annotated[
        float, typer.Option(help="Arrivals per second, drawn as a Poisson process; inf: at once.")
    ] = float("inf"),
    burstiness: Annotated[
        float, typer.Option(help="1: Poisson; below 1 in bursts, above 1 steadier.")
    ] = 1.0,
    max_concurrency: Annotated[
        int | None, typer.Option(help="Requests in flight at most; others wait here.")
    ] = None,
    ramp_up_strategy: Annotated[
        str | None,
        typer.Option(help="linear or exponential, in place of one rate.", rich_help_panel=RAMP),
    ] = None,
    ramp_up_start_rps: Annotated[
        float | None, typer.Option(help="Arrivals per second at first.", rich_help_panel=RAMP)
    ] = None,
    ramp_up_end_rps: Annotated[
        float | None, typer.Option(help="Arrivals per second at last.", rich_help_panel=RAMP)
    ] = None,
    dataset_name: Annotated[
        str,
        typer.Option(
            "--dataset-name",
            "--dataset",
            help="random, prefix_repetition, sharegpt or custom (files).",
        ),
    ] = "random",
    dataset_path: Annotated[
        Path | None,
        typer.Option(
            help="sharegpt: its JSON file. custom: JSONL with prompt or messages per line.",
            rich_help_panel=FILES,
        ),
    ] = None,
    custom_output_len: Annotated[
        int | None,
        typer.Option(
            help="New tokens each. Default: the line's output_tokens, or 256.",
            rich_help_panel=FILES,
        ),
    ] = None,
    sharegpt_output_len: Annotated[
        int | None,
        typer.Option(
            help="New tokens each. Default: as many as the recorded answer.", rich_help_panel=FILES
        ),
    ] = None,
    random_input_len: Annotated[
        int, typer.Option(help="Tokens in.", rich_help_panel=RANDOM)
    ] = 1024,
    random_output_len: Annotated[
        int, typer.Option(help="New tokens.", rich_help_panel=RANDOM)
    ] = 128,
    random_range_ratio: Annotated[
        float, typer.Option(help="Lengths vary by so much either way.", rich_help_panel=RANDOM)
    ] = 0.0,
    random_prefix_len: Annotated[
        int, typer.Option(help="Tokens all begin with, beside those.", rich_help_panel=RANDOM)
    ] = 0,
    prefix_repetition_prefix_len: Annotated[
        int, typer.Option(metavar="N", help="Tokens of a prefix.", rich_help_panel=SHARED)
    ] = 256,
    prefix_repetition_suffix_len: Annotated[
        int, typer.Option(metavar="N", help="Tokens after it.", rich_help_panel=SHARED)
    ] = 256,
    prefix_repetition_num_prefixes: Annotated[
        int, typer.Option(metavar="N", help="How many there are.", rich_help_panel=SHARED)
    ] = 10,
    prefix_repetition_output_len: Annotated[
        int, typer.Option(metavar="N", help="New tokens.", rich_help_panel=SHARED)
    ] = 128,
    temperature: Annotated[
        float, typer.Option(help="0 takes the likeliest token.", rich_help_panel=ANSWERS)
    ] = 0.0,
    ignore_eos: Annotated[
        bool,
        typer.Option(
            help="Ask for answers of full length (servers that know ignore_eos).",
            rich_help_panel=ANSWERS,
        ),
    ] = True,
    goodput: Annotated[
        list[str] | None,
        typer.Option(help="Count requests that meet these, in ms: --goodput ttft:200 tpot:50."),
    ] = None,
    more: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    metric_percentiles: Annotated[str, typer.Option(help="Percentiles, with commas.")] = "99",
    seed: Annotated[int, typer.Option(help="Chooses texts, lengths and arrivals.")] = 0,
    num_warmups: Annotated[int, typer.Option(help="Requests ahead of the test.")] = 1,
    timeout: Annotated[float, typer.Option(help="Seconds of silence that count as failure.")] = 600,
    save_result: Annotated[
        Path | None, typer.Option("--result-filename", help="Write the result to this JSON file.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Draw latencies and a timeline (.svg or .png).")
    ] = None,
    json: JSON = False,
) -> None:
    """Send many streaming requests to a server and time the answers.

    Works against any server that speaks OpenAI's protocol. With --request-rate arrivals do not wait
    for answers (an open loop); with --max-concurrency a fixed number is in flight.

        qoq bench serve --request-rate 4 --num-prompts 200 --goodput ttft:500 tpot:100

        qoq bench serve --max-concurrency 32 --dataset-name prefix_repetition --picture out.svg

        qoq bench serve --dataset-name sharegpt --dataset-path sharegpt.json --request-rate inf

    --json prints: the settings, duration, completed, failed, failures (by kind), total tokens,
    request_throughput, request_goodput, output_throughput, total_token_throughput, and for ttft,
    tpot, itl and e2el mean, median, std and p99 in ms; command, commit, hardware (of this client).
    Status 1 if every request failed.
    """
    import asyncio

    from qoq.bench.load import Load, arrivals, check, run_load
    from qoq.bench.serving import parse_goals, summarize
    from qoq.cli.bench import numbers, origin
    from qoq.client.api import CHAT, COMPLETIONS, Endpoint, first_model
    from qoq.errors import RequestError, ServerError

    paths = {"openai": COMPLETIONS, "vllm": COMPLETIONS, "openai-chat": CHAT}
    if backend not in paths:
        raise RequestError(f"--backend must be openai or openai-chat, not {backend!r}.")
    if more and not goodput:
        raise RequestError(f"What is {more[0]!r} for? Options begin with --.")
    if num_prompts < 1 or num_warmups < 0 or (max_concurrency is not None and max_concurrency < 1):
        raise RequestError("--num-prompts and --max-concurrency must be 1 or more.")
    goals = parse_goals([*(goodput or ()), *(more or ())])
    percentiles = numbers(metric_percentiles, "--metric-percentiles")
    rate = _rate(request_rate, ramp_up_strategy, ramp_up_start_rps, ramp_up_end_rps)
    arrivals(1, rate, burstiness, seed)  # refuse before any work
    asks = _asks(
        dataset_name,
        num_prompts,
        seed,
        _tokenizer(tokenizer),
        path=dataset_path,
        lengths={"custom": custom_output_len, "sharegpt": sharegpt_output_len},
        alone={
            "input_len": random_input_len,
            "output_len": random_output_len,
            "range_ratio": random_range_ratio,
            "prefix_len": random_prefix_len,
        },
        shared={
            "prefix_len": prefix_repetition_prefix_len,
            "suffix_len": prefix_repetition_suffix_len,
            "num_prefixes": prefix_repetition_num_prefixes,
            "output_len": prefix_repetition_output_len,
        },
    )
    endpoint = Endpoint(base_url, api_key)
    extra: dict[str, Any] = {"temperature": temperature}
    load = Load(
        endpoint,
        model or first_model(endpoint),
        paths[backend],
        {**extra, "ignore_eos": True} if ignore_eos else extra,
        rate,
        burstiness,
        max_concurrency,
        timeout,
        seed,
    )
    for _ in range(num_warmups):
        asyncio.run(check(load, asks[0]))
    with bar("requests", quiet=json) as progress:
        samples = asyncio.run(run_load(load, asks, lambda done: progress(done, len(asks))))
    facts = {
        "base_url": base_url,
        "model": load.model,
        "backend": backend,
        "dataset_name": dataset_name,
        "num_prompts": num_prompts,
        "request_rate": "inf" if request_rate == float("inf") else request_rate,
        **_ramp_facts(rate),
        "burstiness": burstiness,
        "max_concurrency": max_concurrency,
        "seed": seed,
        **({"goodput": goals} if goals else {}),
        **summarize(samples, goals, percentiles),
        **origin(),
    }
    if save_result is not None:
        save_result.write_text(as_json(facts) + "\n", encoding="utf-8")
    if picture is not None:
        from qoq.bench.serving_picture import picture as draw

        draw(samples, title(facts), picture)
    if json:
        emit(facts)
    else:
        show(facts, percentiles)
    if not facts["completed"]:
        raise ServerError(f"Every request failed. {samples[0].message}", "all_failed")


def _tokenizer(folder: str | None) -> "Tokenizer | None":
    from qoq.tokenizer import Tokenizer

    return None if folder is None else Tokenizer.load(folder)


def _rate(
    request_rate: float, strategy: str | None, start: float | None, end: float | None
) -> "float | Ramp":
    """One rate, or one that grows."""
    from qoq.bench.load import Ramp
    from qoq.errors import RequestError

    if strategy is None and start is None and end is None:
        return request_rate
    if strategy not in ("linear", "exponential") or start is None or end is None:
        raise RequestError(
            "A growing rate needs --ramp-up-strategy linear or exponential, --ramp-up-start-rps "
            "and --ramp-up-end-rps."
        )
    if request_rate != float("inf"):
        raise RequestError("Give either --request-rate or --ramp-up-strategy, not both.")
    return Ramp(start, end, strategy == "exponential")


def _ramp_facts(rate: "float | Ramp") -> dict[str, Any]:
    if isinstance(rate, float):
        return {}
    return {
        "ramp_up_strategy": "exponential" if rate.exponential else "linear",
        "ramp_up_start_rps": rate.start,
        "ramp_up_end_rps": rate.end,
    }


def _asks(
    name: str,
    count: int,
    seed: int,
    tokenizer: "Tokenizer | None",
    *,
    path: Path | None,
    lengths: dict[str, int | None],
    alone: dict[str, Any],
    shared: dict[str, Any],
) -> "list[Ask]":
    """The requests of the data set called ``name``; ``lengths``: new tokens by data set."""
    from qoq.bench.prompts import Writer, file_asks, prefix_asks, random_asks
    from qoq.bench.sharegpt import sharegpt_asks
    from qoq.errors import RequestError

    if name in lengths and path is None:
        raise RequestError(f"--dataset-name {name} needs --dataset-path FILE.")
    if name == "sharegpt" and path is not None:
        return sharegpt_asks(path, count, seed, tokenizer, output_len=lengths[name])
    if path is not None and name in ("custom", "random"):
        return file_asks(path, count, lengths["custom"])
    writer = Writer(seed, tokenizer)
    if name == "random":
        return random_asks(writer, count, **alone)
    if name in ("prefix_repetition", "prefix-repetition"):
        return prefix_asks(writer, count, **shared)
    raise RequestError(
        f"--dataset-name must be random, prefix_repetition, sharegpt or custom, not {name!r}."
    )
