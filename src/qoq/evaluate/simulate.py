"""Simulated schemes: quantize a source through the one pipeline, judge it, keep nothing."""

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qoq.errors import SchemeError
from qoq.formats.scheme import QuantScheme
from qoq.models.load import LoadedModel, load_model
from qoq.quantize.calibration import BUILT_IN
from qoq.quantize.pipeline import quantize
from qoq.quantize.recipe import RTN, Recipe, load_recipe

Steps = Callable[[int, int, str], None]
"""steps(done, total, what) of the quantization."""

_RECIPES = ("rtn", "qoq", "published")


@dataclass(frozen=True)
class Calibrated:
    """What simulated recipes are calibrated on."""

    source: str = BUILT_IN
    samples: int = 128
    seq_len: int = 1024
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """What is recorded beside results."""
        return {**asdict(self), "source": Path(self.source).name}


def parse_simulation(name: str) -> tuple[str, Recipe]:
    """``rtn-w4a8kv4-g128``, ``qoq-...``, ``published-...`` or a plain scheme name (then rtn).

    Returns the scheme's canonical name and the recipe. Raises SchemeError.
    """
    first, _, rest = name.strip().partition("-")
    recipe, text = (first, rest) if first in _RECIPES else ("", name)
    try:
        scheme = QuantScheme.parse(text)
    except SchemeError as error:
        raise SchemeError(
            f"{error} A recipe may stand before it: {', '.join(f'{r}-' for r in _RECIPES)}."
        ) from None
    return scheme.name, load_recipe(recipe, scheme) if recipe else RTN


def simulate(
    source: str | Path,
    scheme: str,
    recipe: Recipe,
    calibrated: Calibrated | None = None,
    *,
    device: str = "cpu",
    steps: Steps | None = None,
) -> LoadedModel:
    """``source`` quantized by ``recipe`` and loaded from its packed form, which is then deleted.

    ``scheme`` is a name; all of it happens on ``device``. Needs temporary disk for the checkpoint
    and the calibration rows; raises what ``quantize`` raises.
    """
    calibrated = calibrated or Calibrated()
    with tempfile.TemporaryDirectory(prefix="qoq-simulate-") as folder:
        packed = quantize(
            source,
            Path(folder) / "packed",
            scheme=scheme,
            recipe=recipe,
            calibration=calibrated.source,
            samples=calibrated.samples,
            seq_len=calibrated.seq_len,
            seed=calibrated.seed,
            device=device,
            progress=steps,
        )
        return load_model(packed, device=device)
