"""Log-probabilities of tokens under the raw logits, with ranks and the likeliest beside them.

The sampler's own sum over the vocabulary serves here too, so a token has one log-probability
wherever it is asked for, and none depends on the batch. Memory: prompts are scored a bounded
number of rows at a time, for each row of logits is as long as the vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from qoq.engine.plan import Chunk
from qoq.engine.request import Logprob, Request
from qoq.kernels.sample import SamplingBatch, sample
from qoq.kvcache.pool import KVPool
from qoq.models.batch import Batch
from qoq.models.decoder import Decoder

_SCORED_BYTES = 32 << 20  # of prompt logits that exist at a time


def log_sums(logits: Tensor) -> Tensor:
    """log of the sum of e^logit, fp64 [R], of rows fp32 [R, V]; as good as fp32 is."""
    rows = logits.shape[0]

    def column(value: float, dtype: torch.dtype) -> Tensor:
        return torch.full((rows,), value, dtype=dtype, device=logits.device)

    zero, whole = column(0, torch.float32), column(0, torch.int64)
    greedy = SamplingBatch(zero, whole, column(1, torch.float32), zero, whole, whole)
    best = sample(logits, greedy)
    top = logits.gather(1, best.ids[:, None]).squeeze(1).to(torch.float64)
    return top - best.logprobs.to(torch.float64)


def token_logprobs(logits: Tensor, sums: Tensor, ids: Tensor) -> Tensor:
    """fp32 [R, N] of ids int64 [R, N] under rows [R, V] whose ``log_sums`` are fp64 [R]."""
    return (logits.gather(1, ids).to(torch.float64) - sums[:, None]).to(torch.float32)


def ranks_of(logits: Tensor, ids: Tensor) -> Tensor:
    """Places int64 [R] of ids [R] in the ranking of their rows [R, V]: 1 + how many come before.

    Higher logits come first, of equal ones the lower id.
    """
    own = logits.gather(1, ids[:, None])
    before = torch.arange(logits.shape[1], device=logits.device) < ids[:, None]
    return 1 + ((logits > own) | ((logits == own) & before)).sum(dim=1)


def top_ids(logits: Tensor, count: int) -> Tensor:
    """The first ids int64 [R, count] of each row's ranking (see ``ranks_of``)."""
    count = min(count, logits.shape[1])
    values, ids = logits.topk(count, dim=1)
    ids = ids.sort(dim=1).values
    order = logits.gather(1, ids).sort(dim=1, descending=True, stable=True).indices
    ids = ids.gather(1, order)
    # Which of several equal logits at the cut topk takes is nobody's promise.
    tied = (logits >= values[:, -1:]).sum(dim=1) > count
    for row in tied.nonzero().flatten().tolist():
        reached = (logits[row] >= values[row, -1]).nonzero().flatten()
        ranked = logits[row, reached].sort(descending=True, stable=True).indices
        ids[row] = reached[ranked[:count]]
    return ids


def describe(
    logits: Tensor, sums: Tensor, chosen: Tensor, counts: Sequence[int]
) -> list[dict[int, Logprob]]:
    """For each row [R, V] its chosen id (int64 [R]), then its ``counts[row]`` likeliest."""
    ranks = ranks_of(logits, chosen).tolist()
    own = token_logprobs(logits, sums, chosen[:, None]).flatten().tolist()
    out = [{i: Logprob(p, rank)} for i, p, rank in zip(chosen.tolist(), own, ranks, strict=True)]
    if max(counts, default=0):
        top = top_ids(logits, max(counts))
        columns = zip(top.tolist(), token_logprobs(logits, sums, top).tolist(), strict=True)
        for row, (ids, values) in enumerate(columns):
            for at, (i, p) in enumerate(zip(ids[: counts[row]], values, strict=False)):
                out[row].setdefault(i, Logprob(p, at + 1))
    return out


def forward(
    decoder: Decoder,
    batch: Batch,
    pool: KVPool,
    rows: Sequence[int],
    chunks: Sequence[Chunk],
    *,
    backend: str = "auto",
) -> Tensor:
    """The step's logits fp32 [M, V] at ``rows``; scores prompts that ask on the way.

    ``chunks``: what the batch reads, in order. A prompt of P tokens that asks costs P rows of the
    head instead of one; every other request costs nothing.
    """
    at = None
    if len(rows) < batch.num_tokens:
        at = torch.tensor(rows, dtype=torch.int64, device=batch.input_ids.device)
    if not any(unscored(chunk.request) for chunk in chunks):
        return decoder(batch, pool.layers, at, backend=backend)
    hidden = decoder.hidden(batch, pool.layers, backend=backend)
    row = 0
    for chunk in chunks:
        if unscored(chunk.request):
            own = hidden[row : row + chunk.stop - chunk.start]
            _score(chunk.request, decoder, own, backend)
        row += chunk.num_rows
    return decoder.logits(hidden if at is None else hidden[at], backend=backend)


def unscored(request: Request) -> bool:
    """Whether a prompt's ids are still to get the log-probabilities it asks for."""
    wanted = request.params.prompt_logprobs is not None
    return wanted and len(request.prompt_logprobs) < len(request.prompt_ids)


def _score(request: Request, decoder: Decoder, hidden: Tensor, backend: str) -> None:
    """Extend ``request.prompt_logprobs`` by what the hidden rows [T, H] from num_cached on say.

    A row says what follows it, so the row before the prompt's next unscored id is needed: where a
    prompt is read anew, rows that were scored are passed over.
    """
    assert request.params.prompt_logprobs is not None
    scores = request.prompt_logprobs
    if not scores:
        scores.append(None)  # nothing says what comes first
    first = len(scores) - 1 - request.num_cached
    assert first >= 0, "a prompt to be scored must be read from its beginning"
    targets = request.prompt_ids[len(scores) :][: max(hidden.shape[0] - first, 0)]
    size = max(1, _SCORED_BYTES // (4 * decoder.config.vocab_size))
    for start in range(0, len(targets), size):
        part = targets[start : start + size]
        begin = first + start
        logits = decoder.logits(hidden[begin : begin + len(part)], backend=backend)
        chosen = torch.tensor(part, dtype=torch.int64, device=logits.device)
        counts = [request.params.prompt_logprobs] * len(part)
        scores.extend(describe(logits, log_sums(logits), chosen, counts))
