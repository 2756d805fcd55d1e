"""Texts for tiny byte-level models: varied, and the same everywhere."""

from pathlib import Path

from helpers.tiny import write_tiny_llama

WORDS = ["the", "hat", "on", "hill", "told", "hello", "to", "hollow", "well"]


def make_text(words: int) -> str:
    return " ".join(WORDS[(i * i + i // 7) % len(WORDS)] + str(i % 97) for i in range(words))


def write_model_with_texts(folder: Path) -> Path:
    """A Llama whose sides every group size divides, heldout.txt and calibration.txt beside it."""
    write_tiny_llama(folder, hidden_size=128, intermediate_size=256, num_attention_heads=2)
    (folder / "heldout.txt").write_text(make_text(300), encoding="utf-8")
    (folder / "calibration.txt").write_text(make_text(900), encoding="utf-8")
    return folder
