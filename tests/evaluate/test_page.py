"""report.html stands alone, shows what there is, and never breaks on what there is not."""

import base64
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from qoq.checkpoint.manifest import make_manifest
from qoq.evaluate.card import card
from qoq.evaluate.page import report_page
from qoq.formats.scheme import QuantScheme

ACCURACY = {
    "text": "some text",
    "windows": 4,
    "seq_len": 128,
    "source_perplexity": 40.0,
    "perplexity": 41.5,
    "tokens": 508,
    "kl_mean": 0.01,
    "kl_p99": 0.1,
    "top1_agreement": 0.95,
}


def layer(size: float) -> dict[str, Any]:
    spread = {"median": size, "p99": 2 * size, "max": 3 * size}
    ranges = dict.fromkeys(("key_range", "value_range", "o_proj_input", "down_proj_input"), spread)
    side = {"key_absmax": [size, 2 * size], **ranges}
    errors = {"mlp.up_proj": {"weight_error": 0.01 * size, "output_error": 0.002}}
    return {"before": side, "after": side, "errors": errors}


def images(page: str) -> list[bytes]:
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    return [base64.b64decode(image) for image in found]


def test_the_page_shows_everything_and_needs_nothing() -> None:
    layers = [layer(0.5 + i) for i in range(11)]  # more than are drawn in detail
    page = report_page("out", layers, {"scheme": "w4a8kv4"}, ACCURACY, "qoq quantize <m>")
    HTMLParser().feed(page)
    assert len(images(page)) == 4
    assert all(image.startswith(b"\x89PNG") for image in images(page))
    assert "http" not in page
    assert "qoq quantize &lt;m&gt;" in page
    assert "41.500" in page
    assert "95.00%" in page
    assert "0.50% / 0.20%" in page


def test_equal_data_give_equal_bytes() -> None:
    pages = [report_page("out", [layer(1)], {}, None) for _ in range(2)]
    assert pages[0] == pages[1]


def test_a_page_without_report_or_accuracy() -> None:
    page = report_page("out", [], {"scheme": "w8a8"}, None)
    assert not images(page)
    assert "Not measured" in page


def test_a_recipe_without_data_leaves_weight_errors_only() -> None:
    only = {"errors": {"mlp.up_proj": {"weight_error": 0.01}}}
    assert len(images(report_page("out", [only, {}], {}, None))) == 1


def test_the_card_names_the_sources_licence(tmp_path: Path) -> None:
    manifest = make_manifest(QuantScheme.parse("w4a8kv4"))
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# M\n", encoding="utf-8")
    text = card("out", manifest, ACCURACY, source=tmp_path, hub_id="o/m")
    assert 'license: "apache-2.0"' in text
    assert "| w4a8kv4 | 41.5000 | 0.01000 |" in text
    assert "4 windows of 128 tokens of some text" in text
    (tmp_path / "README.md").write_text("license: mit", encoding="utf-8")  # no front matter
    assert "license:" not in card("out", manifest, None, source=tmp_path)
    assert "license:" not in card("out", manifest, None, source=tmp_path / "none")
