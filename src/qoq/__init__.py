"""qoq: W4A8KV4 quantization (QoQ) and inference of Hugging Face decoder models.

The public door. Names are imported when first used, so ``import qoq`` is quick, imports no torch
and touches no device.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qoq.engine.request import SamplingParams
    from qoq.formats.scheme import QuantScheme
    from qoq.llm import LLM
    from qoq.quantize.pipeline import quantize

__version__ = "0.1.0"
__all__ = ["LLM", "QuantScheme", "SamplingParams", "__version__", "quantize"]

_HOMES = {
    "LLM": "qoq.llm",
    "QuantScheme": "qoq.formats.scheme",
    "SamplingParams": "qoq.engine.request",
    "quantize": "qoq.quantize.pipeline",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Door(ModuleType):
    """Keeps ``qoq.quantize`` the function: importing the sub-package would hide it otherwise."""

    @property
    def quantize(self) -> Any:
        return __getattr__("quantize")

    @quantize.setter
    def quantize(self, module: ModuleType) -> None:
        """The import system offers the sub-package here; ``from qoq.quantize import x`` works."""


sys.modules[__name__].__class__ = _Door
