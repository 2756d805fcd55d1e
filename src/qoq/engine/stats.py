"""EngineStats: what an engine holds now and what it has counted, as plain numbers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineStats:
    """A picture of the engine between two steps.

    num_running and num_waiting are requests; pages are KV pages, all of them and those in use.
    step_tokens: rows of the last step's batch. Counts since the engine was made: num_preemptions;
    prefix_cache_queries and prefix_cache_hits, in prompt tokens looked up and found.
    """

    num_running: int
    num_waiting: int
    num_pages: int
    num_pages_used: int
    step_tokens: int = 0
    num_preemptions: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0

    @property
    def kv_usage(self) -> float:
        """Share of the KV pages in use, 0 to 1."""
        return self.num_pages_used / self.num_pages
