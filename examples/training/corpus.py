"""Texts to token ids: files, a tokenizer trained on them, windows in an order that a seed fixes."""

import json
import lzma
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"  # ids 0, 1, 2
TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


def read_texts(source: Path, separator: str | None = None) -> list[str]:
    """The texts of a ``.txt`` or ``.txt.xz`` file, or of all such files in a folder.

    ``separator`` cuts a file into several texts. Raises ValueError where there is none.
    """
    files = [source] if source.is_file() else sorted(source.glob("*.txt*"))
    texts = [text.strip() for file in files for text in _cut(_read(file), separator)]
    texts = [text for text in texts if text]
    if not texts:
        raise ValueError(
            f"{source} holds no text: give a .txt or .txt.xz file, or a folder of them"
        )
    return texts


def train_tokenizer(texts: list[str], vocab: int) -> Tokenizer:
    """A byte-level BPE tokenizer: no text is beyond it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[AddedToken(token, special=True) for token in (BOS, EOS, PAD)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """``tokenizer.json`` and ``tokenizer_config.json``."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def encode(texts: list[str], tokenizer: Tokenizer) -> Tensor:
    """int64 [n]: all texts one after the other, each between BOS and EOS."""
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    pieces = []
    for text in texts:
        # Long texts piece by piece, cut at ends of lines: far less memory.
        ids = [i for part in _parts(text) for i in tokenizer.encode(part).ids]
        pieces.append(np.array([bos, *ids, eos], dtype=np.int64))
    return torch.from_numpy(np.concatenate(pieces))


def windows(ids: Tensor, length: int, seed: int, epoch: int) -> Tensor:
    """int64 [n, length + 1]: an epoch's windows in random order, cut from a random first place.

    The last id of a window is only predicted. Raises ValueError where there is not even one.
    """
    draw = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    room = len(ids) - 1 - length
    if room < 0:
        raise ValueError(f"{len(ids)} tokens do not fill one window of {length}; give more text")
    first = int(torch.randint(min(length, room + 1), (), generator=draw))
    count = (len(ids) - 1 - first) // length
    starts = first + length * torch.randperm(count, generator=draw)
    return ids[starts[:, None] + torch.arange(length + 1)]


def _read(file: Path) -> str:
    raw = file.read_bytes()
    return (lzma.decompress(raw) if file.suffix == ".xz" else raw).decode("utf-8")


def _cut(text: str, separator: str | None) -> list[str]:
    return text.split(separator) if separator else [text]


def _parts(text: str, size: int = 1 << 20) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = text.find("\n", start + size)
        end = len(text) if end < 0 else end
        yield text[start:end]
        start = end
