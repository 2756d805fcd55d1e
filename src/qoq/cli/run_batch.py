"""``qoq run-batch``: a file of requests answered, without a server."""

import time
from pathlib import Path
from typing import Annotated

import typer

from qoq.cli.options import DEVICE, JSON, OVERWRITE_FILE, THREADS, use_threads
from qoq.cli.terminal import bar, duration, emit, note, verb


@verb("The same command goes on from there.")
def run_batch(
    input_file: Annotated[
        Path, typer.Option("--input-file", "-i", help="Requests in OpenAI's batch format.")
    ],
    output_file: Annotated[Path, typer.Option("--output-file", "-o", help="Where the answers go.")],
    model: Annotated[
        str, typer.Option(help="Packed checkpoint, or a full-precision folder or hub id.")
    ],
    served_model_name: Annotated[
        str | None, typer.Option(help="Name in the answers. Default: the request's, or MODEL.")
    ] = None,
    max_num_seqs: Annotated[int, typer.Option(help="Requests that run at a time.")] = 64,
    tool_call_parser: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="How the model writes calls of tools: hermes, llama3_json, mistral, or auto, as "
            "its chat template shows.",
        ),
    ] = "auto",
    kv_tokens: Annotated[
        int | None, typer.Option(help="Tokens in the KV cache. Default: as free memory allows.")
    ] = None,
    device: DEVICE = "auto",
    threads: THREADS = None,
    overwrite: OVERWRITE_FILE = False,
    json: JSON = False,
) -> None:
    """Answer a file of requests in OpenAI's batch format, as fast as the engine goes.

    Lines of /v1/chat/completions and /v1/completions; answers appear in the order they are
    finished, under their custom_id, and say what the server would say. They gather in OUT.partial;
    an interrupted run goes on there.

        qoq run-batch -i requests.jsonl -o answers.jsonl --model OUT

    --json prints: out, total, resumed, done, failed, prompt_tokens, tokens, seconds.
    """
    from qoq.api.calling import ToolCalling, check_parser
    from qoq.api.sampling import sampling_defaults
    from qoq.batch.lines import Model
    from qoq.batch.results import Results
    from qoq.batch.run import run_batch as run
    from qoq.errors import SourceError
    from qoq.llm import LLM

    check_parser(tool_call_parser)
    use_threads(threads)
    if not input_file.is_file():
        raise SourceError(f"There is no file {input_file}.")
    if output_file.exists() and output_file.samefile(input_file):
        raise SourceError("Input and output are the same file; name another output.")
    with Results(output_file, overwrite=overwrite) as results:
        if results.resumed and not json:
            note(f"{results.resumed} answers are there already.")
        llm = LLM(model, max_requests=max_num_seqs, kv_tokens=kv_tokens, device=device)
        engine = llm.new_engine()
        read_by = Model(
            name=served_model_name or model,
            tokenizer=llm.tokenizer,
            tools=ToolCalling.of_model(
                llm.tokenizer, llm.config.model_type, parser=tool_call_parser
            ),
            defaults=sampling_defaults(llm.path),
            context=llm.config.max_positions,
            vocab_size=llm.config.vocab_size,
        )
        start = time.monotonic()
        with bar("requests", quiet=json) as progress:
            tally = run(
                engine,
                input_file,
                results,
                model=read_by,
                ahead=2 * max_num_seqs,
                progress=progress,
            )
    seconds = time.monotonic() - start
    facts = {"out": str(output_file), **tally.to_dict(), "seconds": round(seconds, 3)}
    if json:
        emit(facts)
        return
    print(
        f"{output_file}: answers to {tally.done} requests, {tally.failed} of them errors; "
        f"{tally.tokens} new tokens in {duration(seconds)}, "
        f"{tally.tokens / max(seconds, 1e-9):.1f} tokens/s"
    )
