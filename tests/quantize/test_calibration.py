"""Calibration windows: seeded, without overlap, digested; every bad text has its own sentence."""

import builtins
import json
import lzma
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.quantizing import random_text
from helpers.tiny import write_byte_tokenizer
from qoq.errors import CalibrationError
from qoq.quantize import calibration
from qoq.quantize.calibration import load_calibration
from qoq.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(folder)
    return Tokenizer.load(folder)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "a text.txt"
    path.write_text(random_text(3000), encoding="utf-8")
    return path


def test_windows_are_cut_from_the_text_without_overlap(text: Path, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(text.read_text())
    count = len(ids) // 64
    every = load_calibration(str(text), tokenizer, count, 64, seed=3).ids
    assert every.dtype == torch.int64
    assert every.flatten().tolist() == ids[: count * 64]
    some = load_calibration(str(text), tokenizer, count // 2, 64, seed=3).ids
    starts = [next(i for i in range(count) if torch.equal(every[i], row)) for row in some]
    assert len(set(starts)) == len(starts) == count // 2


def test_a_seed_chooses_windows(text: Path, tokenizer: Tokenizer) -> None:
    one, same, other = (load_calibration(str(text), tokenizer, 8, 64, s) for s in (1, 1, 2))
    assert torch.equal(one.ids, same.ids)
    assert one.sha256 == same.sha256
    assert not torch.equal(one.ids, other.ids)
    assert one.sha256 != other.sha256


def test_choosing_leaves_the_global_generator_alone(text: Path, tokenizer: Tokenizer) -> None:
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    load_calibration(str(text), tokenizer, 8, 64, 0)
    assert torch.equal(torch.rand(3), wanted)


def test_the_digest_covers_ids_and_shape(text: Path, tokenizer: Tokenizer) -> None:
    a = load_calibration(str(text), tokenizer, 8, 64, 0)
    count = len(tokenizer.encode(text.read_text())) // 64 // 2 * 2
    tall = load_calibration(str(text), tokenizer, count, 64, 0)
    wide = load_calibration(str(text), tokenizer, count // 2, 128, 0)
    assert torch.equal(tall.ids.flatten(), wide.ids.flatten())
    assert len({a.sha256, tall.sha256, wide.sha256}) == 3
    assert a.to_dict() == {
        "source": "a text.txt",  # a name, not where it happened to lie
        "sha256": a.sha256,
        "samples": 8,
        "seq_len": 64,
    }


def test_xz_and_jsonl_hold_the_same_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    parts = [random_text(700, seed) + "\u2028\u0085é" for seed in range(4)]
    joined = "\n\n".join(parts)
    plain, packed, lines = (tmp_path / f"t{end}" for end in (".txt", ".txt.xz", ".jsonl"))
    plain.write_text(joined, encoding="utf-8")
    packed.write_bytes(lzma.compress(joined.encode()))
    rows = [json.dumps({"text": part, "id": 7}, ensure_ascii=False) for part in parts]
    lines.write_text("\n\n".join(rows) + "\n", encoding="utf-8")
    digests = {load_calibration(str(p), tokenizer, 5, 64, 0).sha256 for p in (plain, packed, lines)}
    assert len(digests) == 1


def test_only_the_beginning_of_a_huge_text_is_read(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "MAX_BYTES", 1001)
    whole = tmp_path / "whole.txt"
    whole.write_text("é" * 5000, encoding="utf-8")  # 1001 bytes end inside a letter
    ids = load_calibration(str(whole), tokenizer, 1, 500, 0).ids
    assert tokenizer.decode(ids[0].tolist()) == "é" * 250
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"text": "e" * 80}) for _ in range(90)))
    with pytest.raises(CalibrationError, match="windows"):  # the cut row is dropped, not an error
        load_calibration(str(rows), tokenizer, 50, 64, 0)
    assert load_calibration(str(rows), tokenizer, 3, 64, 0).ids.shape == (3, 64)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("latin.txt", b"caf\xe9 " * 900),
        ("binary.txt", bytes(range(256)) * 20),
        ("damaged.txt.xz", lzma.compress(b"words " * 900)[:-20]),
        ("no.txt.xz", b"words " * 900),
        ("broken.jsonl", b'{"text": "words"}\n{"text": "wor'),
        ("fieldless.jsonl", b'{"text": "words"}\n{"content": "words"}'),
        ("list.jsonl", b'["words"]'),
        ("number.jsonl", b'{"text": 5}'),
        ("null.jsonl", b'{"text": null}'),
        ("deep.jsonl", b"[" * 100_000),
    ],
)
def test_texts_that_cannot_be_read(
    tmp_path: Path, tokenizer: Tokenizer, name: str, content: bytes
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match=f"{name}.*cannot be read.*UTF-8 .txt"):
        load_calibration(str(path), tokenizer, 1, 16, 0)


def test_a_folder_is_no_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(CalibrationError, match="cannot be read"):
        load_calibration(str(tmp_path), tokenizer, 1, 16, 0)


@pytest.mark.parametrize("content", ["", " \n\t\n"])
@pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl"])
def test_empty_texts(tmp_path: Path, tokenizer: Tokenizer, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(CalibrationError, match="holds no text"):
        load_calibration(str(tmp_path / name), tokenizer, 1, 16, 0)


def test_a_text_too_short_says_how_much_it_gives(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "short.txt"
    path.write_text("e" * 200)
    with pytest.raises(CalibrationError, match=r"3 windows of 64 tokens, 4 were asked for.*lower"):
        load_calibration(str(path), tokenizer, 4, 64, 0)
    assert load_calibration(str(path), tokenizer, 3, 64, 0).ids.shape == (3, 64)


@pytest.mark.parametrize(("samples", "seq_len"), [(0, 64), (-1, 64), (4, 15), (4, 0)])
def test_sizes_without_meaning(
    text: Path, tokenizer: Tokenizer, samples: int, seq_len: int
) -> None:
    with pytest.raises(CalibrationError, match="at least 1 sample"):
        load_calibration(str(text), tokenizer, samples, seq_len, 0)


def test_a_missing_file_without_the_datasets_package(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "datasets":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(CalibrationError, match=r"no file gone\.txt.*pip install datasets"):
        load_calibration("gone.txt", tokenizer, 1, 16, 0)


class _Datasets:
    """Stands in for the optional package."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def load_dataset(self, name: str, *, split: str, streaming: bool) -> Any:
        assert (name, split, streaming) == ("owner/texts", "train", True)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def test_hub_datasets(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": random_text(300, seed)} for seed in range(5)]
    monkeypatch.setitem(sys.modules, "datasets", _Datasets(rows))
    got = load_calibration("owner/texts", tokenizer, 4, 64, 0)
    assert got.ids.shape == (4, 64)
    for answer in (ConnectionError("no network"), [{"content": "x"}]):
        monkeypatch.setitem(sys.modules, "datasets", _Datasets(answer))
        with pytest.raises(CalibrationError, match="could not be read"):
            load_calibration("owner/texts", tokenizer, 1, 16, 0)
