"""model: the bundled model's greedy tokens on every backend; whole models' speed in the engine."""

import itertools
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import qoq
from qoq.bench import throughput
from qoq.bench.gpu.bench import Bench, Row
from qoq.bench.random_weights import random_decoder
from qoq.bench.shapes import config_of
from qoq.checkpoint.hf import CONFIG_NAME, read_json_object
from qoq.engine.engine import Engine, pages_needed
from qoq.engine.request import Request, SamplingParams
from qoq.formats.scheme import QuantScheme
from qoq.kernels.cpu.backend import missing as no_cpu_kernels
from qoq.kernels.threads import torch_stands_aside
from qoq.kvcache.budget import PoolShape
from qoq.models.config import ModelConfig
from qoq.models.load import LoadedModel, load_model
from qoq.quantize.pipeline import quantize
from qoq.quantize.recipe import RTN
from qoq.tokenizer import Tokenizer

BUNDLED = Path(qoq.__file__).parents[2] / "examples" / "books-llama"
SCHEME = "w4a8kv4-g128"
PAGE_SIZE = 64
PROMPTS, NEW_TOKENS = 8, 48
TIE, APART = 0.3, 0.1
"""Floats that differ in their last bits turn some codes of activations and of the cache, and those
move log-probabilities by about 0.04: 0.04 in the mean and 0.12 at most between the oracle and the
C++ kernels, which part where the two likeliest tokens are up to 0.2 apart. So tokens nearer than
TIE count as equally good, and log-probabilities further than APART in the mean as wrong.
"""

SPEED = (
    *(("llama-3.2-1b", batch, False) for batch in (1, 64)),
    *(("llama-3-8b", batch, False) for batch in (1, 16, 64, 256)),
    *(("llama-3-8b", batch, True) for batch in (1, 64)),
)
"""(shape, batch, whether without CUDA graphs)."""
PROMPT_LEN, OUTPUT_LEN = 512, 128


def rows(bench: Bench, source: Path = BUNDLED) -> Iterator[Row]:
    """Texts of ``source`` quantized on the spot, by each backend; then speeds."""
    yield from greedy(bench, source)
    for shape, batch, eager in SPEED:
        yield speed(bench, shape, batch, eager)


def greedy(bench: Bench, source: Path) -> Iterator[Row]:
    """The same prompts continued by each backend, compared with the oracle on the CPU."""
    if not (source / "heldout.txt").is_file():
        yield {"problem": f"there is no {source}; run this from a checkout of the sources"}
        return
    ids = Tokenizer.load(source).encode((source / "heldout.txt").read_text("utf-8")[:40_000])
    prompts = [ids[500 * at :][: _prompt_length(at)] for at in range(PROMPTS)]
    ways = [("oracle", "cpu"), ("oracle", str(bench.device)), (bench.backend, str(bench.device))]
    if no_cpu_kernels() is None:
        ways.append(("cpu", "cpu"))
    with tempfile.TemporaryDirectory() as folder:
        packed = quantize(source, Path(folder, "packed"), scheme=SCHEME, recipe=RTN)
        truth: list[Request] = []
        for backend, device in dict.fromkeys(ways):
            model = load_model(packed, backend=backend, device=device)
            with torch_stands_aside():  # tensors this small are no work for many threads
                texts = _continue(model, prompts, backend)
            truth = truth or texts
            yield {"backend": backend, "device": device, **compare(texts, truth)}


def compare(texts: Sequence[Request], truth: Sequence[Request]) -> dict[str, Any]:
    """Where texts part, and how far apart the two likeliest tokens were there in ``truth``."""
    parted = []
    same = 0
    apart = []
    for at, (text, want) in enumerate(zip(texts, truth, strict=True)):
        pairs = itertools.zip_longest(text.token_ids, want.token_ids)
        first = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        alike = len(want.token_ids) if first is None else first
        same += alike
        logprobs = zip(text.logprobs[:alike], want.logprobs[:alike], strict=True)
        apart += [abs(a - b) for a, b in logprobs]
        if first is not None:
            second, best = sorted(p.logprob for p in want.top_logprobs[first].values())[-2:]
            parted.append({"prompt": at, "token": first, "gap": best - second})
    return {
        "prompts": len(truth),
        "tokens": sum(len(want.token_ids) for want in truth),
        "same_until_parted": same,
        "ties": sum(one["gap"] <= TIE for one in parted),
        "wrong": sum(one["gap"] > TIE for one in parted),
        "parted": parted,
        "apart": sum(apart) / max(1, len(apart)),
    }


def speed(
    bench: Bench,
    shape: str,
    batch: int,
    eager: bool,
    *,
    prompt_len: int = PROMPT_LEN,
    output_len: int = OUTPUT_LEN,
) -> Row:
    """Tokens per second of a model of random weights."""
    result = _random_run(bench, config_of(shape), batch, eager, prompt_len, output_len)
    return {"shape": shape, "eager": eager, **result.to_dict()}


def warm(bench: Bench, share: int, of: int) -> None:
    """Compile what every ``of``-th size needs, from ``share`` on, by running one layer of it."""
    sizes = [
        (config_of(shape, 1), batch, PROMPT_LEN)
        for shape, batch in dict.fromkeys((shape, batch) for shape, batch, _ in SPEED)
    ]
    if BUNDLED.is_dir():
        bundled = ModelConfig.from_hf(read_json_object(BUNDLED / CONFIG_NAME))
        usual = sum(map(_prompt_length, range(PROMPTS))) // PROMPTS
        sizes.append((replace(bundled, num_layers=1), PROMPTS, usual))
    for config, batch, prompt_len in sizes[share::of]:
        _random_run(bench, config, batch, True, prompt_len, 3)


def failed(rows: Sequence[Row]) -> bool:
    """Whether a backend chose another token where there was no tie, or sees other odds."""
    return any(
        row.get("wrong") or row.get("apart", 0.0) > APART or "problem" in row for row in rows
    )


def lines(rows: Sequence[Row]) -> list[str]:
    """For people."""
    out = []
    for row in rows:
        if "problem" in row:
            out.append(row["problem"])
        elif "ties" in row:
            out.append(
                f"greedy, {row['backend']} on {row['device']}: {row['same_until_parted']} of "
                f"{row['tokens']} tokens as the oracle's; parted at {row['ties']} ties and "
                f"{row['wrong']} other places; log-probabilities {row['apart']:.3f} apart"
            )
        else:
            out.append(
                f"{row['shape']:13} batch {row['batch']:3}{' eager' if row['eager'] else '      '} "
                f"prefill {row['prefill_tok_s']:9.0f} tok/s, decode {row['decode_tok_s']:8.0f} "
                "tok/s"
            )
    return out


def _prompt_length(at: int) -> int:
    return 20 + 37 * at


def _random_run(
    bench: Bench, config: ModelConfig, batch: int, eager: bool, prompt_len: int, output_len: int
) -> throughput.Throughput:
    scheme = QuantScheme.parse(SCHEME)
    return throughput.run(
        random_decoder(config, scheme, backend=bench.backend, device=bench.device),
        scheme.kv,
        batch=batch,
        prompt_len=prompt_len,
        output_len=output_len,
        backend=bench.backend,
        enforce_eager=eager,
        warm_up=True,
    )


def _continue(model: LoadedModel, prompts: Sequence[Sequence[int]], backend: str) -> list[Request]:
    config = model.config
    shape = PoolShape(
        model.scheme.kv, config.num_layers, config.num_kv_heads, PAGE_SIZE, config.head_dim
    )
    pages = sum(pages_needed(len(prompt) + NEW_TOKENS, PAGE_SIZE) for prompt in prompts)
    pool = shape.pool(pages, model.device)
    engine = Engine(model.decoder, pool, max_requests=len(prompts), backend=backend)
    params = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=2)
    requests = [engine.add(prompt, params) for prompt in prompts]
    while engine.unfinished:
        engine.step()
    return requests
