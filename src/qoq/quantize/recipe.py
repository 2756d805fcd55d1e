"""Recipe: which passes run and with which numbers. Data only; the recipes of the paper and ours.

``qoq`` is the default and ours; ``published-*`` are the two recipes of the public QoQ quantizer
(DeepCompressor configs, see docs/numerics.md); ``rtn`` rounds to nearest and does nothing else.
"""

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from qoq.errors import SchemeError
from qoq.formats.scheme import QuantScheme


@dataclass(frozen=True)
class Recipe:
    """The passes of ``quantize`` in order; every field is a switch or a number of one pass.

    ``*_alphas`` list the candidates (alpha, beta) of a smoothing; calibration data picks one per KV
    head or linear, identity included unless ``*_fixed``. Empty: the pass is off.
    """

    name: str
    rotate: bool = False  # residual stream, Hadamard
    center_keys: bool = False  # k_center: ours, not in the paper
    smooth_attention: tuple[tuple[float, float], ...] = ()
    smooth_outputs: tuple[str, ...] = ()  # consumers: "self_attn.o_proj", "mlp.down_proj"
    smooth_output_alphas: tuple[tuple[float, float], ...] = ()
    rotate_heads: bool = False  # v and o_proj, Hadamard per head
    rotate_keys: bool = False  # q and k after RoPE, at run time
    reorder: tuple[str, ...] = ()  # consumers whose input channels are sorted by absmax
    search_range: bool = False  # clipping
    gptq: bool = False
    damping: float = 0.01
    compensate: float = 0.0  # strength of the correction for errors made upstream
    refine_sweeps: int = 0  # coordinate descent after GPTQ
    lm_head_bits: int = 8

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields, as stored in a checkpoint's quantization_config."""
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Recipe":
        """Inverse of to_dict; unknown or ill-typed fields raise SchemeError."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise SchemeError(f"Unknown recipe fields {unknown}; known: {sorted(known)}.")
        values: dict[str, Any] = {}
        for key, value in data.items():
            default = getattr(cls, key, "")
            number = isinstance(default, float) and type(value) is int
            listed = isinstance(default, tuple) and isinstance(value, list | tuple)
            if not (number or listed or type(value) is type(default)):  # true is no number
                raise SchemeError(
                    f"Recipe field {key} must be a {type(default).__name__}, not {value!r}."
                )
            values[key] = tuple(map(_freeze, value)) if isinstance(default, tuple) else value
        return cls(**{"name": "custom", **values})

    def without(self, pass_name: str) -> "Recipe":
        """The same recipe with one pass off (leave-one-out tables, ``--without``)."""
        if pass_name not in PASS_NAMES:
            raise SchemeError(f"Unknown pass {pass_name!r}; passes: {', '.join(PASS_NAMES)}.")
        off: dict[str, Any] = {PASS_NAMES[pass_name]: type(getattr(self, PASS_NAMES[pass_name]))()}
        return replace(self, name=f"{self.name}-without-{pass_name}", **off)


def _freeze(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


# What a pass is called on the command line and in tables -> the field that switches it, in order.
PASS_NAMES = {
    "rotate": "rotate",
    "center-keys": "center_keys",
    "smooth-attention": "smooth_attention",
    "smooth-outputs": "smooth_outputs",
    "rotate-heads": "rotate_heads",
    "rotate-keys": "rotate_keys",
    "reorder": "reorder",
    "search-range": "search_range",
    "gptq": "gptq",
    "compensate": "compensate",
    "refine": "refine_sweeps",
}

O_PROJ, DOWN_PROJ = "self_attn.o_proj", "mlp.down_proj"
_STEPS = tuple(round(0.1 * i, 1) for i in range(1, 11))
# Scaling a channel up by t scales |X_c| by t and |W_c| by 1/t, so any alpha + beta = 1 undoes it
# exactly; alpha alone (beta 0) is the paper's default for keys.
_BALANCED = tuple((a, round(1 - a, 1)) for a in _STEPS)
_KEYS = _BALANCED + tuple((a, 0.0) for a in _STEPS[2:])

RTN = Recipe("rtn")
QOQ = Recipe(
    "qoq",
    rotate=True,
    center_keys=True,
    smooth_attention=_KEYS,
    smooth_outputs=(O_PROJ, DOWN_PROJ),
    smooth_output_alphas=_BALANCED,
    search_range=True,
    gptq=True,
    compensate=1.0,
    refine_sweeps=2,
)
PUBLISHED_G128 = Recipe(
    "published-g128",
    rotate=True,
    rotate_heads=True,
    reorder=(DOWN_PROJ,),
    smooth_attention=((0.5, 0.0),),
    smooth_outputs=(DOWN_PROJ,),
    smooth_output_alphas=((0.3, 0.7),),
    gptq=True,
    lm_head_bits=16,
)
PUBLISHED_PER_CHANNEL = replace(
    PUBLISHED_G128,
    name="published-per-channel",
    reorder=(),
    smooth_output_alphas=((0.1, 0.9),),
    search_range=True,
)
RECIPES = {r.name: r for r in (QOQ, RTN, PUBLISHED_G128, PUBLISHED_PER_CHANNEL)}


def load_recipe(name: str, scheme: QuantScheme) -> Recipe:
    """A recipe by name or from a JSON file; "published" picks the one for the scheme's weights."""
    if name == "published":
        name = PUBLISHED_G128.name if scheme.weight.group_size else PUBLISHED_PER_CHANNEL.name
    if name in RECIPES:
        return RECIPES[name]
    path = Path(name)
    if path.suffix == ".json" and path.is_file():
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SchemeError(f"Recipe file {path} cannot be read as JSON: {error}.") from error
        if not isinstance(data, dict):
            raise SchemeError(f"Recipe file {path} must hold one JSON object.")
        return Recipe.from_dict(data)
    raise SchemeError(
        f"Unknown recipe {name!r}; known: published, {', '.join(RECIPES)}, or a .json file."
    )
