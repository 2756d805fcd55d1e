"""``qoq check-env``: what this machine has, and what really runs each op."""

from typing import Any

from qoq.cli.options import DEVICE, JSON
from qoq.cli.terminal import emit, verb


@verb()
def check_env(device: DEVICE = "auto", json: JSON = False) -> None:
    """Show versions, hardware and, per op, the implementation that runs.

    --json prints: qoq_version, hardware (cpu, cores, threads, memory_gb, torch, python, system),
    memory_free_gb, gpus (names), cpu_kernels (isa, usable_isas, threads; or missing, the reason),
    device (and why it), ops (op -> implementation).

    QOQ_ISA and QOQ_NUM_THREADS choose the instruction set and the threads of the CPU kernels.
    """
    import psutil
    import torch

    from qoq import __version__
    from qoq.evaluate.provenance import hardware
    from qoq.kernels.device import choose_device
    from qoq.kernels.dispatch import describe

    where = choose_device(device)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    facts: dict[str, Any] = {
        "qoq_version": __version__,
        "hardware": hardware(),
        "memory_free_gb": round(psutil.virtual_memory().available / 1e9, 1),
        "gpus": gpus,
        "cpu_kernels": _cpu_kernels(),
        "device": str(where),
        "ops": dict(describe(where.device)),
    }
    if json:
        emit(facts)
        return
    machine = facts["hardware"]
    print(f"qoq {__version__}, torch {machine['torch']}, Python {machine['python']}")
    print(f"{machine['cpu']}: {machine['cores']} cores, torch uses {machine['threads']} threads")
    print(f"memory: {machine['memory_gb']} GB, free {facts['memory_free_gb']} GB")
    print(f"GPUs: {', '.join(gpus) or 'none'}")
    native = facts["cpu_kernels"]
    if "missing" in native:
        print(f"CPU kernels: none ({native['missing']})")
    else:
        usable = ", ".join(native["usable_isas"])
        print(f"CPU kernels: {native['isa']} (of {usable}), {native['threads']} threads")
    print(f"models run on: {facts['device']}")
    for op, what in facts["ops"].items():
        print(f"{op:16} {what}")


def _cpu_kernels() -> dict[str, Any]:
    """What the C++ kernels run on here, or why there are none."""
    from qoq.kernels.cpu import backend

    reason = backend.missing()
    if reason is not None:
        return {"missing": reason}
    shared = backend.backend()
    usable = backend.extension().usable_isas()
    return {"isa": shared.isa, "usable_isas": usable, "threads": shared.threads}


def check_device(device: str) -> None:
    """Raise BackendUnavailable, with the cause, for a device that torch cannot use here."""
    import torch

    from qoq.errors import BackendUnavailable

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # how torch says that there is none
        cause = str(error).strip().splitlines()[0]
        raise BackendUnavailable(f"Device {device!r} cannot be used here ({cause}).") from None
