"""Sampler: a step's logits to one token for each request, and what is told about it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qoq.engine.logits import LogitsRules
from qoq.engine.logprobs import describe, log_sums, token_logprobs
from qoq.engine.request import Logprob, Request, Update
from qoq.errors import RequestError
from qoq.kernels.sample import SampleOutput, SamplingBatch, sample
from qoq.tokenizer import Tokenizer


class Sampler:
    """Chooses the next tokens of an engine's requests.

    Log-probabilities are always those of the raw logits: rules, temperature and cuts decide which
    token is drawn, not what the model thinks of it. Requests without rules cost nothing more than
    the op ``sample``.
    """

    def __init__(self, vocab_size: int, tokenizer: Tokenizer | None = None) -> None:
        self.rules = LogitsRules(vocab_size, tokenizer)

    def admit(self, request: Request, device: torch.device) -> None:
        """Compile and check what a request asks; RequestError where it cannot be honoured."""
        if request.params.n != 1:
            raise RequestError("A request is one text; n texts are n requests (see choices).")
        self.rules.admit(request, device)

    def choose(
        self, requests: Sequence[Request], logits: Tensor, wanted: SamplingBatch | None = None
    ) -> list[Update]:
        """Draw a token for each request from its row of logits fp32 [S, V] and hand it over.

        ``wanted``: their parameters, if there is a batch of them. The logits are overwritten. The
        randomness hangs on (seed, new tokens so far) alone.
        """
        shaped = [at for at, r in enumerate(requests) if r.params.shapes_logits]
        told = [at for at, r in enumerate(requests) if r.params.logprobs is not None]
        looked = sorted({*shaped, *told})
        raw = logits[looked] if looked else None
        if shaped:
            self.rules.apply(logits, shaped, [requests[at] for at in shaped])
        if wanted is None:
            wanted = sampling_batch(requests, [r.num_new for r in requests], logits)
        tokens = sample(logits, wanted)
        ids, logprobs = tokens.ids.tolist(), tokens.logprobs.tolist()
        details: dict[int, dict[int, Logprob]] = {}
        if raw is not None:
            details = self._look(requests, raw, looked, tokens, logprobs)
        failed = {at: self.rules.error(requests[at]) for at in shaped}
        return [
            self._hand_over(request, ids[at], logprobs[at], details.get(at), failed.get(at))
            for at, request in enumerate(requests)
        ]

    def _look(
        self,
        requests: Sequence[Request],
        raw: Tensor,
        rows: Sequence[int],
        tokens: SampleOutput,
        logprobs: list[float],
    ) -> dict[int, dict[int, Logprob]]:
        """Put log-probabilities under ``raw`` [R, V] into the list; the likeliest where asked."""
        sums = log_sums(raw)
        chosen = tokens.ids[torch.tensor(rows, device=raw.device)]
        own = token_logprobs(raw, sums, chosen[:, None]).flatten().tolist()
        for row, value in zip(rows, own, strict=True):
            if requests[row].params.shapes_logits:
                logprobs[row] = value  # the op saw logits that the rules had changed
        asked = [i for i, row in enumerate(rows) if requests[row].params.logprobs is not None]
        counts = [requests[rows[i]].params.logprobs or 0 for i in asked]
        out: dict[int, dict[int, Logprob]] = {}
        if asked:
            tops = describe(raw[asked], sums[asked], chosen[asked], counts)
            out = {rows[i]: top for i, top in zip(asked, tops, strict=True)}
        for row, top in out.items():
            first = next(iter(top))
            top[first] = Logprob(logprobs[row], top[first].rank)
        return out

    def _hand_over(
        self,
        request: Request,
        token_id: int,
        logprob: float,
        top: dict[int, Logprob] | None,
        failed: str | None,
    ) -> Update:
        if failed is not None:
            return request.fail(failed)
        last = self.rules.advance(request, token_id)
        return request.accept(token_id, logprob, top, last=last)


def sampling_batch(
    requests: Sequence[Request], steps: Sequence[int], logits: Tensor
) -> SamplingBatch:
    """The parameters of ``sample``, a row per request; ``steps``: the index of each row's token."""

    def column(values: Sequence[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=logits.device)

    params = [request.params for request in requests]
    return SamplingBatch(
        temperature=column([p.temperature for p in params], torch.float32),
        top_k=column([p.top_k for p in params], torch.int64),
        top_p=column([p.top_p for p in params], torch.float32),
        min_p=column([p.min_p for p in params], torch.float32),
        seeds=column([r.seed for r in requests], torch.int64),
        step=column(steps, torch.int64),
    )
