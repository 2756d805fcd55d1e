"""Every part of the check yields rows that its table can print."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.tiny import write_tiny_llama
from qoq.bench import throughput
from qoq.bench.gpu import (
    attention,
    bits,
    ceilings,
    environment,
    gemm,
    model,
    row_kernels,
    subnormal,
    tests,
)
from qoq.bench.gpu.bench import Bench, Row
from qoq.bench.gpu.parts import NEED_CEILINGS, PARTS
from qoq.engine.request import Logprob, Request, SamplingParams
from qoq.formats.kv import page_bytes
from qoq.formats.scheme import KVFormat
from qoq.models.config import ModelConfig
from qoq.models.decoder import Decoder


def text(part: str, rows: Sequence[Row]) -> str:
    """What people see of rows that have been through a file."""
    return "\n".join(PARTS[part].lines([json.loads(json.dumps(row)) for row in rows]))


def test_names_order_and_time() -> None:
    names = "env ceilings subnormal tests bits gemm attention rows model"
    assert list(PARTS) == names.split()
    assert sum(part.seconds + part.warm_seconds for part in PARTS.values()) <= 8 * 60
    assert set(NEED_CEILINGS) < set(PARTS)


def test_env(bench: Bench) -> None:
    rows = list(environment.rows(bench))
    facts = {row["fact"]: row["value"] for row in rows}
    assert facts["torch"] == torch.__version__
    assert "op linear" in facts
    assert "triton" in text("env", rows)


def test_ceilings(bench: Bench) -> None:
    rows = list(ceilings.rows(bench, buffer=1 << 12, sides=(64,)))
    moves = {row["system"]: row.get("bytes_per_s") for row in rows[:3]}
    assert moves == {
        "copy": pytest.approx(2 * 4096 / 1e-6),
        "read": pytest.approx(4096 / 2e-6),
        "read, our kernel": pytest.approx(4096 / 3e-6),
    }
    products = {row["system"]: row for row in rows[3:]}
    assert set(products) == {"torch bf16", "torch int8", "torch fp8", "ours w8a8"}
    assert products["torch bf16"]["ops_per_s"] == pytest.approx(2 * 64**3 / 1e-6)
    best = ceilings.measured(rows)
    assert best is not None
    assert best.read == moves["copy"]
    assert best.int8 == pytest.approx(2 * 64**3 / 2e-6)
    assert best.seconds(best.read * 3, best.int8 * 2) == pytest.approx(3)
    assert ceilings.measured(rows[:3]) is None
    assert "TB/s" in text("ceilings", rows)


@pytest.mark.parametrize("count", [1, 8192, 8193, 20_000])
def test_read_all_reads_all(bench: Bench, count: int) -> None:
    source = torch.randint(-1000, 1000, (count,), dtype=torch.int32)
    assert ceilings.read_all(source).sum() == source.sum()


def test_subnormal(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = list(subnormal.rows(bench))
    assert len(rows) == 2 * len(subnormal.SHAPES)
    assert not subnormal.failed(rows)
    assert "exact" in text("subnormal", rows)
    flushed = [{**rows[0], "wrong": 7}]
    assert subnormal.failed(flushed)
    assert "NOT exact" in text("subnormal", flushed)


def test_bits(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [(1, 40, 64), (5, 300, 160), (17, 8, 128)]
    rows = list(bits.rows(bench, sizes))
    assert len(rows) == 10  # groups of 128 do not fit 64 and 160
    assert not bits.failed(rows)
    assert all(row["wrong_cpu"] == 0 for row in rows)
    made: list[bits.Size] = []
    with monkeypatch.context() as patch:
        patch.setattr(bits, "cases", lambda: [("int8", size) for size in sizes])
        patch.setattr(bits, "_sums", lambda bench, name, size: made.append(size))
        for share in range(2):
            bits.warm(bench, share, 2)
    assert sorted(made) == sorted(sizes)
    monkeypatch.setattr(bits, "int_matmul", lambda a, w: (a.long() @ w.long().T).int() + 1)
    wrong = list(bits.rows(bench, sizes[:1]))
    assert bits.failed(wrong)
    assert wrong[0]["wrong"] == 40
    assert "DIFFER" in text("bits", wrong)


def test_gemm(bench: Bench) -> None:
    real = gemm.cases()
    assert len(real) == 2 * 4 * len(gemm.ROWS)
    assert gemm.Case("llama-3-8b", "gate_up_proj", 28672, 4096, 64) in real
    cases = [gemm.Case("tiny", "qkv_proj", 64, 256, m) for m in (1, 32)]
    rows = list(gemm.rows(bench, cases))
    assert [row["system"] for row in rows[:3]] == list(gemm.OURS)
    first = rows[0]
    moved = 64 * 256 / 2 + 64 * 4 + 64 * 2 * 2 + 1 * 256 + 4 * 1 * 64
    assert first["floor_us"] == pytest.approx(1e6 * max(moved / 1e12, 2 * 64 * 256 / 1e15))
    assert first["of_floor"] == pytest.approx(first["floor_us"] / first["us"])
    few = next(row for row in rows if row["system"] == "torch int8")
    assert "17 rows" in few["missing"]
    table = text("gemm", rows).splitlines()
    assert sum("tiny qkv_proj" in line for line in table) == 2
    assert sum("no torch int8 (1x)" in line for line in table) == 1


def test_gemm_warms_every_case_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [gemm.Case("tiny", "o_proj", 32 * i, 128, i) for i in range(1, 6)]
    seen: list[tuple[int, tuple[int, int]]] = []
    monkeypatch.setattr(gemm, "cases", lambda: cases)
    monkeypatch.setattr(gemm, "linear", lambda x, w: seen.append((len(x.codes), w.shape)))
    for share in range(3):
        gemm.warm(bench, share, 3)
    assert sorted(seen) == sorted(3 * [(c.m, (c.n, c.k)) for c in cases])


def test_attention(bench: Bench, small: ModelConfig) -> None:
    assert all(case.batch * case.context <= attention.MOST_TOKENS for case in attention.cases())
    cases = attention.cases([1, 3], [70], 20)
    assert [(case.batch, case.queries) for case in cases] == [(1, 20), (1, 1), (3, 1)]
    rows = list(attention.rows(bench, cases, small))
    assert [row["system"] for row in rows[:3]] == ["kv4", "kv8", attention.SDPA]
    assert "of_floor" not in rows[0]
    prompt = 20 * 50 + 20 * 21 / 2
    assert rows[0]["tflops"] == pytest.approx(4 * 2 * 64 * prompt / 1 / 1e6)
    last = rows[-3]
    moved = 3 * 70 * page_bytes(KVFormat(4, 4), 1, 64, 64) / 64
    assert last["floor_us"] == pytest.approx(moved / 1e12 * 1e6)
    assert "missing" not in rows[2]
    table = text("attention", rows)
    assert len(table.splitlines()) == 4
    assert "batch   3, context    70" in table


def test_attention_warms_every_case(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(attention, "random_pages", lambda kv, num, *_, device: (kv, num))

    def watched(q: torch.Tensor, pages: tuple[KVFormat, int], *_: object, **__: object) -> None:
        seen.append((len(q), pages[0].k_bits))

    monkeypatch.setattr(attention, "attention", watched)
    monkeypatch.setattr(attention, "cases", lambda: [attention.Case(2, 64, 1)])
    for share in range(2):
        attention.warm(bench, share, 2)
    assert sorted(seen) == [(2, 4), (2, 8)]


def test_rows(bench: Bench, small: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = list(row_kernels.rows(bench, (1, 300), small))
    assert not [row for row in rows if "missing" in row]
    assert len({row["system"] for row in rows}) == 8
    assert {row["M"] for row in rows if row["system"].startswith("sample")} == {1}
    norm = rows[0]
    assert norm["floor_us"] == pytest.approx(13 * 128 / 1e12 * 1e6)
    table = text("rows", rows)
    assert len(table.splitlines()) == 9
    monkeypatch.setattr(row_kernels, "config_of", lambda *_: small)
    for share in range(8):
        row_kernels.warm(bench, share, 8)


@pytest.mark.parametrize(
    ("part", "ours", "peer"),
    [
        ("ceilings", "ours w8a8", "torch fp8"),
        ("gemm", "ours w4a8-g128", "torch int4"),
        ("attention", "kv8", attention.SDPA),
    ],
)
def test_ours_may_not_be_missing(part: str, ours: str, peer: str) -> None:
    about = {"model": "m", "linear": "l", "M": 1, "batch": 1, "context": 1, "queries": 1}
    rows = [{**about, "system": peer, "missing": "NotImplementedError: no such thing"}] * 2
    assert not PARTS[part].failed(rows)
    small = {**about, "system": ours, "missing": "OutOfMemoryError: of 24 GB"}
    assert not PARTS[part].failed([*rows, small])
    assert PARTS[part].failed([*rows, {**small, "missing": "CompilationError: at 3:7"}])
    assert "no such thing" in text(part, rows)


def test_no_row_kernel_may_be_missing() -> None:
    rows = [{"system": "sample, greedy", "M": 1, "missing": "CompilationError: at 3:7"}]
    assert PARTS["rows"].failed(rows)
    assert "CompilationError" in text("rows", rows)


def test_model_greedy(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_llama(tmp_path)
    (tmp_path / "heldout.txt").write_text("the hello world " * 200, encoding="utf-8")
    monkeypatch.setattr(model, "NEW_TOKENS", 6)
    monkeypatch.setattr(model, "PROMPTS", 2)
    monkeypatch.setattr(model, "SCHEME", "w4a8kv4-g32")
    rows = list(model.greedy(bench, tmp_path))
    assert [row["backend"] for row in rows][:1] == ["oracle"]
    assert all(row["tokens"] == 12 for row in rows)
    assert rows[0]["same_until_parted"] == 12
    assert rows[0]["parted"] == []
    assert not model.failed(rows)
    assert "12 of 12 tokens" in text("model", rows)
    assert model.failed(list(model.greedy(bench, tmp_path / "nowhere")))


def test_model_compares_until_texts_part() -> None:
    def request(ids: Sequence[int], gaps: Sequence[float]) -> Request:
        params = SamplingParams(max_tokens=9, ignore_eos=True)
        made = Request([1], params, max_length=9, eos_ids=())
        for token, gap in zip(ids, gaps, strict=True):
            top = {token: Logprob(-1.0, 1), 99: Logprob(-1.0 - gap, 2)}
            made.accept(token, -1.0, top)
        return made

    truth = [request([5, 6, 7], [1, 0.001, 1]), request([8, 9], [1, 2.0]), request([4], [1])]
    texts = [request([5, 3, 7], [1] * 3), request([8, 1], [1] * 2), request([4], [1])]
    found = model.compare(texts, truth)
    assert (found["tokens"], found["same_until_parted"]) == (6, 1 + 1 + 1)
    assert (found["ties"], found["wrong"]) == (1, 1)
    assert [(one["prompt"], one["token"]) for one in found["parted"]] == [(0, 1), (1, 1)]
    assert model.failed([found])
    assert found["apart"] == 0
    far = model.compare([request([4], [1])], truth[2:])
    assert not model.failed([far])
    assert model.failed([{**far, "apart": 0.2}])
    truth[2].logprobs[0] -= 0.5
    assert model.compare([request([4], [1])], truth[2:])["apart"] == pytest.approx(0.5)


def test_model_speed(bench: Bench, small: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "config_of", lambda shape, layers=None: small)
    row = model.speed(bench, "small", 2, True, prompt_len=9, output_len=4)
    assert (row["shape"], row["batch"], row["eager"]) == ("small", 2, True)
    assert row["decode_tok_s"] > 0
    assert "batch   2 eager" in text("model", [row])
    monkeypatch.setattr(model, "SPEED", (("small", 1, False), ("small", 1, True)))
    monkeypatch.setattr(model, "PROMPT_LEN", 8)
    ran: list[int] = []
    run = throughput.run

    def watched(decoder: Decoder, *args: Any, **named: Any) -> throughput.Throughput:
        ran.append(decoder.config.num_layers)
        return run(decoder, *args, **{**named, "prompt_len": 8, "batch": 1})

    monkeypatch.setattr(throughput, "run", watched)
    for share in range(2):
        model.warm(bench, share, 2)
    assert ran == [small.num_layers, 1]  # the shape once, and the bundled model


def test_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    folder = tmp_path / "some"
    folder.mkdir()
    (folder / "test_it.py").write_text(
        "import os, pytest\n"
        "def test_good():\n"
        "    assert os.environ['QOQ_NO_MACHINE_CODE']\n"
        "    assert os.environ['OMP_NUM_THREADS'] == '1'\n"
        "def test_bad(): assert 1 == 2, 'one is not two'\n"
        "def test_left(): pytest.skip('why not')\n"
    )
    rows = list(tests.rows(tmp_path, "some", seconds=60))
    assert rows[-1] == {"passed": 1, "failed": 1, "skipped": 1}
    assert tests.failed(rows)
    told = text("tests", rows)
    assert "1 passed, 1 failed, 1 skipped" in told
    assert "test_bad" in told
    assert "one is not two" in told
    assert not tests.failed(rows[-1:])


def test_tests_that_hang_or_are_not_there(tmp_path: Path) -> None:
    assert tests.failed(list(tests.rows(tmp_path, "nowhere", seconds=1)))
    (tmp_path / "test_it.py").write_text(
        "import time\ndef test_bad(): raise ValueError\ndef test_long(): time.sleep(60)\n"
    )
    rows = list(tests.rows(tmp_path, ".", seconds=8))
    assert "stopped after 8 s" in rows[0]["problem"]
    assert rows[1]["test"].endswith("test_bad")  # what was known by then is not lost
    assert rows[2] == {"passed": 0, "failed": 1, "skipped": 0}
    assert tests.failed(rows)
    assert "stopped" in text("tests", rows)


def test_tests_that_cannot_be_imported_or_set_up(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("import nothing_of_that_name\n")
    rows = list(tests.rows(tmp_path, ".", seconds=60))
    assert "nothing_of_that_name" in rows[0]["told"]
    assert tests.failed(rows)
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "@pytest.fixture\n"
        "def broken():\n    raise ValueError('not set up')\n"
        "def test_it(broken): pass\n"
    )
    rows = list(tests.rows(tmp_path, ".", seconds=60))
    assert "not set up" in rows[0]["message"]
    assert rows[1] == {"passed": 0, "failed": 1, "skipped": 0}
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "@pytest.fixture\n"
        "def broken():\n    yield\n    raise ValueError('not put away')\n"
        "def test_it(broken): pass\n"
    )
    rows = list(tests.rows(tmp_path, ".", seconds=60))
    assert "not put away" in rows[0]["message"]
    assert rows[1] == {"passed": 1, "failed": 1, "skipped": 0}
    (tmp_path / "test_it.py").unlink()
    assert tests.failed(list(tests.rows(tmp_path, ".", seconds=60)))
