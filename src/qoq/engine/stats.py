"""EngineStats: what an engine holds now and what it has counted, as plain numbers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineStats:
    """A picture of the engine between two steps.

    running and waiting are requests; pages are KV pages, all of them and those in use.
    step_tokens: rows of the last step's batch. Counts since the engine was made: preemptions;
    prefix_queries and prefix_hits, in prompt tokens looked up and found.
    """

    running: int
    waiting: int
    kv_pages_total: int
    kv_pages_used: int
    step_tokens: int = 0
    preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0

    @property
    def kv_usage(self) -> float:
        """Share of the KV pages in use, 0 to 1."""
        return self.kv_pages_used / self.kv_pages_total
