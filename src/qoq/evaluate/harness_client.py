"""lm_eval's client of OpenAI-compatible servers, with texts that begin with one BOS, not two."""

from collections.abc import Mapping
from typing import Any

from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI


class Completions(LocalCompletionsAPI):  # type: ignore[misc]
    """``local-completions``; with ``add_bos_token`` contexts begin with a BOS."""

    add_bos_token: bool

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """lm_eval puts a BOS before a rolled text itself; the tokenizer must not add another."""
        kept, self.add_bos_token = self.add_bos_token, False
        try:
            sums: list[float] = super().loglikelihood_rolling(requests, disable_tqdm)
        finally:
            self.add_bos_token = kept
        return sums


def make_client(arguments: Mapping[str, Any], *, chat: bool) -> Any:
    """A client for /v1/completions, or for /v1/chat/completions."""
    if chat:
        return LocalChatCompletion(**arguments)
    client = Completions(**arguments)
    if client.tokenizer_backend == "remote":
        # lm_eval takes a BOS whose id is 0 for none, and would begin texts with an EOS.
        client.custom_prefix_token_id = client.tokenizer.bos_token_id
    return client
