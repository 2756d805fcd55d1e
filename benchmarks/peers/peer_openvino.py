"""OpenVINO GenAI: INT4 symmetric weights in groups of 128, keys and values in u8 (or u4, f16).

Its continuous batching engine, stepped from here; greedy, ids in and out.
"""

from collections.abc import Mapping

import numpy as np
import openvino
import openvino_genai as genai
from common import WARM_OUTPUT, WARM_PROMPT, Job, Times, drive, emit, parse

# Tokens of a step at most, as in vLLM and llama.cpp: 2 to 6 % faster than its own 256 on Zen 4.
CHUNK = 2048
BLOCK = 32  # tokens of a page of keys and values on CPUs


def pipeline(job: Job) -> genai.ContinuousBatchingPipeline:
    """The engine with room for all requests and no cache of prefixes."""
    scheduler = genai.SchedulerConfig()
    scheduler.max_num_batched_tokens = CHUNK
    scheduler.max_num_seqs = max(job.batch, 1)
    scheduler.enable_prefix_caching = False
    scheduler.num_kv_blocks = job.batch * (-(-(job.prompt_len + job.output_len) // BLOCK) + 1)
    properties = {
        "INFERENCE_NUM_THREADS": job.threads,
        "KV_CACHE_PRECISION": job.variant,
        "PERFORMANCE_HINT": "LATENCY",  # one stream with all threads
    }
    return genai.ContinuousBatchingPipeline(str(job.model / "ov"), scheduler, "CPU", properties)


def generate(
    engine: genai.ContinuousBatchingPipeline, prompts: list[list[int]], output_len: int, first: int
) -> Times:
    """Time one batch; requests are numbered from ``first``."""
    config = genai.GenerationConfig()
    config.max_new_tokens = output_len
    config.ignore_eos = True
    config.do_sample = False
    handles = {
        first + i: engine.add_request(first + i, openvino.Tensor(np.array([ids], np.int64)), config)
        for i, ids in enumerate(prompts)
    }
    made = dict.fromkeys(handles, 0)

    def step() -> Mapping[int, int]:
        engine.step()
        for request, handle in handles.items():
            while handle.can_read():
                made[request] += sum(len(out.generated_ids) for out in handle.read().values())
        return made

    return drive(step, len(prompts), output_len)


def main() -> None:
    job = parse(__doc__, ("u8", "u4", "f16"))
    engine = pipeline(job)
    generate(engine, job.prompts(WARM_PROMPT), WARM_OUTPUT, 0)
    times = generate(engine, job.prompts(), job.output_len, job.batch)
    emit(job, "openvino", genai.__version__, times)


if __name__ == "__main__":
    main()
