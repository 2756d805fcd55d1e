"""The supported model families, one row each, and the reasons why others are refused."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """What a family's own model class fixes in code, and the defaults of absent config keys.

    ``qkv_bias`` and the like: True/False when the class fixes it, None when ``attention_bias``
    (``mlp_bias``) of the config decides. ``window_rule``: how sliding windows are chosen per layer:
    "none", "all" (every layer) or "above" (layers from ``max_window_layers`` on, if
    ``use_sliding_window``).
    """

    model_type: str
    qkv_bias: bool | None = False
    o_bias: bool | None = False
    mlp_bias: bool | None = False
    qk_norm: bool = False
    window_rule: str = "none"
    default_kv_heads: int | None = None  # None: as many as query heads
    default_head_dim: int | None = None  # None: hidden_size / num_attention_heads
    default_max_positions: int = 2048
    default_bos: int | None = None
    default_eos: int | None = None


FAMILIES: dict[str, Family] = {
    # Llama 1, 2, 3, 3.1, 3.2 and Yi.
    "LlamaForCausalLM": Family(
        "llama", qkv_bias=None, o_bias=None, mlp_bias=None, default_bos=1, default_eos=2
    ),
    "MistralForCausalLM": Family(
        "mistral",
        window_rule="all",
        default_kv_heads=8,
        default_max_positions=131072,
        default_bos=1,
        default_eos=2,
    ),
    # Qwen1.5, 2 and 2.5.
    "Qwen2ForCausalLM": Family(
        "qwen2",
        qkv_bias=True,
        window_rule="above",
        default_kv_heads=32,
        default_max_positions=32768,
    ),
    "Qwen3ForCausalLM": Family(
        "qwen3",
        qkv_bias=None,
        o_bias=None,
        qk_norm=True,
        window_rule="above",
        default_kv_heads=32,
        default_head_dim=128,
        default_max_positions=32768,
    ),
}

# The first Llama conversions spelt the class differently.
ALIASES = {"LLaMAForCausalLM": "LlamaForCausalLM"}

_MOE = "mixture-of-experts layers"
_POST_NORM = "normalization after the attention and MLP blocks"
_PARTIAL = "rotary embedding of a part of each head (partial rotary)"
_FUSED = "fused projections under other tensor names"

# Why a known architecture is refused; anything else is refused as unknown.
REFUSED: dict[str, str] = {
    "MixtralForCausalLM": _MOE,
    "Qwen2MoeForCausalLM": _MOE,
    "Qwen3MoeForCausalLM": _MOE,
    "DeepseekV2ForCausalLM": _MOE + " and latent attention",
    "DeepseekV3ForCausalLM": _MOE + " and latent attention",
    "GptOssForCausalLM": _MOE + " and attention sinks",
    "OlmoeForCausalLM": _MOE,
    "GemmaForCausalLM": "norm gains stored as 1 + w, a scaled embedding and GELU",
    "Gemma2ForCausalLM": _POST_NORM + " and soft-capped logits",
    "Gemma3ForCausalLM": _POST_NORM + " and a RoPE per layer type",
    "Gemma3ForConditionalGeneration": _POST_NORM + " and image inputs",
    "Olmo2ForCausalLM": _POST_NORM,
    "Olmo3ForCausalLM": _POST_NORM,
    "OlmoForCausalLM": "LayerNorm without gains",
    "Glm4ForCausalLM": _POST_NORM + "; " + _PARTIAL,
    "GlmForCausalLM": _PARTIAL,
    "PhiForCausalLM": "LayerNorm and parallel blocks; " + _PARTIAL,
    "Phi3ForCausalLM": _FUSED,
    "StableLmForCausalLM": "LayerNorm; " + _PARTIAL,
    "GPTNeoXForCausalLM": "LayerNorm and parallel blocks; " + _PARTIAL,
    "FalconForCausalLM": "LayerNorm and parallel blocks",
    "OPTForCausalLM": "LayerNorm and learned positions",
    "GPT2LMHeadModel": "LayerNorm and learned positions",
    "BloomForCausalLM": "LayerNorm and ALiBi positions",
    "MptForCausalLM": "LayerNorm and ALiBi positions",
    "CohereForCausalLM": "LayerNorm, parallel blocks and scaled logits",
    "Cohere2ForCausalLM": "LayerNorm, parallel blocks and scaled logits",
    "GraniteForCausalLM": "multipliers on embeddings, residuals, attention and logits",
    "MiniCPMForCausalLM": "multipliers on embeddings, residuals and logits",
    "InternLM2ForCausalLM": _FUSED,
    "BaichuanForCausalLM": _FUSED,
    "ChatGLMModel": _FUSED,
    "QWenLMHeadModel": _FUSED + " (Qwen 1; its successors Qwen1.5, 2, 2.5 and 3 work)",
    "YiForCausalLM": "the tensor names of Yi's first release (the Llama-format release works)",
    "MllamaForConditionalGeneration": "image inputs and cross-attention",
    "Llama4ForConditionalGeneration": _MOE + " and image inputs",
    "MambaForCausalLM": "state-space layers instead of attention",
}

# Config keys of features that would change the computation, with the values that switch them off.
# They catch variants that keep a supported class name.
NEUTRAL: dict[str, tuple[str, tuple[object, ...]]] = {
    "partial_rotary_factor": (_PARTIAL, (1, None)),
    "rotary_pct": (_PARTIAL, (1, None)),
    "num_local_experts": (_MOE, (0, 1, None)),
    "num_experts": (_MOE, (0, 1, None)),
    "n_routed_experts": (_MOE, (0, 1, None)),
    "final_logit_softcapping": ("soft-capped logits", (None,)),
    "attn_logit_softcapping": ("soft-capped attention scores", (None,)),
    "logit_scale": ("scaled logits", (1, None)),
    "logits_scaling": ("scaled logits", (1, None)),
    "residual_multiplier": ("scaled residuals", (1, None)),
    "embedding_multiplier": ("scaled embeddings", (1, None)),
    "attention_multiplier": ("a non-standard attention scale", (None,)),
    "query_pre_attn_scalar": ("a non-standard attention scale", (None,)),
    "clip_qkv": ("clipped q, k and v", (None,)),
    "use_parallel_residual": ("parallel attention and MLP blocks", (False, None)),
    "alibi": ("ALiBi positions", (False, None)),
    "no_rope_layers": ("layers without RoPE", (None,)),
    "num_kv_shared_layers": ("layers that share a KV cache", (0, None)),
    "is_encoder_decoder": ("an encoder", (False, None)),
    "add_cross_attention": ("cross-attention", (False, None)),
    "text_config": ("several modalities", (None,)),
    "vision_config": ("image inputs", (None,)),
}
