"""The start report: what runs here, and how much fits."""

import logging
from dataclasses import asdict
from typing import Any

from qoq import __version__
from qoq.engine import report
from qoq.engine.speculative import SpeculativeConfig
from qoq.server.logs import LogFormat
from qoq.server.model import ServedModel

_LOG = logging.getLogger("qoq.server")


def start_report(model: ServedModel) -> dict[str, Any]:
    """Facts by name: model, scheme, what runs each op, the KV cache and what it gives."""
    engine = report.start_report(
        model.pool,
        max_model_len=model.max_model_len,
        max_requests=model.max_num_seqs,
        backend=model.backend,
    )
    return {
        "qoq_version": __version__,
        "model": str(model.path),
        "architecture": model.config.architecture,
        "scheme": str(model.scheme),
        "device": model.device,
        "ops": engine.ops,
        "isa": engine.isa,
        "threads": engine.threads,
        "kv_cache_tokens": engine.kv_cache_tokens,
        "kv_cache_bytes": engine.kv_cache_bytes,
        "max_model_len": engine.max_model_len,
        "max_concurrency": round(engine.max_concurrency, 2),
        "max_num_seqs": engine.max_requests,
        "sampling_defaults": model.sampling,
        "speculative_config": model.speculative and asdict(model.speculative),
        "chat_template": model.template is not None,
        "tool_call_parser": model.tools.parser,
        "auto_tool_choice": model.tools.auto,
    }


def report_lines(facts: dict[str, Any]) -> list[str]:
    """The report for people."""
    tokens, length = facts["kv_cache_tokens"], facts["max_model_len"]
    native = f"{facts['isa']}, {facts['threads']} threads" if facts["isa"] else "none run"
    return [
        f"qoq {facts['qoq_version']}",
        f"model: {facts['model']} ({facts['architecture']}, {facts['scheme']})",
        f"device: {facts['device']}",
        *(f"{op}: {what}" for op, what in facts["ops"].items()),
        f"CPU kernels: {native}",
        f"KV cache: {tokens:,} tokens, {facts['kv_cache_bytes'] / 1e6:,.1f} MB",
        f"maximum concurrency for {length:,} tokens per request: {facts['max_concurrency']:.2f}x",
        f"requests at a time: {facts['max_num_seqs']}",
        f"sampling defaults: {_listed(facts['sampling_defaults'])}",
        f"speculative decoding: {_speculation(facts['speculative_config'])}",
        f"chat template: {'yes' if facts['chat_template'] else 'none'}",
        f"tool calls: parser {facts['tool_call_parser'] or 'none'}, "
        f"automatic tool choice {'on' if facts['auto_tool_choice'] else 'off'}",
    ]


def _speculation(config: dict[str, Any] | None) -> str:
    return "off" if config is None else str(SpeculativeConfig(**config))


def _listed(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items()) or "none"


def announce(model: ServedModel, form: LogFormat) -> None:
    """Put the report in the log: a line each, or one with all the facts for machines."""
    facts = start_report(model)
    if form == "json":
        _LOG.info("start report", extra={"facts": facts})
        return
    for line in report_lines(facts):
        _LOG.info(line)
