"""Where texts come from, and how they are cut."""

import lzma
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from qoq.errors import TextError
from qoq.evaluate.texts import Text, find_dataset, read_text
from qoq.evaluate.texts import windows as cut
from qoq.quantize.calibration import held_back, load_calibration
from qoq.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Tokenizer:
    return Tokenizer.load(tiny)


def test_plain_and_packed_files_read_alike(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("Où?\r\nLà.\n".encode())
    with lzma.open(tmp_path / "a.txt.xz", "wb") as file:
        file.write("Où?\r\nLà.\n".encode())
    plain, packed = read_text(tmp_path / "a.txt"), read_text(tmp_path / "a.txt.xz")
    assert plain == packed == Text("a", "Où?\nLà.\n")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\xff\xfe\x00", "UTF-8"),
        ("a.txt", b" \n\n", "holds no text"),
        ("a.txt.xz", b"no xz", "cannot be read"),
    ],
)
def test_bad_files_are_one_sentence(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TextError, match=message):
        read_text(tmp_path / name)


def test_a_truncated_xz_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(b"words " * 1000)[:-20])
    with pytest.raises(TextError, match="cannot be read"):
        read_text(tmp_path / "a.txt.xz")


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="There is no text file"):
        read_text(tmp_path / "none.txt")
    with pytest.raises(TextError, match="cannot be read"):
        read_text(tmp_path)


def test_datasets_beside_a_model(tmp_path: Path) -> None:
    near, far = tmp_path / "near", tmp_path / "far"
    near.mkdir()
    far.mkdir()
    (far / "heldout.txt").write_text("far", encoding="utf-8")
    assert find_dataset("heldout", near, far) == Text("heldout", "far")
    (near / "heldout.txt").write_text("near", encoding="utf-8")
    assert find_dataset("heldout", near, far) == Text("heldout", "near")
    with pytest.raises(TextError, match=r"no heldout\.txt beside"):
        find_dataset("heldout", tmp_path)


def test_wikitext_is_joined_as_the_papers_do(tmp_path: Path) -> None:
    (tmp_path / "wikitext2-test.txt").write_bytes(b" \r\n = A = \r\n \r\n One \x0b two .\r\n")
    text = find_dataset("wikitext2", tmp_path)
    # The hub's rows are "", " = A = \n", "", " One \x0b two .\n"; joined by blank lines.
    assert text.content == "\n\n = A = \n\n\n\n\n One \x0b two .\n"


def test_without_the_datasets_package_the_error_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TextError, match="pip install datasets"):
        find_dataset("wikitext2", tmp_path)


def test_hub_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, config: str | None, split: str) -> dict[str, list[str]]:
        asked.append((name, config, split))
        if name == "o/broken":
            raise ConnectionError("no way\nthere")
        return {"text": [] if name == "o/empty" else ["a", "", "b"]}

    fake = ModuleType("datasets")
    fake.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert find_dataset("wikitext2", tmp_path).content == "a\n\n\n\nb"
    assert find_dataset("o/d:c", tmp_path).name == "o/d:c"
    find_dataset("o/d", tmp_path)
    assert asked == [
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
        ("o/d", "c", "test"),
        ("o/d", None, "test"),
    ]
    with pytest.raises(TextError, match=r"\(no way\)"):
        find_dataset("o/broken", tmp_path)
    with pytest.raises(TextError, match="holds no text"):
        find_dataset("o/empty", tmp_path)


def test_windows_do_not_overlap_and_the_rest_is_dropped(tokenizer: Tokenizer) -> None:
    text = Text("t", "hello world, " * 20)
    ids = tokenizer.encode(text.content)
    got = cut(text, tokenizer, 9)
    assert got.shape == (len(ids) // 9, 9)
    assert got.flatten().tolist() == ids[: got.numel()]
    assert len(ids) % 9, "the test needs a rest to drop"
    assert torch.equal(cut(text, tokenizer, 9, 2), got[:2])
    assert torch.equal(cut(text, tokenizer, 9, 10_000), got)


def test_a_bos_comes_once_and_only_where_the_tokenizer_adds_it() -> None:
    class WithBos(Tokenizer):
        def encode(self, text: str, *, special: bool = True) -> list[int]:
            return [1, *map(ord, text)] if special else list(map(ord, text))

    got = cut(Text("t", "abcdef"), WithBos(None), 3)
    assert got.tolist() == [[1, 97, 98], [99, 100, 101]]


def test_windows_that_cannot_be_cut(tokenizer: Tokenizer) -> None:
    text = Text("t", "hello")
    for seq_len, limit, message in [(50, None, "less than"), (1, None, "2"), (2, 0, "1 window")]:
        with pytest.raises(TextError, match=message):
            cut(text, tokenizer, seq_len, limit)


def test_held_back_windows_were_not_drawn(tiny: Path, tokenizer: Tokenizer) -> None:
    source = str(tiny / "calibration.txt")
    used = load_calibration(source, tokenizer, 5, 32, 3).ids
    held = held_back(source, tokenizer, 5, 32, 3, 4)
    assert held is not None
    assert held.shape == (4, 32)
    assert not {tuple(w) for w in held.tolist()} & {tuple(w) for w in used.tolist()}
    total = len(tokenizer.encode((tiny / "calibration.txt").read_text("utf-8"))) // 32
    few = held_back(source, tokenizer, total - 1, 32, 3, 4)
    assert few is not None
    assert few.shape == (1, 32)
    assert held_back(source, tokenizer, total, 32, 3, 4) is None
