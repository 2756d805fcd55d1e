"""Tasks of lm-evaluation-harness over files written on the spot."""

import json
from pathlib import Path
from typing import Any

ENDINGS = [
    {"ctx": "the hat told", "endings": [" hello", " well hollow", " to the hill"], "label": 2},
    {"ctx": "hello w", "endings": ["ell", "e t"], "label": 0},
    {"ctx": "", "endings": ["the hill", "on"], "label": 1},
    {"ctx": "ends in spaces  ", "endings": ["a", "hat"], "label": 1},
]
STARTS = [{"text": "hello w", "next": "ell"}, {"text": "t", "next": " hat"}]
DOCUMENTS = [
    {"text": "the hat on the hill " * 12},
    {"text": "told"},
    {"text": "well, hello\n\nto you"},
]

_CHOICE = """
output_type: multiple_choice
doc_to_text: "{{ctx}}"
doc_to_choice: "{{endings}}"
doc_to_target: label
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
_GENERATE = """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{next}}"
generation_kwargs: {until: ["ll", "zz"], max_gen_toks: 9, do_sample: false, temperature: 0}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
_ROLL = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
  - {metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
"""


def write_tasks(folder: Path) -> Path:
    """The tasks tiny_endings, tiny_starts and tiny_documents."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows, rest in (
        ("tiny_endings", ENDINGS, _CHOICE),
        ("tiny_starts", STARTS, _GENERATE),
        ("tiny_documents", DOCUMENTS, _ROLL),
    ):
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        head = (
            f"task: {name}\ndataset_path: json\ntest_split: test\n"
            f"dataset_kwargs: {{data_files: {{test: {data}}}}}"
        )
        (folder / f"{name}.yaml").write_text(head + rest, encoding="utf-8")
    return folder


def likelihood_request(model: str, ids: list[int]) -> dict[str, Any]:
    """The very body by which lm_eval asks for log-likelihoods."""
    return {
        "model": model,
        "prompt": [ids],
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }


def read_likelihood(answer: dict[str, Any], context: int) -> tuple[float, bool]:
    """What lm_eval reads: the sum behind ``context`` tokens, and whether all are the likeliest."""
    logprobs = answer["choices"][0]["logprobs"]
    own = logprobs["token_logprobs"][context:-1]
    tops = logprobs["top_logprobs"][context:-1]
    greedy = all(value == max(top.values()) for value, top in zip(own, tops, strict=True))
    return sum(own), greedy
