"""ModelConfig: the one reader of Hugging Face config keys; refuses what it cannot honour."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qoq.errors import UnsupportedModelError
from qoq.models.families import ALIASES, FAMILIES, NEUTRAL, REFUSED, Family
from qoq.models.rope import ROPE_TYPES, RopeConfig, yarn_attention_scale

_SUPPORTED = "Supported: Llama 1 to 3.2 and Yi, Mistral, Qwen1.5 to 2.5, Qwen3 (dense)"


@dataclass(frozen=True)
class ModelConfig:
    """Shapes and switches of one decoder. Example: Llama-3.2-1B has hidden_size 2048,
    intermediate_size 8192, num_layers 16, num_heads 32, num_kv_heads 8, head_dim 64.

    ``sliding_window`` holds one entry per layer: the window in tokens (a query sees its own
    position and window - 1 before it) or None. Norms are RMSNorm before each block, with
    ``rms_norm_eps``; ``qk_norm`` adds one per head on q and k, before RoPE. The MLP is SwiGLU.
    ``max_positions`` is the longest context, RoPE scaling included.
    """

    architecture: str
    model_type: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_window: tuple[int | None, ...]
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def sm_scale(self) -> float:
        """What attention scores are multiplied by before the softmax."""
        return 1 / math.sqrt(self.head_dim)

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> "ModelConfig":
        """Read a raw ``config.json``, in the old spelling (``rope_scaling``, ``rope_theta``) or
        that of transformers 5 (``rope_parameters``).

        Raises UnsupportedModelError that names the first thing that cannot be honoured.
        """
        architecture = _architecture(raw)
        family = FAMILIES[architecture]
        _refuse_features(raw)
        layers = _positive(raw, "num_hidden_layers")
        hidden, heads = _positive(raw, "hidden_size"), _positive(raw, "num_attention_heads")
        default_kv = heads if "num_key_value_heads" in raw else family.default_kv_heads or heads
        kv_heads = _positive(raw, "num_key_value_heads", default_kv)
        head_dim = _head_dim(raw, family, hidden, heads)
        if heads % kv_heads:
            raise UnsupportedModelError(
                f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}."
            )
        max_positions = _positive(raw, "max_position_embeddings", family.default_max_positions)
        rope = _rope(raw, head_dim, max_positions)
        attention_bias = _flag(raw, "attention_bias")
        return cls(
            architecture=architecture,
            model_type=family.model_type,
            hidden_size=hidden,
            intermediate_size=_positive(raw, "intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=_positive(raw, "vocab_size"),
            max_positions=_stretched(max_positions, rope),
            rms_norm_eps=_number(raw, "rms_norm_eps", 1e-6),
            rope=rope,
            tie_word_embeddings=_flag(raw, "tie_word_embeddings"),
            qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
            o_bias=attention_bias if family.o_bias is None else family.o_bias,
            mlp_bias=_flag(raw, "mlp_bias") if family.mlp_bias is None else family.mlp_bias,
            qk_norm=family.qk_norm,
            sliding_window=_windows(raw, family, layers),
            bos_token_id=_token_id(raw, "bos_token_id", family.default_bos),
            eos_token_ids=_token_ids(raw, "eos_token_id", family.default_eos),
        )


def _architecture(raw: Mapping[str, Any]) -> str:
    listed = raw.get("architectures") or []
    if not listed:
        by_type = {family.model_type: name for name, family in FAMILIES.items()}
        listed = [by_type.get(str(raw.get("model_type")), f"model_type {raw.get('model_type')!r}")]
    name = ALIASES.get(str(listed[0]), str(listed[0]))
    if len(listed) > 1 or name not in FAMILIES:
        shown = ", ".join(map(str, listed))
        reason = f": it has {REFUSED[name]}" if name in REFUSED else ""
        raise UnsupportedModelError(
            f"The architecture {shown} is not supported{reason}. {_SUPPORTED}."
        )
    model_type = raw.get("model_type", FAMILIES[name].model_type)
    if model_type != FAMILIES[name].model_type:
        raise UnsupportedModelError(
            f"config.json contradicts itself: architecture {name} with model_type {model_type!r}."
        )
    return name


def _refuse_features(raw: Mapping[str, Any]) -> None:
    """Everything that is wrong about the model as a whole, before any number is read."""
    for key in ("quantization_config", "compression_config"):
        method = (raw.get(key) or {}).get("quant_method", "an unnamed method")
        if raw.get(key) and method != "qoq":
            raise UnsupportedModelError(
                f"The model is already quantized ({key}: {method}); start from the original "
                "full-precision model."
            )
    for key, (feature, neutral) in NEUTRAL.items():
        if raw.get(key) not in neutral:
            raise UnsupportedModelError(f"{key} = {raw[key]!r} means {feature}, not supported.")
    act = raw.get("hidden_act") or "silu"
    if act not in ("silu", "swish"):
        raise UnsupportedModelError(f"hidden_act {act!r} is not supported; only silu is.")


def _head_dim(raw: Mapping[str, Any], family: Family, hidden: int, heads: int) -> int:
    default = family.default_head_dim
    if default is None:
        if raw.get("head_dim") is None and hidden % heads:
            raise UnsupportedModelError(
                f"hidden_size {hidden} is not a multiple of num_attention_heads {heads} and "
                "config.json states no head_dim."
            )
        default = hidden // heads
    head_dim = _positive(raw, "head_dim", default)
    if head_dim % 2 or head_dim < 4:
        raise UnsupportedModelError(f"head_dim {head_dim} is not supported; it must be even, >= 4.")
    return head_dim


def _windows(raw: Mapping[str, Any], family: Family, layers: int) -> tuple[int | None, ...]:
    """Sliding window per layer, as the family's own class would apply it."""
    if family.window_rule == "none":
        return (None,) * layers
    layer_types = raw.get("layer_types")
    if layer_types is not None:
        unknown = sorted({str(t) for t in layer_types} - {"full_attention", "sliding_attention"})
        if unknown:
            raise UnsupportedModelError(f"Layers of type {', '.join(unknown)} are not supported.")
        if len(layer_types) != layers:
            raise UnsupportedModelError(
                f"layer_types names {len(layer_types)} layers but num_hidden_layers is {layers}."
            )
    window: int | None = _positive(raw, "sliding_window", 4096)
    if raw.get("sliding_window", 4096) is None:  # null means none, unlike an absent key
        window = None
    if family.window_rule == "all":
        slides = [window is not None] * layers
        if layer_types is not None and slides != [t == "sliding_attention" for t in layer_types]:
            raise UnsupportedModelError(
                "layer_types that mix windows are not supported for Mistral; its own class applies "
                "sliding_window to every layer."
            )
        return (window,) * layers
    if not _flag(raw, "use_sliding_window"):
        window = None
    if layer_types is None:
        first = _integer(raw, "max_window_layers", 28)
        return tuple(window if i >= first else None for i in range(layers))
    if window is None and "sliding_attention" in layer_types:
        raise UnsupportedModelError(
            "layer_types names sliding_attention layers, but use_sliding_window or sliding_window "
            "switches windows off; make config.json consistent."
        )
    return tuple(window if t == "sliding_attention" else None for t in layer_types)


# Keys of a RoPE dictionary. The second line holds remarks that never change the computation.
_ROPE_KEYS = {"rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings"}
_ROPE_KEYS |= {"low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "truncate"}
_ROPE_KEYS |= {"attention_factor", "mscale", "mscale_all_dim", "partial_rotary_factor"}
_ROPE_KEYS |= {"finetuned"}


def _rope(raw: Mapping[str, Any], head_dim: int, max_positions: int) -> RopeConfig:
    rope = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise UnsupportedModelError("rope_parameters per layer type are not supported.")
    names = {str(rope[key]) for key in ("rope_type", "type") if rope.get(key) is not None}
    kind = names.pop() if len(names) == 1 else "default" if not names else " / ".join(sorted(names))
    if kind not in ROPE_TYPES:
        raise UnsupportedModelError(
            f"The RoPE type {kind!r} is not supported; supported are {', '.join(ROPE_TYPES)}."
        )
    unknown = sorted(set(rope) - _ROPE_KEYS)
    if unknown:
        raise UnsupportedModelError(f"Unknown RoPE parameters: {', '.join(unknown)}.")
    if rope.get("partial_rotary_factor") not in (1, None):
        raise UnsupportedModelError(
            f"partial_rotary_factor {rope['partial_rotary_factor']} means "
            f"{NEUTRAL['partial_rotary_factor'][0]}, not supported."
        )
    theta = _number(rope, "rope_theta", _number(raw, "rope_theta", 10000.0))
    trained = max_positions
    if kind in ("llama3", "yarn"):
        key = "original_max_position_embeddings"
        trained = _positive(raw, key, _positive(rope, key, max_positions))
    elif kind == "dynamic" and rope.get("original_max_position_embeddings", trained) != trained:
        raise UnsupportedModelError(
            "Dynamic RoPE with original_max_position_embeddings other than max_position_embeddings "
            "is read differently by different programs, so it is not supported."
        )
    if kind == "default":
        return RopeConfig(head_dim, theta, original_max_positions=trained)
    if rope.get("factor") is None and kind != "yarn":
        raise UnsupportedModelError(f"RoPE type {kind} needs a factor.")
    factor = _number(rope, "factor", max_positions / trained)
    low, high = _number(rope, "low_freq_factor", 1.0), _number(rope, "high_freq_factor", 4.0)
    if kind == "llama3" and not low < high:
        raise UnsupportedModelError(f"low_freq_factor {low} must be below high_freq_factor {high}.")
    scale = 1.0
    if kind == "yarn":
        mscale, all_dim = _optional(rope, "mscale"), _optional(rope, "mscale_all_dim")
        scale = _number(rope, "attention_factor", yarn_attention_scale(factor, mscale, all_dim))
    return RopeConfig(
        head_dim,
        theta,
        kind,
        factor,
        trained,
        scale,
        low,
        high,
        beta_fast=_optional(rope, "beta_fast") or 32.0,
        beta_slow=_optional(rope, "beta_slow") or 1.0,
        truncate=bool(rope.get("truncate", True)),
    )


def _stretched(max_positions: int, rope: RopeConfig) -> int:
    """The context a config means: dynamic and YaRN state the trained length and a factor, while
    linear and llama3 configs state the stretched length itself.
    """
    if rope.type not in ("dynamic", "yarn"):
        return max_positions
    return max(max_positions, round(rope.original_max_positions * rope.factor))


def _integer(raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """An integer >= 0; absent or null gives the default, or an error where there is none."""
    value = raw.get(key)
    value = default if value is None else value
    if value is None:
        raise UnsupportedModelError(f"config.json lacks {key}.")
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise UnsupportedModelError(f"{key} must be an integer, not {value!r}.")
    return value


def _positive(raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = _integer(raw, key, default)
    if value == 0:
        raise UnsupportedModelError(f"{key} must be positive.")
    return value


def _optional(raw: Mapping[str, Any], key: str) -> float | None:
    value = raw.get(key)
    if value is None:
        return None
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0:
        raise UnsupportedModelError(f"{key} must be a number >= 0, not {value!r}.")
    return float(value)


def _number(raw: Mapping[str, Any], key: str, default: float) -> float:
    """A positive finite number."""
    value = _optional(raw, key)
    value = default if value is None else value
    if value == 0:
        raise UnsupportedModelError(f"{key} must be positive.")
    return value


def _flag(raw: Mapping[str, Any], key: str) -> bool:
    value = raw.get(key)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise UnsupportedModelError(f"{key} must be true or false, not {value!r}.")
    return value


def _token_ids(raw: Mapping[str, Any], key: str, default: int | None) -> tuple[int, ...]:
    """One id or a list of them; null means none, an absent key the class's own default."""
    value = raw.get(key, default)
    ids = value if isinstance(value, (list, tuple)) else [value]
    return tuple(_integer({key: i}, key) for i in ids if i is not None)


def _token_id(raw: Mapping[str, Any], key: str, default: int | None) -> int | None:
    ids = _token_ids(raw, key, default)
    return ids[0] if ids else None
