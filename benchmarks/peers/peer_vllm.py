"""vLLM on the CPU: weights, activations, keys and values in bf16; greedy, ids in and out.

The engine runs in this process and is stepped from here, so that it is timed as the others are.
Its first start at a shape compiles for minutes; later ones find the result in its cache.
"""

import itertools
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from common import WARM_OUTPUT, WARM_PROMPT, Job, Times, drive, emit, parse

if TYPE_CHECKING:
    from vllm import LLM

CHUNK = 2048  # tokens of a step at most
NAMES = itertools.count()


def settings(job: Job) -> dict[str, str]:
    """What vLLM reads from the environment, before it is imported."""
    config = job.config
    dim, heads = config["head_dim"], config["num_key_value_heads"]
    token = 4 * config["num_hidden_layers"] * heads * dim  # two bytes for a key, two for a value
    need = job.batch * (job.prompt_len + job.output_len + 128) * token
    cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0))[: job.threads])
    return {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": str(need // (1 << 30) + 1),
        "VLLM_CPU_OMP_THREADS_BIND": cores,  # all of them: none kept back for a server
        "OMP_NUM_THREADS": str(job.threads),
        "VLLM_LOGGING_LEVEL": "ERROR",
    }


def generate(llm: "LLM", prompts: list[list[int]], output_len: int) -> Times:
    """Time one batch."""
    from vllm import SamplingParams, TokensPrompt

    engine = llm.llm_engine
    params = SamplingParams(max_tokens=output_len, ignore_eos=True, temperature=0, detokenize=False)
    for ids in prompts:
        engine.add_request(str(next(NAMES)), TokensPrompt(prompt_token_ids=ids), params)

    def step() -> Mapping[str, int]:
        return {out.request_id: len(out.outputs[0].token_ids) for out in engine.step()}

    return drive(step, len(prompts), output_len)


def main() -> None:
    job = parse(__doc__, ("bf16",))
    os.environ.update(settings(job))
    import vllm

    llm = vllm.LLM(
        model=str(job.model / "hf"),
        dtype="bfloat16",
        skip_tokenizer_init=True,
        max_model_len=job.prompt_len + job.output_len,
        max_num_batched_tokens=CHUNK,
        max_num_seqs=job.batch,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    generate(llm, job.prompts(WARM_PROMPT), WARM_OUTPUT)
    emit(job, "vllm", vllm.__version__, generate(llm, job.prompts(), job.output_len))


if __name__ == "__main__":
    main()
