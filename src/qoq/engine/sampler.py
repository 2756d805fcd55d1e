"""Sampler: a step's logits to one token for each request, and what is told about it."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qoq.engine.logits import LogitsRules
from qoq.engine.logprobs import describe, log_sums, token_logprobs
from qoq.engine.plan import Chunk
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
        self, chunks: Sequence[Chunk], logits: Tensor, wanted: SamplingBatch
    ) -> list[Update]:
        """Draw what comes after each chunk, and hand it to the chunk's request.

        logits fp32 [S, V]: ``num_next`` rows for each chunk, after its last id and after each of
        its guesses; they are overwritten. ``wanted``: the parameters of these S rows.

        A token is a pure function of its logits, the request's seed and how many tokens came before
        it, so all rows are drawn at once and each guess is kept that turns out to be drawn: the
        text, greedy or sampled, is to the bit the one that comes without guesses.
        """
        owners = [chunk.request for chunk in chunks for _ in range(chunk.num_next)]
        shaped = [at for at, r in enumerate(owners) if r.params.shapes_logits]
        told = [at for at, r in enumerate(owners) if r.params.logprobs is not None]
        looked = sorted({*shaped, *told})
        raw = logits[looked] if looked else None
        if shaped:
            self.rules.apply(logits, shaped, [owners[at] for at in shaped])
        tokens = sample(logits, wanted)
        # One copy from a GPU, not two; fp64 holds both.
        told_ids, logprobs = torch.stack((tokens.ids.double(), tokens.logprobs.double())).tolist()
        ids = [int(i) for i in told_ids]
        details: dict[int, dict[int, Logprob]] = {}
        if raw is not None:
            details = self._look(owners, raw, looked, tokens, logprobs)
        updates = []
        row = 0
        for chunk in chunks:
            updates.append(self._hand_over(chunk, row, ids, logprobs, details))
            row += chunk.num_next
        return updates

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
        chunk: Chunk,
        row: int,
        ids: Sequence[int],
        logprobs: Sequence[float],
        details: Mapping[int, dict[int, Logprob]],
    ) -> Update:
        """Give a request the token of its first ``row``, and the next one for each right guess."""
        request = chunk.request
        failed = self.rules.error(request) if request.params.shapes_logits else None
        if failed is not None:
            return Update(request, (), request.fail(failed))
        text = ""
        for at, guess in enumerate((*chunk.guessed, None), row):
            last = self.rules.advance(request, ids[at])
            text += request.accept(ids[at], logprobs[at], details.get(at), last=last)
            if ids[at] != guess or request.finish_reason is not None:
                break
        return Update(request, tuple(ids[row : at + 1]), text)
