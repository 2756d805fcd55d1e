"""Which rows the accuracy tables have: schemes and recipes as data (the paper's table 4, wider)."""

from dataclasses import dataclass, replace
from pathlib import Path

from qoq.errors import SchemeError
from qoq.formats.scheme import QuantScheme
from qoq.quantize.recipe import PASS_NAMES, QOQ, RTN, Recipe, load_recipe

GROUP, CHANNEL = "w4a8kv4-g128", "w4a8kv4"
# What is quantized -> the scheme that quantizes nothing else.
PARTS = {
    "weights, groups of 128": "w4a16-g128",
    "weights, per channel": "w4a16",
    "activations": "w16a8",
    "keys": "w16a16k4v16",
    "values": "w16a16k16v4",
    "all, groups of 128": GROUP,
}
# Keys alone: how each way of preparing them fares when nothing else is quantized.
_KEYS = {
    "as they are": RTN,
    "SmoothAttention, alpha 0.5": replace(RTN, smooth_attention=((0.5, 0.0),)),
    "SmoothAttention, alpha 0.7": replace(RTN, smooth_attention=((0.7, 0.0),)),
    "SmoothAttention, chosen": replace(RTN, smooth_attention=QOQ.smooth_attention),
    "centering": replace(RTN, center_keys=True),
    "centering + SmoothAttention, alpha 0.5": replace(
        RTN, center_keys=True, smooth_attention=((0.5, 0.0),)
    ),
    "centering + SmoothAttention, chosen (the recipe)": replace(
        RTN, center_keys=True, smooth_attention=QOQ.smooth_attention
    ),
    "Hadamard": replace(RTN, rotate_keys=True),
    "centering + Hadamard": replace(RTN, center_keys=True, rotate_keys=True),
    "centering + Hadamard + SmoothAttention, chosen": replace(
        RTN, center_keys=True, rotate_keys=True, smooth_attention=QOQ.smooth_attention
    ),
}
TABLES = ("accuracy", "parts", "keys", "leave-one-out")
ROWS = ("quick", *TABLES, "full")


@dataclass(frozen=True)
class Case:
    """One row: a source in full precision (no scheme), quantized on the spot, or a checkpoint.

    ``step`` marks rows of the ablation, which a short table leaves out.
    """

    label: str
    scheme: str | None = None
    recipe: Recipe = RTN
    checkpoint: Path | None = None
    step: bool = False

    @property
    def key(self) -> tuple[str, ...]:
        """Cases with equal keys have equal results."""
        if self.checkpoint is not None:
            return ("checkpoint", str(self.checkpoint))
        if self.scheme is None:
            return ("full",)
        return ("simulated", self.scheme, repr(sorted(recipe_numbers(self.recipe).items())))


def recipe_numbers(recipe: Recipe) -> dict[str, object]:
    """What a recipe does, without its name."""
    return {key: value for key, value in recipe.to_dict().items() if key != "name"}


def active_passes(recipe: Recipe) -> list[str]:
    """The names of a recipe's passes, in the order they run."""
    return [name for name, field in PASS_NAMES.items() if getattr(recipe, field)]


def up_to(recipe: Recipe, pass_name: str) -> Recipe:
    """The recipe without the passes that come after ``pass_name``."""
    passes = active_passes(recipe)
    for later in passes[passes.index(pass_name) + 1 :]:
        recipe = recipe.without(later)
    return recipe


def make_tables(
    rows: str, recipe: Recipe = QOQ, checkpoints: tuple[Path, ...] = ()
) -> dict[str, list[Case]]:
    """Table name -> its rows: of one table, of all (``full``), or a few rows (``quick``).

    ``recipe`` is the one taken apart. A checkpoint already there gets a row; in the quick set it
    stands in for quantizing anew. Raises SchemeError for a set that does not exist.
    """
    if rows not in ROWS:
        raise SchemeError(f"There is no set of rows {rows!r}; choose from {', '.join(ROWS)}.")
    finished = [Case(f"checkpoint {path.name}", checkpoint=path) for path in checkpoints]
    if rows == "quick":
        return {"accuracy": [*_baselines(), *_published()[1:], *(finished or _finals(recipe)[1:])]}
    tables = {
        "accuracy": [
            *_baselines(),
            *_steps(recipe),
            *_published(),
            *_finals(recipe),
            *finished,
        ],
        "parts": [
            Case(f"{r.name}: {part}", scheme, r)
            for part, scheme in PARTS.items()
            for r in (RTN, recipe)
        ],
        "keys": [
            *(Case(label, PARTS["keys"], keys) for label, keys in _KEYS.items()),
            Case("8-bit keys, as they are", "w16a16k8v16"),
        ],
        "leave-one-out": [
            Case(recipe.name, GROUP, recipe),
            *(Case(f"without {p}", GROUP, recipe.without(p)) for p in active_passes(recipe)),
        ],
    }
    return tables if rows == "full" else {rows: tables[rows]}


def _baselines() -> list[Case]:
    return [
        Case("full precision"),
        Case("W8A8", "w8a8"),
        Case("RTN, per channel", CHANNEL),
        Case("RTN, g128", GROUP),
    ]


def _steps(recipe: Recipe) -> list[Case]:
    """RTN g128 with the recipe's passes added one by one; the last row is the recipe itself."""
    return [
        Case(f"+ {name}", GROUP, up_to(recipe, name), step=True) for name in active_passes(recipe)
    ]


def _published() -> list[Case]:
    return [
        Case(f"published QoQ, {how}", scheme, load_recipe("published", QuantScheme.parse(scheme)))
        for how, scheme in (("per channel", CHANNEL), ("g128", GROUP))
    ]


def _finals(recipe: Recipe) -> list[Case]:
    name = "QoQ" if recipe.name == QOQ.name else recipe.name
    return [Case(f"{name}, per channel", CHANNEL, recipe), Case(f"{name}, g128", GROUP, recipe)]
