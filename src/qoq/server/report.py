"""The start report: what runs here, and how much fits."""

import logging
from typing import Any

from qoq import __version__
from qoq.kernels.dispatch import describe
from qoq.server.logs import LogFormat
from qoq.server.model import ServedModel

_LOG = logging.getLogger("qoq.server")


def start_report(model: ServedModel) -> dict[str, Any]:
    """Facts by name: model, scheme, what runs each op, the KV cache and what it gives."""
    return {
        "qoq_version": __version__,
        "model": str(model.path),
        "architecture": model.config.architecture,
        "scheme": str(model.scheme),
        "ops": _ops(model),
        "kv_cache_tokens": model.pool.num_tokens,
        "kv_cache_bytes": model.pool.nbytes,
        "max_model_len": model.max_model_len,
        "max_concurrency": round(model.max_concurrency, 2),
        "max_num_seqs": model.max_num_seqs,
        "sampling_defaults": model.sampling,
        "chat_template": model.template is not None,
    }


def report_lines(report: dict[str, Any]) -> list[str]:
    """The report for people."""
    tokens, length = report["kv_cache_tokens"], report["max_model_len"]
    return [
        f"qoq {report['qoq_version']}",
        f"model: {report['model']} ({report['architecture']}, {report['scheme']})",
        *(f"{op}: {what}" for op, what in report["ops"].items()),
        f"KV cache: {tokens:,} tokens, {report['kv_cache_bytes'] / 1e6:,.1f} MB",
        f"maximum concurrency for {length:,} tokens per request: {report['max_concurrency']:.2f}x",
        f"requests at a time: {report['max_num_seqs']}",
        f"sampling defaults: {report['sampling_defaults'] or 'none'}",
        f"chat template: {'yes' if report['chat_template'] else 'none'}",
    ]


def _ops(model: ServedModel) -> dict[str, str]:
    """What runs each op, as far as the device decides it."""
    if model.backend == "oracle":
        return {op: "oracle (asked for)" for op, _ in describe("cpu")}
    return dict(describe(model.pool.layers[0].k_codes.device))


def announce(model: ServedModel, form: LogFormat) -> None:
    """Put the report in the log: a line each, or one with all the facts for machines."""
    report = start_report(model)
    penalty = model.sampling.get("repetition_penalty", 1)
    if penalty != 1:
        _LOG.warning(
            "this model's generation_config.json asks for repetition_penalty %g, which is not "
            "supported yet and is left out",
            penalty,
        )
    if form == "json":
        _LOG.info("start report", extra={"facts": report})
        return
    for line in report_lines(report):
        _LOG.info(line)
