"""Perplexity, KL divergence and top-1 agreement of a model on windows of text (QServe 6.2).

The protocol is the paper's (and GPTQ's): non-overlapping windows, the mean cross-entropy of every
token but a window's first, no BOS put in front of windows. Keys and values go through the model's
own cache format, so a packed model is judged as it runs.
"""

import math
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from qoq.errors import TextError
from qoq.formats.kv import KVPages
from qoq.models.batch import Batch
from qoq.models.load import LoadedModel

Progress = Callable[[int, int], None]
"""progress(done, total) after every window."""

PAGE_SIZE = 64
CHUNK_BYTES = 64 << 20  # of fp32 logits held at a time, per model


@dataclass(frozen=True)
class Result:
    """Over ``tokens`` predictions. KL(reference || model) in nats per token and the share of
    tokens on which both models find the same id likeliest; None without a reference.
    """

    perplexity: float
    tokens: int
    kl_mean: float | None = None
    kl_p99: float | None = None
    top1_agreement: float | None = None

    def to_dict(self) -> dict[str, float | int | None]:
        """JSON-ready fields."""
        return asdict(self)


class Reference:
    """A reference model's answers on some windows, computed once for many comparisons.

    What is kept, in a temporary file, is the hidden rows before the head: fp32 [H] per token
    instead of [V]. The model's decoder stays in memory for its head.
    """

    def __init__(
        self, model: LoadedModel, windows: Tensor, *, progress: Progress | None = None
    ) -> None:
        self._model, self._width = model, model.config.hidden_size
        self.windows = windows
        self._file = tempfile.TemporaryFile(prefix="qoq-reference-")  # noqa: SIM115 (kept open)
        run = _Runner(model, windows.shape[1])
        for index, window in enumerate(windows):
            run.hidden(window).cpu().numpy().tofile(self._file)
            if progress:
                progress(index + 1, len(windows))

    def hidden(self, index: int) -> Tensor:
        """fp32 [seq_len, H] of window ``index``, on the model's device."""
        count = self.windows.shape[1] * self._width
        self._file.seek(index * count * 4)
        rows = np.fromfile(self._file, np.float32, count)
        return torch.from_numpy(rows).reshape(-1, self._width).to(self._model.device)

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 [M, V]."""
        return self._model.decoder.logits(hidden)

    def close(self) -> None:
        """Delete the file."""
        self._file.close()


def evaluate(
    model: LoadedModel,
    windows: Tensor,
    reference: LoadedModel | Reference | None = None,
    *,
    progress: Progress | None = None,
) -> Result:
    """Judge ``model`` on windows int64 [n, seq_len], beside a reference if one is given.

    Memory does not grow with n or with the vocabulary: logits are made CHUNK_BYTES at a time.
    Raises TextError for no windows, and where the two vocabularies differ.
    """
    _check(model, windows, reference)
    run = _Runner(model, windows.shape[1])
    beside = _Runner(reference, windows.shape[1]) if isinstance(reference, LoadedModel) else None
    rows = max(1, CHUNK_BYTES // (4 * model.config.vocab_size))
    loss, tokens, agree = 0.0, 0, 0
    divergence: list[Tensor] = []
    for index, window in enumerate(windows):
        hidden, targets = run.hidden(window)[:-1], window[1:].to(model.device)
        other = None
        if isinstance(reference, Reference):
            other = reference.hidden(index)[:-1]
        elif beside is not None:
            other = beside.hidden(window)[:-1]
        for start in range(0, len(targets), rows):
            part = slice(start, start + rows)
            own = model.decoder.logits(hidden[part]).log_softmax(dim=-1)
            picked = own.gather(1, targets[part, None])
            loss -= float(picked.sum(dtype=torch.float64))
            if other is None or reference is None:
                continue
            decoder = reference.decoder if isinstance(reference, LoadedModel) else reference
            ideal = decoder.logits(other[part]).log_softmax(dim=-1).to(own.device)
            agree += int((own.argmax(dim=-1) == ideal.argmax(dim=-1)).sum())
            divergence.append(kl_rows(ideal, own))
        tokens += len(targets)
        if progress:
            progress(index + 1, len(windows))
    mean = loss / tokens
    perplexity = math.exp(mean) if mean < 700 else math.inf
    if not divergence:
        return Result(perplexity, tokens)
    kl = torch.cat(divergence).cpu().numpy()
    return Result(
        perplexity, tokens, float(kl.mean()), float(np.quantile(kl, 0.99)), agree / tokens
    )


def kl_rows(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) per row, fp64 [M] in nats, from log-probabilities fp32 [M, V]."""
    return ((log_p - log_q) * log_p.exp()).sum(dim=-1, dtype=torch.float64)


class _Runner:
    """Runs windows through a decoder, each from an empty cache."""

    def __init__(self, model: LoadedModel, seq_len: int) -> None:
        config = model.config
        pages = KVPages.empty(
            model.scheme.kv,
            -(-seq_len // PAGE_SIZE),
            config.num_kv_heads,
            PAGE_SIZE,
            config.head_dim,
            device=model.device,
        )
        self._decoder = model.decoder
        self._device = model.device
        # One layer is done with its keys and values before the next begins: they share pages.
        self._kv = [pages] * config.num_layers

    def hidden(self, window: Tensor) -> Tensor:
        """fp32 [seq_len, H] of the residual stream."""
        with torch.inference_mode():
            return self._decoder.hidden(Batch.prefill([window], PAGE_SIZE, self._device), self._kv)


def _check(model: LoadedModel, windows: Tensor, reference: LoadedModel | Reference | None) -> None:
    if windows.ndim != 2 or len(windows) < 1 or windows.shape[1] < 2:
        raise TextError("There is nothing to evaluate: give at least one window of 2 tokens.")
    if int(windows.max()) >= model.config.vocab_size:
        raise TextError(
            f"The text holds token {int(windows.max())}, but the model knows only "
            f"{model.config.vocab_size}; use the tokenizer that belongs to it."
        )
    if windows.shape[1] > model.config.max_positions:
        raise TextError(
            f"Windows of {windows.shape[1]} tokens exceed the model's context of "
            f"{model.config.max_positions}; lower --seq-len."
        )
    if isinstance(reference, LoadedModel):
        if reference.config.vocab_size != model.config.vocab_size:
            raise TextError(
                f"The reference knows {reference.config.vocab_size} tokens, the model "
                f"{model.config.vocab_size}; they must share one vocabulary to be compared."
            )
    elif reference is not None and not torch.equal(reference.windows, windows):
        raise ValueError("the reference was computed on other windows")
