"""Compiles Triton kernels to machine code, in a process that does not interpret them.

python triton_child.py JOBS RESULTS    (JSON files; started by helpers.triton_code)
"""

import importlib
import json
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


def compile_kernel(job: dict[str, Any]) -> dict[str, Any]:
    """PTX, disassembly with the resources ptxas reports, and shared memory in bytes."""
    module, _, function = job["function"].partition(":")
    kernel = getattr(importlib.import_module(module), function)
    known = dict.fromkeys(job["constants"], "constexpr")
    attributes = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if name in job["aligned"]
    }
    # In the kernel's order: a signature is taken as a list.
    types = {name: (job["types"] | known)[name] for name in kernel.arg_names}
    compiled = triton.compile(
        ASTSource(kernel, types, job["constants"], attributes),
        target=GPUTarget("cuda", job["arch"], 32),
        options=job["options"],
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        dump = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-sass", "-res-usage", file.name],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    return {"ptx": compiled.asm["ptx"], "dump": dump, "shared": compiled.metadata.shared}


def main() -> None:
    """Each job's answer in order; one that fails answers with its error."""
    jobs, answers = json.loads(Path(sys.argv[1]).read_text()), []
    for job in jobs:
        try:
            answers.append(compile_kernel(job))
        except Exception:
            answers.append({"error": traceback.format_exc()})
    Path(sys.argv[2]).write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
