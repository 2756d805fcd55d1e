"""PyTorch's own 4-bit path: a minimal Llama in bf16 on aten's int4 linears in groups of 128.

The head is aten's int8 linear; attention is scaled_dot_product_attention over bf16 keys and values
kept in place; greedy. Nothing is compiled.
"""

import os

from common import WARM_OUTPUT, WARM_PROMPT, Job, drive, emit, parse

# Read by torch when it is imported.
ISAS = {
    "native": {},
    "avx512vnni": {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
}


def measure(job: Job) -> None:
    """Time one batch after a short one."""
    import torch
    from torch_llama import Batch, Llama

    torch.set_num_threads(job.threads)
    with torch.inference_mode():
        model = Llama(job)
        drive(Batch(model, job.prompts(WARM_PROMPT)).step, job.batch, WARM_OUTPUT)
        times = drive(Batch(model, job.prompts()).step, job.batch, job.output_len)
    emit(job, "torch", torch.__version__, times)


def main() -> None:
    job = parse(__doc__, ("bf16",))
    os.environ.update(ISAS[job.isa])
    measure(job)


if __name__ == "__main__":
    main()
