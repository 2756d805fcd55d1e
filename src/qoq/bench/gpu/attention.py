"""attention: decoding and prompts over KV4 and KV8 pages, beside torch's over dense fp16."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from qoq.bench.attention import kv_bytes, kv_name, random_pages
from qoq.bench.gpu.bench import Bench, Row, broken, left_out
from qoq.bench.gpu.clock import Run
from qoq.bench.kernels import PAGE_SIZE
from qoq.bench.shapes import config_of
from qoq.formats.scheme import KVFormat
from qoq.kernels.attention import attention
from qoq.models.config import ModelConfig

MODEL = "llama-3-8b"  # its heads are those of the 70B model too, but for their number
FORMATS = (KVFormat(4, 4), KVFormat(8, 8))
BATCHES = (1, 4, 16, 64, 256)
CONTEXTS = (1024, 4096, 8192, 32768)
CHUNK = 2048
MOST_TOKENS = 4 << 20  # in a cache; torch's takes 4 kB for each
SDPA = "torch SDPA fp16"
FP16_BYTES = 2


@dataclass(frozen=True)
class Case:
    """``batch`` sequences of ``context`` tokens, of which the last ``queries`` ask."""

    batch: int
    context: int
    queries: int


def cases(
    batches: Sequence[int] = BATCHES, contexts: Sequence[int] = CONTEXTS, chunk: int = CHUNK
) -> list[Case]:
    """Prompts' last chunks, then one token of each sequence."""
    prompts = [Case(1, context, min(chunk, context)) for context in contexts]
    decoding = [
        Case(batch, context, 1)
        for context, batch in itertools.product(contexts, batches)
        if batch * context <= MOST_TOKENS
    ]
    return [*prompts, *decoding]


def rows(
    bench: Bench, chosen: Sequence[Case] | None = None, config: ModelConfig | None = None
) -> Iterator[Row]:
    """Each case over our pages and torch's tensors; with the floor of reading the pages."""
    config = config or config_of(MODEL, 1)
    for case in cases() if chosen is None else chosen:
        ours = {kv_name(kv): kv for kv in FORMATS}
        runs = [_over_pages(bench, config, kv, case) for kv in FORMATS]
        about = {"batch": case.batch, "context": case.context, "queries": case.queries}
        seen = case.queries * (case.context - case.queries) + case.queries * (case.queries + 1) / 2
        ops = 4 * case.batch * config.num_heads * config.head_dim * seen
        for row in bench.compare([*runs, _torch(bench, config, case)], **about):
            if "us" in row:
                kv = ours.get(row["system"])
                moved = _bytes(config, kv, case)
                row |= {"tflops": ops / row["us"] / 1e6, "bytes_per_s": moved / row["us"] * 1e6}
                if kv is not None and case.queries == 1 and bench.ceilings is not None:
                    floor = bench.ceilings.seconds(moved) * 1e6
                    row |= {"floor_us": floor, "of_floor": floor / row["us"]}
            yield row


def warm(bench: Bench, share: int, of: int) -> None:
    """Compile what every ``of``-th case needs, from ``share`` on, by running it once."""
    config = config_of(MODEL, 1)
    for case, kv in [*itertools.product(cases(), FORMATS)][share::of]:
        small = Case(case.batch, min(case.context, 2 * CHUNK), min(case.queries, 2 * CHUNK))
        _over_pages(bench, config, kv, small, copies=1).call()


def lines(rows: list[Row]) -> list[str]:
    """A line for each case: our times with their share of the floor (prompts: TFLOP/s), torch's."""
    systems = [*(kv_name(kv) for kv in FORMATS), SDPA]
    out = [f"{'us, share of the floor or TFLOP/s':34}" + "".join(f"{name:>20}" for name in systems)]
    named: dict[tuple[int, int, int], dict[str, Row]] = {}
    for row in rows:
        key = (row["batch"], row["context"], row["queries"])
        named.setdefault(key, {})[row["system"]] = row
    for (batch, context, queries), found in named.items():
        what = f"batch {batch:3}, context {context:5}, queries {queries:4}"
        cells = (_cell(found.get(system)) for system in systems)
        out.append(f"{what:34}" + "".join(f"{cell:>20}" for cell in cells))
    return [*out, *left_out(rows)]


def failed(rows: Sequence[Row]) -> bool:
    """Whether our attention could not be run."""
    return broken(rows, [kv_name(kv) for kv in FORMATS])


def _cell(row: Row | None) -> str:
    if row is None or "us" not in row:
        return "-"
    if row["queries"] > 1:
        return f"{row['us']:.0f} {row['tflops']:4.0f}T"
    return f"{row['us']:.1f}" + (f" {100 * row['of_floor']:3.0f}%" if "of_floor" in row else "")


def _bytes(config: ModelConfig, kv: KVFormat | None, case: Case) -> float:
    """Of keys and values; ``kv`` None: dense fp16."""
    tokens = case.batch * case.context
    if kv is None:
        return float(2 * tokens * config.num_kv_heads * config.head_dim * FP16_BYTES)
    return kv_bytes(config, kv, tokens)


def _over_pages(
    bench: Bench, config: ModelConfig, kv: KVFormat, case: Case, copies: int | None = None
) -> Run:
    device = bench.device
    each = -(-case.context // PAGE_SIZE)
    shape = (case.batch * each, config.num_kv_heads, config.head_dim)
    queries = case.batch * case.queries
    q = torch.randn(queries, config.num_heads, config.head_dim, device=device)
    starts = torch.arange(0, queries + 1, case.queries, dtype=torch.int32, device=device)
    table = torch.randperm(case.batch * each, device=device).to(torch.int32)
    lens = torch.full((case.batch,), case.context, dtype=torch.int32, device=device)
    size = int(_bytes(config, kv, case)) if copies is None else bench.cold_bytes
    return bench.in_turn(
        kv_name(kv),
        lambda: random_pages(kv, *shape, device=device),
        size,
        lambda pages: attention(
            q,
            pages,
            table.view(case.batch, each),
            lens,
            starts,
            config.sm_scale,
            backend=bench.backend,
        ),
    )


def _torch(bench: Bench, config: ModelConfig, case: Case) -> Run:
    """scaled_dot_product_attention, the backend left to torch; queries are a prompt's last."""
    dtype = torch.float16 if bench.device.type == "cuda" else torch.float32
    shape = (case.batch, config.num_kv_heads, case.context, config.head_dim)
    q = torch.randn(
        case.batch,
        config.num_heads,
        case.queries,
        config.head_dim,
        dtype=dtype,
        device=bench.device,
    )

    def make() -> tuple[Tensor, Tensor]:
        keys, values = (torch.randn(shape, dtype=dtype, device=bench.device) for _ in range(2))
        return keys, values

    def call(kv: tuple[Tensor, Tensor]) -> Tensor:
        mask = None
        if case.queries > 1:
            from torch.nn.attention.bias import causal_lower_right

            mask = causal_lower_right(case.queries, case.context)
        return F.scaled_dot_product_attention(
            q, *kv, attn_mask=mask, scale=config.sm_scale, enable_gqa=True
        )

    return bench.in_turn(SDPA, make, int(_bytes(config, None, case)), call)
