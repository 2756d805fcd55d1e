"""rows: the ops that turn rows of floats into codes, ids or cache entries, against their bytes."""

from collections.abc import Iterator, Sequence

import torch

from qoq.bench.attention import random_pages
from qoq.bench.gpu.bench import Bench, Row, broken, left_out
from qoq.bench.gpu.clock import Run
from qoq.bench.kernels import PAGE_SIZE
from qoq.bench.shapes import config_of
from qoq.formats.scheme import KVFormat
from qoq.kernels.act_quant import act_quant, rms_norm_quant, silu_mul_quant
from qoq.kernels.kv_append import kv_append
from qoq.kernels.sample import SamplingBatch, sample
from qoq.models.config import ModelConfig

MODEL = "llama-3-8b"
SIZES = (1, 64, 256, 4096)
MOST_SAMPLED = 256
Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def rows(
    bench: Bench, sizes: Sequence[int] = SIZES, config: ModelConfig | None = None
) -> Iterator[Row]:
    """Each op at M rows; with the floor of reading and writing each number once."""
    config = config or config_of(MODEL, 1)
    for m in sizes:
        timed = [*_to_codes(bench, config, m), _append(bench, config, m)]
        if m <= MOST_SAMPLED:
            timed += _sampling(bench, config, m)
        moved = {run.name: count for run, count in timed}
        for row in bench.compare([run for run, _ in timed], M=m):
            if "us" in row and bench.ceilings is not None:
                floor = bench.ceilings.seconds(moved[row["system"]]) * 1e6
                row |= {"floor_us": floor, "of_floor": floor / row["us"]}
            yield row


def warm(bench: Bench, share: int, of: int) -> None:
    """Compile what every ``of``-th op needs, from ``share`` on, by running it once."""
    config = config_of(MODEL, 1)
    ops = [*_to_codes(bench, config, 1), _append(bench, config, 1), *_sampling(bench, config, 1)]
    for run, _ in ops[share::of]:
        run.call()


def lines(rows: list[Row]) -> list[str]:
    """A line for each op."""
    sizes = sorted({row["M"] for row in rows})
    out = [f"{'us (floor)':24}" + "".join(f"{f'M {m}':>18}" for m in sizes)]
    for system in dict.fromkeys(row["system"] for row in rows):
        found = {row["M"]: row for row in rows if row["system"] == system}
        out.append(f"{system:24}" + "".join(f"{_cell(found.get(m)):>18}" for m in sizes))
    return [*out, *left_out(rows)]


def failed(rows: Sequence[Row]) -> bool:
    """Whether one of the ops could not be run."""
    return broken(rows, {row["system"] for row in rows})


def _cell(row: Row | None) -> str:
    if row is None or "us" not in row:
        return "-"
    return f"{row['us']:.1f}" + (f" ({row['floor_us']:.1f})" if "floor_us" in row else "")


def _to_codes(bench: Bench, config: ModelConfig, m: int) -> list[tuple[Run, int]]:
    """Runs, and the bytes each must move."""
    hidden, inner, wide = config.hidden_size, config.intermediate_size, config.q_size
    gain, backend = torch.ones(hidden, device=bench.device), bench.backend

    def floats(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=bench.device)

    norm = bench.in_turn(
        "rms_norm_quant",
        lambda: (floats(m, hidden), floats(m, hidden)),
        8 * m * hidden,
        lambda it: rms_norm_quant(it[0], gain, 1e-5, 8, it[1], backend=backend),
    )
    gate = bench.in_turn(
        "silu_mul_quant",
        lambda: floats(m, 2 * inner),
        8 * m * inner,
        lambda it: silu_mul_quant(it, 8, backend=backend),
    )
    plain = bench.in_turn(
        "act_quant",
        lambda: floats(m, wide),
        4 * m * wide,
        lambda it: act_quant(it, 8, backend=backend),
    )
    return [(norm, 13 * m * hidden), (gate, 9 * m * inner), (plain, 5 * m * wide)]


def _append(bench: Bench, config: ModelConfig, m: int) -> tuple[Run, int]:
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    pages = random_pages(KVFormat(4, 4), -(-m // PAGE_SIZE), kv_heads, dim, device=bench.device)
    slots = torch.randperm(pages.num_pages * PAGE_SIZE, device=bench.device)[:m]
    cos = torch.rand(m, dim // 2, device=bench.device)

    def make() -> Heads:
        qkv = torch.randn(m, heads + 2 * kv_heads, dim, device=bench.device)
        return qkv[:, :heads], qkv[:, heads:-kv_heads], qkv[:, -kv_heads:]

    def call(qkv: Heads) -> torch.Tensor:
        return kv_append(*qkv, cos, cos, slots, pages, backend=bench.backend)

    size = 4 * m * (heads + 2 * kv_heads) * dim
    moved = size + m * (4 * heads * dim + kv_heads * (dim + 8))
    run = bench.in_turn("kv_append (KV4)", make, size, call)
    return run, moved


def _sampling(bench: Bench, config: ModelConfig, m: int) -> list[tuple[Run, int]]:
    """Greedy, hot, and hot with top_k and top_p; the op takes the fastest twin there is."""

    def batch(temperature: float, top_k: int, top_p: float) -> SamplingBatch:
        def column(value: float, dtype: torch.dtype) -> torch.Tensor:
            return torch.full((m,), value, dtype=dtype, device=bench.device)

        return SamplingBatch(
            column(temperature, torch.float32),
            column(top_k, torch.int64),
            column(top_p, torch.float32),
            column(0, torch.float32),
            torch.arange(m, device=bench.device),
            torch.arange(m, device=bench.device),
        )

    kinds = {
        "sample, greedy": batch(0, 0, 1),
        "sample, temperature": batch(0.8, 0, 1),
        "sample, top_p": batch(0.8, 0, 0.95),
        "sample, top_k, top_p": batch(0.8, 50, 0.95),
    }
    size = 4 * m * config.vocab_size

    def run(name: str, params: SamplingBatch) -> Run:
        return bench.in_turn(
            name,
            lambda: 3 * torch.randn(m, config.vocab_size, device=bench.device),
            size,
            lambda logits: sample(logits, params),
        )

    return [(run(name, params), size) for name, params in kinds.items()]
