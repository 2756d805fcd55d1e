"""EngineStats: an engine's gauges and counters at one moment, for benches, logs and metrics."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class EngineStats:
    """Gauges: requests that run and wait, KV pages in use and in all, step_tokens (rows of the last
    step's batch). Counters, which only grow:
    prefix_queries, prefix_hits (prompt tokens looked for and found in the prefix cache),
    drafts (times anything was guessed), draft_tokens, accepted_tokens (ids guessed, and new ids
    that came of them, beside the one that each step gives), preemptions, prompt_tokens (of prompts
    that are read), generation_tokens, steps, and the requests that have ended, by
    ``finish_reason``.
    """

    running: int
    waiting: int
    kv_pages_used: int
    kv_pages_total: int
    prefix_queries: int
    prefix_hits: int
    drafts: int
    draft_tokens: int
    accepted_tokens: int
    preemptions: int
    prompt_tokens: int
    generation_tokens: int
    steps: int
    step_tokens: int
    finished: dict[str, int]

    @property
    def kv_usage(self) -> float:
        """Share of the KV pages that is in use, 0..1."""
        return self.kv_pages_used / self.kv_pages_total if self.kv_pages_total else 0.0

    def to_dict(self) -> dict[str, object]:
        return asdict(self)
