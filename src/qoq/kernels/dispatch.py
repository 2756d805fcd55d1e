"""Which implementation of an op runs: chosen per call from a table, refused with a reason.

``auto`` takes the first twin (fastest first) that declares support for this device and these
shapes, else the oracle; a backend asked for by name runs or raises. Nothing is imported before it
is needed, and the only state is Python's own module cache.
"""

import importlib
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from qoq.errors import BackendUnavailable

BACKENDS = ("auto", "oracle", "cpu", "gpu")


@dataclass(frozen=True)
class Twin:
    """A fast implementation of an op: ``backend`` is its name, ``module`` where it lives; for other
    types of device than ``device`` (None: it says so itself) it is not even imported.

    The module offers a function named like the op, with the oracle's signature, and
    ``unsupported(device, **what) -> str | None``: why it cannot run this call, or None if it can.
    """

    backend: str
    module: str
    device: str | None = None


_STEM = {"rms_norm_quant": "act_quant", "silu_mul_quant": "act_quant"}
_OPS = (
    "act_quant",
    "rms_norm_quant",
    "silu_mul_quant",
    "linear",
    "kv_append",
    "attention",
    "sample",
)

# op -> twins, fastest first.
TWINS: dict[str, tuple[Twin, ...]] = {
    op: tuple(
        Twin(backend, f"qoq.kernels.{backend}.{_STEM.get(op, op)}", device)
        for backend, device in (("cpu", "cpu"), ("gpu", "cuda"))
    )
    for op in _OPS
}


def resolve(
    op: str,
    backend: str,
    device: torch.device | str,
    *,
    twins: dict[str, tuple[Twin, ...]] = TWINS,
    **what: Any,
) -> Callable[..., Any]:
    """The callable that runs ``op`` on ``device``: a twin's (see ``find``) or the oracle's."""
    # Asked by every op of every layer: the usual answer must cost next to nothing.
    for twin in twins.get(op, ()) if isinstance(device, torch.device) else ():
        if backend == "auto" or backend == twin.backend:
            ready = sys.modules.get(twin.module)
            if ready is not None and ready.unsupported(device, **what) is None:
                usual: Callable[..., Any] = getattr(ready, op)
                return usual
    module = find(op, backend, device, twins=twins, **what)
    if module is not None:
        chosen: Callable[..., Any] = getattr(module, op)
        return chosen
    oracle: Callable[..., Any] = getattr(
        importlib.import_module(f"qoq.kernels.{_STEM.get(op, op)}"), f"{op}_oracle"
    )
    return oracle


def find(
    op: str,
    backend: str,
    device: torch.device | str,
    *,
    twins: dict[str, tuple[Twin, ...]] = TWINS,
    **what: Any,
) -> ModuleType | None:
    """The module of the twin that runs ``op``, or None for the oracle.

    ``what`` is passed to each twin's declaration. Raises BackendUnavailable when a backend other
    than auto and oracle is named and cannot run, with every cause in the message.
    """
    if op not in twins:
        raise ValueError(f"no op named {op!r}; there are {', '.join(twins)}")
    if backend not in BACKENDS:
        raise BackendUnavailable(
            f"There is no backend named {backend!r}. Use one of {', '.join(BACKENDS)}."
        )
    if backend != "oracle":
        refusals = []
        for twin in twins[op]:
            if backend not in ("auto", twin.backend):
                continue
            module, reason = _load(twin, torch.device(device), what)
            if module is not None:
                return module
            refusals.append(f"{twin.backend}: {reason}")
        if backend != "auto":
            cause = "; ".join(refusals) or "this version has no such implementation"
            raise BackendUnavailable(
                f"Backend {backend!r} cannot run {op} on {device} ({cause}). "
                "Use --backend auto, or oracle for the slow reference."
            )
        if refusals:
            # The warnings module shows a given text once per process, which is what we want.
            warnings.warn(f"{op} runs on the slow oracle ({'; '.join(refusals)})", stacklevel=4)
    return None


def _load(
    twin: Twin, device: torch.device, what: dict[str, Any]
) -> tuple[ModuleType, None] | tuple[None, str]:
    """The twin's module if it can run this call, else the reason it cannot."""
    if twin.device not in (None, device.type):
        return None, f"it runs on {twin.device} devices only"
    try:
        module = importlib.import_module(twin.module)
    except (ImportError, OSError) as error:
        return None, f"{type(error).__name__}: {error}"
    reason = module.unsupported(device, **what)
    return (module, None) if reason is None else (None, str(reason))


def describe(
    device: torch.device | str, *, twins: dict[str, tuple[Twin, ...]] = TWINS
) -> list[tuple[str, str]]:
    """(op, what runs it on ``device``) for every op: what check-env prints."""
    rows = []
    for op, candidates in twins.items():
        refusals = []
        for twin in candidates:
            module, reason = _load(twin, torch.device(device), {})
            if module is not None:
                rows.append((op, f"{twin.backend} ({twin.module})"))
                break
            refusals.append(f"{twin.backend}: {reason}")
        else:
            rows.append((op, "oracle" + (f" ({'; '.join(refusals)})" if refusals else "")))
    return rows
