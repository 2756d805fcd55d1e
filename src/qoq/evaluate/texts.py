"""Texts to judge a model on, as windows of token ids (QServe section 6.2).

A text is encoded once, the way the tokenizer encodes by itself (a BOS at its very beginning where
the model's tokenizer adds one), and cut into windows without overlap; the last partial one is
dropped. WikiText-2 is joined as the papers do, rows with a blank line between.
"""

import lzma
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qoq.errors import TextError
from qoq.quantize.calibration import bounded_text
from qoq.tokenizer import Tokenizer

# Dataset name -> file names it may have beside a model.
BESIDE = {
    "wikitext2": ("wikitext2-test.txt", "wikitext2-test.txt.xz"),
    "heldout": ("heldout.txt", "heldout.txt.xz"),
}
_HUB = {"wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1")}


@dataclass(frozen=True)
class Text:
    """A text and what to call it in tables."""

    name: str
    content: str


def read_text(path: str | Path) -> Text:
    """A UTF-8 .txt or .txt.xz file. Raises TextError if it cannot be read or is empty."""
    path = Path(path)
    try:
        content, _ = bounded_text(path)
    except FileNotFoundError:
        raise TextError(f"There is no text file {path}.") from None
    except (OSError, lzma.LZMAError, EOFError, UnicodeDecodeError) as error:
        raise TextError(f"{path} cannot be read as UTF-8 text ({error}).") from error
    if not content.strip():
        raise TextError(f"{path} holds no text.")
    content = content.replace("\r\n", "\n").replace("\r", "\n")  # as text files are read
    return Text(path.name.removesuffix(".xz").removesuffix(".txt"), content)


def find_dataset(name: str, *folders: Path) -> Text:
    """A dataset by name: a file beside one of the models in ``folders``, else from the hub.

    ``wikitext2`` and ``heldout`` may lie in a model's folder (as in examples/books-llama);
    ``wikitext2`` and ids like ``owner/name`` or ``owner/name:config`` come from the hub through
    the optional ``datasets`` package, test split, field "text". Raises TextError.
    """
    for folder in folders:
        for file in BESIDE.get(name, ()):
            if (folder / file).is_file():
                content = read_text(folder / file).content
                return Text(name, _joined(content) if name == "wikitext2" else content)
    if name == "heldout":
        looked = ", ".join(str(folder) for folder in folders)
        raise TextError(
            f"There is no heldout.txt beside the model ({looked}); give a file with --text."
        )
    repo, _, config = name.partition(":")
    repo, config = _HUB.get(name, (repo, config))
    return Text(name, _read_hub(name, repo, config))


def windows(text: Text, tokenizer: Tokenizer, seq_len: int, limit: int | None = None) -> Tensor:
    """int64 [n, seq_len]: the first ``limit`` (None: all) whole windows of the text.

    Raises TextError where there is not even one.
    """
    if seq_len < 2:
        raise TextError(f"Windows need at least 2 tokens, not {seq_len}.")
    if limit is not None and limit < 1:
        raise TextError(f"At least 1 window is needed, not {limit}.")
    ids = torch.tensor(tokenizer.encode(text.content), dtype=torch.int64)
    count = len(ids) // seq_len
    if count < 1:
        raise TextError(
            f"{text.name} has {len(ids)} tokens, less than one window of {seq_len}; use a longer "
            "text or a smaller --seq-len."
        )
    return ids[: count * seq_len].reshape(count, seq_len)[:limit].contiguous()


def _joined(raw: str) -> str:
    """The raw file as the hub's rows (blank lines are empty rows), joined as GPTQ does."""
    lines = raw.removesuffix("\n").split("\n")
    return "\n\n".join(f"{line}\n" if line.strip() else "" for line in lines)


def _read_hub(name: str, repo: str, config: str) -> str:
    try:
        from datasets import load_dataset  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise TextError(
            f"The dataset {name} is not beside the model. Give a file with --text, or "
            "`pip install datasets` to fetch it from the hub."
        ) from None
    try:
        rows = load_dataset(repo, config or None, split="test")
        content = "\n\n".join(rows["text"])
    except Exception as error:  # the library raises its own, network and OS errors alike
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TextError(f"The dataset {name} could not be read from the hub ({first}).") from error
    if not content.strip():
        raise TextError(f"The dataset {name} holds no text.")
    return content
