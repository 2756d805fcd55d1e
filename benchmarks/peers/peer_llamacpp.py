"""llama.cpp: Q4_0 weights (Q6_K head, as published files have it), keys and values in f16 or q4_0.

Runs llama-batched-bench: it processes all prompts, then makes tokens for all requests in step,
without sampling. Its first token after the prompt is in the time of the prompt, as everywhere here,
so it is asked for one step less than the tokens to generate.
"""

import json
import subprocess
import sys

from common import Job, Times, emit, parse

PAGE = 256  # llama.cpp rounds the context of each sequence up to a multiple of this


def measure(job: Job) -> Times:
    """Run the bench once for this batch."""
    folder = job.home / "llamacpp" / job.isa / "bin"
    model = job.model / "q4_0.gguf"
    if not (folder / "llama-batched-bench").is_file() or not model.is_file():
        sys.exit(f"{folder} or {model} is missing; run install.py llamacpp first.")
    each = -(-(job.prompt_len + job.output_len) // PAGE) * PAGE
    steps = job.output_len - 1
    command = [
        *(str(folder / "llama-batched-bench"), "-m", str(model), "-c", str(job.batch * each)),
        *("-npp", str(job.prompt_len), "-ntg", str(steps), "-npl", str(job.batch)),
        *("-t", str(job.threads), "-ctk", job.variant, "-ctv", job.variant),
        # Quantized values need it, and a whole run with f16 is faster with it (2 to 5 % on Zen 4).
        *("-fa", "on", "--output-format", "jsonl"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        sys.exit(f"{' '.join(command)} failed ({done.returncode}):\n{done.stderr[-2000:]}")
    run = json.loads(lines[-1])
    return Times(run["t_pp"], run["t_pp"] + run["t_tg"], job.batch)


def main() -> None:
    job = parse(__doc__, ("f16", "q4_0"))
    version = (job.home / "llamacpp" / "version").read_text(encoding="utf-8").strip()
    emit(job, "llamacpp", version, measure(job))


if __name__ == "__main__":
    main()
