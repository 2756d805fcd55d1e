"""How big the KV cache is: bytes given or a share of what is free, never more than is of use."""

from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from qoq.errors import RequestError, ResourceError
from qoq.formats.kv import page_bytes
from qoq.formats.scheme import KVFormat
from qoq.kvcache.pool import KVPool, pages_for_budget, pages_for_tokens

MEMORY_FRACTION = 0.8


@dataclass(frozen=True)
class PoolShape:
    """What a page is made of: ``num_layers`` layers, ``num_kv_heads`` heads of ``head_dim``
    channels and ``page_size`` tokens; ``dtype`` is that of 16-bit (unquantized) entries.
    """

    format: KVFormat
    num_layers: int
    num_kv_heads: int
    page_size: int
    head_dim: int
    dtype: torch.dtype = torch.float32

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all layers."""
        sizes = (self.num_kv_heads, self.page_size, self.head_dim, self.dtype.itemsize)
        return self.num_layers * page_bytes(self.format, *sizes)

    def pages(
        self,
        *,
        max_requests: int,
        max_model_len: int,
        kv_cache_memory_bytes: int | None = None,
        memory_fraction: float = MEMORY_FRACTION,
        device: torch.device | str = "cpu",
    ) -> int:
        """Pages that ``kv_cache_memory_bytes`` hold (None: ``memory_fraction`` of the memory free
        now), but no more than max_requests requests of max_model_len tokens can fill.

        Raises RequestError for a fraction outside 0..1 and ResourceError where not even one request
        of max_model_len tokens fits.
        """
        if not 0 < memory_fraction <= 1:
            raise RequestError(
                f"memory_fraction must be above 0 and at most 1, not {memory_fraction}."
            )
        budget = kv_cache_memory_bytes
        if budget is None:
            budget = int(memory_at_hand(device) * memory_fraction)
        fit = pages_for_budget(
            budget,
            self.format,
            self.num_layers,
            self.num_kv_heads,
            self.page_size,
            self.head_dim,
            self.dtype,
        )
        least = pages_for_tokens(max_model_len, self.page_size)
        if fit < least:
            raise ResourceError(
                f"The KV cache of one request of {max_model_len} tokens takes "
                f"{least * self.page_bytes:,} bytes; {budget:,} are given, which hold "
                f"{fit * self.page_size} tokens. Give the cache more memory or lower max_model_len."
            )
        return min(fit, max_requests * least)

    def pool(self, num_pages: int, device: torch.device | str = "cpu") -> KVPool:
        """A pool of this many pages."""
        return KVPool(
            self.format,
            num_layers=self.num_layers,
            num_pages=num_pages,
            num_kv_heads=self.num_kv_heads,
            page_size=self.page_size,
            head_dim=self.head_dim,
            device=device,
            dtype=self.dtype,
        )


def memory_at_hand(
    device: torch.device | str = "cpu", cgroup: Path = Path("/sys/fs/cgroup")
) -> int:
    """Bytes this process may still take on ``device``: free memory, or what its cgroup leaves."""
    where = torch.device(device)
    if where.type == "cuda":
        # What torch holds for later counts as free: it is what it gives out first.
        kept = torch.cuda.memory_reserved(where) - torch.cuda.memory_allocated(where)
        return int(torch.cuda.mem_get_info(where)[0]) + kept
    available = int(psutil.virtual_memory().available)
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
        lines = (cgroup / "memory.stat").read_text().splitlines()
    except OSError:
        return available
    # The page cache counts as used, but gives way: a model just downloaded is no obstacle.
    cache = {name: int(size) for name, size in (line.split() for line in lines)}
    used -= cache.get("inactive_file", 0) + cache.get("active_file", 0)
    return available if limit == "max" else max(0, min(available, int(limit) - used))
