"""Calibration text to token windows: seeded, digested, never downloaded unasked (QServe 6.1)."""

import hashlib
import json
import lzma
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qoq.errors import CalibrationError
from qoq.tokenizer import Tokenizer

BUILT_IN = "built-in"
_TOO_FEW = "Calibration needs at least 1 sample of at least 16 tokens."
MAX_BYTES = 64 << 20  # of a text; what lies beyond is not read
# What reading a file that is damaged, or is something else, may raise.
_UNREADABLE = (OSError, EOFError, lzma.LZMAError, ValueError, KeyError, TypeError, RecursionError)


@dataclass(frozen=True)
class Calibration:
    """ids int64 [samples, seq_len]; ``source`` as given; ``sha256`` of the ids and their shape."""

    ids: Tensor
    source: str
    sha256: str

    def to_dict(self) -> dict[str, Any]:
        """What a checkpoint records of it."""
        samples, seq_len = self.ids.shape
        return {
            "source": Path(self.source).name,
            "sha256": self.sha256,
            "samples": samples,
            "seq_len": seq_len,
        }


def load_calibration(
    source: str, tokenizer: Tokenizer, samples: int, seq_len: int, seed: int
) -> Calibration:
    """``samples`` windows of ``seq_len`` tokens, drawn without overlap by ``seed``.

    source: "built-in" (public-domain prose shipped with the package), a .txt, .txt.xz or .jsonl
    file ("text" fields), or the id of a hub dataset (needs the ``datasets`` package). Raises
    CalibrationError if it cannot be read or is too short.
    """
    if samples < 1:
        raise CalibrationError(_TOO_FEW)
    windows, order = _windows(source, tokenizer, seq_len, seed)
    if len(windows) < samples:
        raise CalibrationError(
            f"{source} gives {len(windows)} windows of {seq_len} tokens, {samples} were asked for. "
            "Use a longer text, or lower --samples or --seq-len."
        )
    windows = windows[order[:samples].sort().values].contiguous()
    digest = hashlib.sha256(repr(tuple(windows.shape)).encode() + windows.numpy().tobytes())
    return Calibration(windows, source, digest.hexdigest())


def held_back(
    source: str, tokenizer: Tokenizer, samples: int, seq_len: int, seed: int, limit: int
) -> Tensor | None:
    """int64 [n <= limit, seq_len]: windows ``load_calibration`` would draw after its ``samples``.

    None where the text has no more windows than that, or cannot be calibrated on at all.
    """
    try:
        windows, order = _windows(source, tokenizer, seq_len, seed)
    except CalibrationError:
        return None
    seen = {row.numpy().tobytes() for row in windows[order[:samples]]}
    more = windows[order[samples : samples + limit].sort().values]
    left = [row for row in more if row.numpy().tobytes() not in seen]
    return torch.stack(left) if left else None


def _windows(source: str, tokenizer: Tokenizer, seq_len: int, seed: int) -> tuple[Tensor, Tensor]:
    """All whole windows int64 [n, seq_len] of a text, and the seeded order they are drawn in."""
    if seq_len < 16:
        raise CalibrationError(_TOO_FEW)
    ids = torch.tensor(tokenizer.encode(_read(source)), dtype=torch.int64)
    count = len(ids) // seq_len
    generator = torch.Generator().manual_seed(seed)
    windows = ids[: count * seq_len].reshape(count, seq_len)
    return windows, torch.randperm(count, generator=generator)


def bounded_text(path: Path) -> tuple[str, bool]:
    """UTF-8 text of a file, unpacked if .xz, and whether it was cut at MAX_BYTES.

    Raises OSError, LZMAError, EOFError or UnicodeDecodeError for what cannot be read.
    """
    with lzma.open(path) if path.suffix == ".xz" else path.open("rb") as file:
        data = file.read(MAX_BYTES)
    cut = len(data) == MAX_BYTES
    return data.decode("utf-8", errors="ignore" if cut else "strict"), cut


def _read(source: str) -> str:
    if source == BUILT_IN:
        packed = files("qoq.quantize").joinpath("calibration.txt.xz").read_bytes()
        return lzma.decompress(packed).decode("utf-8")
    path = Path(source)
    if not path.exists():
        return _read_dataset(source)
    try:
        text, cut = bounded_text(path)
        if path.suffix == ".jsonl":
            lines = text.split("\n")  # not splitlines: U+2028 and the like may stand in a string
            rows = [json.loads(line) for line in lines[: -1 if cut else None] if line.strip()]
            text = "\n\n".join(row["text"] for row in rows)
    except _UNREADABLE as error:
        raise CalibrationError(
            f"{path} cannot be read as calibration text ({error}). Give a UTF-8 .txt file, or "
            'a .jsonl file with a "text" field on every line.'
        ) from error
    if not text.strip():
        raise CalibrationError(f"{path} holds no text.")
    return text


def _read_dataset(name: str) -> str:
    try:
        from datasets import load_dataset  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise CalibrationError(
            f"There is no file {name}. If it is a hub dataset, `pip install datasets` first."
        ) from None
    try:
        rows = load_dataset(name, split="train", streaming=True)
        parts: list[str] = []
        size = 0
        for row in rows:
            parts.append(row["text"])
            size += len(parts[-1])
            if size > MAX_BYTES // 8:
                break
    except Exception as error:  # the library raises its own, network and OS errors alike
        raise CalibrationError(
            f"There is no file {name}, and the dataset {name} could not be read ({error})."
        ) from error
    return "\n\n".join(parts)
