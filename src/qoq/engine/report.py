"""What an engine starts with: its KV cache, its concurrency, and what really runs each op."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from qoq.kernels.cpu import backend as cpu
from qoq.kernels.dispatch import TWINS, describe
from qoq.kvcache.pool import KVPool


@dataclass(frozen=True)
class StartReport:
    """kv_cache_tokens = tokens the pages hold, in kv_cache_bytes; max_concurrency = requests of
    max_model_len tokens that fit at a time; ops: op -> the implementation that runs on ``device``;
    isa, threads: of the CPU kernels (None: they do not run).
    """

    kv_cache_tokens: int
    kv_cache_bytes: int
    page_size: int
    max_model_len: int
    max_requests: int
    max_concurrency: float
    device: str
    ops: dict[str, str]
    isa: str | None
    threads: int | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> Iterator[str]:
        """The report for people, a line at a time."""
        yield (
            f"KV cache: {self.kv_cache_tokens:,} tokens in pages of {self.page_size}, "
            f"{self.kv_cache_bytes / 1e9:.2f} GB"
        )
        yield (
            f"at the full context of {self.max_model_len:,} tokens {self.max_concurrency:.1f} "
            f"requests fit at a time; at most {self.max_requests} run"
        )
        if self.isa is not None:
            yield f"CPU kernels: {self.isa}, {self.threads} threads"
        for op, what in self.ops.items():
            yield f"{op:16} {what}"


def start_report(
    pool: KVPool, *, max_model_len: int, max_requests: int, backend: str = "auto"
) -> StartReport:
    """The report of an engine over this pool; ``backend`` as its ops are asked for it."""
    device = pool.layers[0].k_codes.device
    ops = dict.fromkeys(TWINS, "oracle") if backend == "oracle" else dict(describe(device))
    if pool.format.k_bits == pool.format.v_bits == 16:
        ops["attention"] = "oracle (16-bit pages)"
    native = any(what.startswith("cpu") for what in ops.values())
    shared = cpu.backend() if native else None
    return StartReport(
        kv_cache_tokens=pool.num_tokens,
        kv_cache_bytes=pool.nbytes,
        page_size=pool.page_size,
        max_model_len=max_model_len,
        max_requests=max_requests,
        max_concurrency=pool.num_tokens / max_model_len,
        device=str(device),
        ops=ops,
        isa=None if shared is None else str(shared.isa),
        threads=None if shared is None else int(shared.threads),
    )
