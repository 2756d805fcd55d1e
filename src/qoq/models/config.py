"""ModelConfig: the one reader of Hugging Face config keys; refuses what it cannot honour."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qoq.errors import UnsupportedModelError
from qoq.models.families import ALIASES, FAMILIES, NEUTRAL, REFUSED, Family
from qoq.models.fields import (
    read_flag,
    read_integer,
    read_mapping,
    read_names,
    read_number,
    read_optional_number,
    read_positive,
    read_token_id,
    read_token_ids,
)
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
        layers = read_positive(raw, "num_hidden_layers")
        hidden, heads = read_positive(raw, "hidden_size"), read_positive(raw, "num_attention_heads")
        default_kv = heads if "num_key_value_heads" in raw else family.default_kv_heads or heads
        kv_heads = read_positive(raw, "num_key_value_heads", default_kv)
        head_dim = _head_dim(raw, family, hidden, heads)
        if heads % kv_heads:
            raise UnsupportedModelError(
                f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}."
            )
        max_positions = read_positive(raw, "max_position_embeddings", family.default_max_positions)
        rope = _rope(raw, head_dim, max_positions)
        attention_bias = read_flag(raw, "attention_bias")
        return cls(
            architecture=architecture,
            model_type=family.model_type,
            hidden_size=hidden,
            intermediate_size=read_positive(raw, "intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=read_positive(raw, "vocab_size"),
            max_positions=_stretched(max_positions, rope),
            rms_norm_eps=read_number(raw, "rms_norm_eps", 1e-6),
            rope=rope,
            tie_word_embeddings=read_flag(raw, "tie_word_embeddings"),
            qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
            o_bias=attention_bias if family.o_bias is None else family.o_bias,
            mlp_bias=read_flag(raw, "mlp_bias") if family.mlp_bias is None else family.mlp_bias,
            qk_norm=family.qk_norm,
            sliding_window=_windows(raw, family, layers),
            bos_token_id=read_token_id(raw, "bos_token_id", family.default_bos),
            eos_token_ids=read_token_ids(raw, "eos_token_id", family.default_eos),
        )


def _architecture(raw: Mapping[str, Any]) -> str:
    listed = read_names(raw, "architectures") or []
    if not listed:
        by_type = {family.model_type: name for name, family in FAMILIES.items()}
        listed = [by_type.get(str(raw.get("model_type")), f"model_type {raw.get('model_type')!r}")]
    name = ALIASES.get(listed[0], listed[0])
    if len(listed) > 1 or name not in FAMILIES:
        shown = ", ".join(listed)
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
        quantization = read_mapping(raw, key)
        method = quantization.get("quant_method", "an unnamed method")
        if quantization and method != "qoq":
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
    head_dim = read_positive(raw, "head_dim", default)
    if head_dim % 2 or head_dim < 4:
        raise UnsupportedModelError(f"head_dim {head_dim} is not supported; it must be even, >= 4.")
    return head_dim


def _windows(raw: Mapping[str, Any], family: Family, layers: int) -> tuple[int | None, ...]:
    """Sliding window per layer, as the family's own class would apply it."""
    if family.window_rule == "none":
        return (None,) * layers
    layer_types = read_names(raw, "layer_types")
    if layer_types is not None:
        unknown = sorted(set(layer_types) - {"full_attention", "sliding_attention"})
        if unknown:
            raise UnsupportedModelError(f"Layers of type {', '.join(unknown)} are not supported.")
        if len(layer_types) != layers:
            raise UnsupportedModelError(
                f"layer_types names {len(layer_types)} layers but num_hidden_layers is {layers}."
            )
    window: int | None = read_positive(raw, "sliding_window", 4096)
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
    if not read_flag(raw, "use_sliding_window"):
        window = None
    if layer_types is None:
        first = read_integer(raw, "max_window_layers", 28)
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
    rope = read_mapping(raw, "rope_scaling") or read_mapping(raw, "rope_parameters")
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
    theta = read_number(rope, "rope_theta", read_number(raw, "rope_theta", 10000.0))
    if theta <= 1:
        raise UnsupportedModelError(f"rope_theta must exceed 1, but is {theta}.")
    trained = max_positions
    if kind in ("llama3", "yarn"):
        key = "original_max_position_embeddings"
        trained = read_positive(raw, key, read_positive(rope, key, max_positions))
    elif kind == "dynamic" and rope.get("original_max_position_embeddings", trained) != trained:
        raise UnsupportedModelError(
            "Dynamic RoPE with original_max_position_embeddings other than max_position_embeddings "
            "is read differently by different programs, so it is not supported."
        )
    if kind == "default":
        return RopeConfig(head_dim, theta, original_max_positions=trained)
    if rope.get("factor") is None and kind != "yarn":
        raise UnsupportedModelError(f"RoPE type {kind} needs a factor.")
    factor = read_number(rope, "factor", max_positions / trained)
    low, high = (
        read_number(rope, "low_freq_factor", 1.0),
        read_number(rope, "high_freq_factor", 4.0),
    )
    if kind == "llama3" and not low < high:
        raise UnsupportedModelError(f"low_freq_factor {low} must be below high_freq_factor {high}.")
    scale = 1.0
    if kind == "yarn":
        mscale, all_dim = (
            read_optional_number(rope, "mscale"),
            read_optional_number(rope, "mscale_all_dim"),
        )
        scale = read_number(rope, "attention_factor", yarn_attention_scale(factor, mscale, all_dim))
    return RopeConfig(
        head_dim,
        theta,
        kind,
        factor,
        trained,
        scale,
        low,
        high,
        beta_fast=read_optional_number(rope, "beta_fast") or 32.0,
        beta_slow=read_optional_number(rope, "beta_slow") or 1.0,
        truncate=bool(rope.get("truncate", True)),
    )


def _stretched(max_positions: int, rope: RopeConfig) -> int:
    """The context a config means: dynamic and YaRN state the trained length and a factor, while
    linear and llama3 configs state the stretched length itself.
    """
    if rope.type not in ("dynamic", "yarn"):
        return max_positions
    return max(max_positions, round(rope.original_max_positions * rope.factor))
