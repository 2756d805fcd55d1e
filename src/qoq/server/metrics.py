"""Prometheus metrics of one server, in a registry of its own.

Names are those that other serving engines use, with our prefix, so that dashboards carry over.
"""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from qoq.engine.stats import EngineStats
from qoq.server.generation import Delta, Ticket

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKEN_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
_STEP_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
_LABEL = "model_name"


class ServerMetrics:
    """What the server counts. Written on the event loop only."""

    def __init__(
        self,
        model: str,
        *,
        kv_tokens: int,
        page_size: int,
        max_concurrency: float,
        stats: Callable[[], EngineStats],
    ) -> None:
        """``stats`` gives the engine's latest numbers; the rest are facts of the KV cache."""
        self.registry = CollectorRegistry()
        self._model = model

        def counter(name: str, what: str) -> Counter:
            full = Counter(f"qoq:{name}", what, [_LABEL], registry=self.registry)
            return full.labels(model)

        def histogram(name: str, what: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
            full = Histogram(f"qoq:{name}", what, [_LABEL], buckets=buckets, registry=self.registry)
            return full.labels(model)

        self.prompt_tokens = counter("prompt_tokens", "Tokens of the prompts of started requests.")
        self.generation_tokens = counter("generation_tokens", "New tokens.")
        self._success = Counter(
            "qoq:request_success",
            "Requests that have ended, by why they did.",
            [_LABEL, "finished_reason"],
            registry=self.registry,
        )
        self._rejections = Counter(
            "qoq:admission_rejections",
            "Requests that were turned away at the door.",
            [_LABEL, "reason"],
            registry=self.registry,
        )
        self.time_to_first_token = histogram(
            "time_to_first_token_seconds", "Arrival to first token."
        )
        self.inter_token_latency = histogram(
            "inter_token_latency_seconds", "Between two tokens of a request.", _TOKEN_SECONDS
        )
        self.time_per_output_token = histogram(
            "request_time_per_output_token_seconds",
            "Mean time per token of a request after its first.",
            _TOKEN_SECONDS,
        )
        self.e2e_latency = histogram("e2e_request_latency_seconds", "Arrival to the last token.")
        self.queue_time = histogram("request_queue_time_seconds", "Arrival to admission.")
        self.inference_time = histogram(
            "request_inference_time_seconds", "Admission to the last token."
        )
        self.prefill_time = histogram(
            "request_prefill_time_seconds", "Admission to the first token."
        )
        self.decode_time = histogram(
            "request_decode_time_seconds", "First token to the last token."
        )
        self.iteration_tokens = histogram(
            "iteration_tokens_total", "Rows of a step's batch.", _STEP_TOKENS
        )
        info = Gauge(
            "qoq:cache_config_info",
            "The KV cache, as labels.",
            [_LABEL, "page_size", "kv_cache_size_tokens", "kv_cache_max_concurrency"],
            registry=self.registry,
        )
        info.labels(model, page_size, kv_tokens, f"{max_concurrency:.2f}").set(1)
        self.registry.register(_EngineNumbers(model, stats))
        for reason in ("stop", "length", "abort"):
            self._success.labels(model, reason)
        for reason in ("queue_full", "shutting_down"):
            self._rejections.labels(model, reason)

    def ended(self, reason: str) -> None:
        """A request has ended with finish reason ``reason``."""
        self._success.labels(self._model, reason).inc()

    def rejected(self, reason: str, count: int = 1) -> None:
        """``count`` requests were not let in."""
        self._rejections.labels(self._model, reason).inc(count)

    def observe(self, ticket: Ticket, delta: Delta) -> None:
        """Times and counts of what is new of one text."""
        new, admitted = len(delta.token_ids), delta.admitted_at or delta.at
        if ticket.first_token_at is None and new:
            ticket.first_token_at = delta.at
            self.prompt_tokens.inc(len(ticket.prompt_ids))
            self.time_to_first_token.observe(delta.at - ticket.arrived_at)
            self.queue_time.observe(max(0.0, admitted - ticket.arrived_at))
            self.prefill_time.observe(delta.at - admitted)
        elif new:
            for _ in range(new):
                self.inter_token_latency.observe((delta.at - ticket.last_token_at) / new)
        self.generation_tokens.inc(new)
        ticket.num_tokens += new
        ticket.last_token_at = delta.at
        if delta.finish_reason is not None:
            first = ticket.first_token_at or delta.at
            self.e2e_latency.observe(delta.at - ticket.arrived_at)
            self.inference_time.observe(delta.at - admitted)
            self.decode_time.observe(delta.at - first)
            if ticket.num_tokens > 1:
                self.time_per_output_token.observe((delta.at - first) / (ticket.num_tokens - 1))

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)


class _EngineNumbers(Collector):
    """The engine counts for itself; here its latest picture is turned into metrics."""

    def __init__(self, model: str, stats: Callable[[], EngineStats]) -> None:
        self._model = model
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        now = self._stats()
        gauges = (
            ("num_requests_running", "Requests that run.", now.running),
            ("num_requests_waiting", "Requests that wait to run.", now.waiting),
            ("kv_cache_usage_perc", "Share of the KV pages in use, 0 to 1.", now.kv_usage),
        )
        counters = (
            ("num_preemptions", "Requests sent back to wait.", now.preemptions),
            ("prefix_cache_queries", "Prompt tokens looked up.", now.prefix_queries),
            ("prefix_cache_hits", "Prompt tokens found.", now.prefix_hits),
            ("spec_decode_num_drafts", "Times anything was guessed.", now.drafts),
            ("spec_decode_num_draft_tokens", "Tokens guessed.", now.draft_tokens),
            ("spec_decode_num_accepted_tokens", "Of these, new tokens.", now.accepted_tokens),
        )
        for name, what, value in gauges:
            gauge = GaugeMetricFamily(f"qoq:{name}", what, labels=[_LABEL])
            gauge.add_metric([self._model], value)
            yield gauge
        for name, what, value in counters:
            counter = CounterMetricFamily(f"qoq:{name}", what, labels=[_LABEL])
            counter.add_metric([self._model], value)
            yield counter
