"""ModelConfig: both spellings read alike; whatever cannot be honoured is refused by name."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qoq.errors import UnsupportedModelError
from qoq.models.config import ModelConfig
from qoq.models.families import FAMILIES, NEUTRAL, REFUSED
from qoq.models.rope import cos_sin

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 77,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "bos_token_id": 5,
    "eos_token_id": [6, 7],
}


def config_with(base: dict[str, Any] = LLAMA, **changes: Any) -> dict[str, Any]:
    raw = copy.deepcopy(base)
    raw.update(changes)
    return {key: value for key, value in raw.items() if value is not ...}


def of_family(architecture: str, **changes: Any) -> dict[str, Any]:
    model_type = FAMILIES[architecture].model_type
    return config_with(architectures=[architecture], model_type=model_type, **changes)


def test_plain_llama() -> None:
    config = ModelConfig.from_hf(LLAMA)
    assert (config.head_dim, config.q_size, config.kv_size) == (16, 96, 32)
    assert config.rope.theta == 10000.0
    assert config.rope.type == "default"
    assert config.sliding_window == (None, None, None)
    assert (config.bos_token_id, config.eos_token_ids) == (5, (6, 7))
    assert config.sm_scale == 0.25
    biases = (config.qkv_bias, config.o_bias, config.mlp_bias)
    assert (config.tie_word_embeddings, biases) == (False, (False,) * 3)


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ({"type": "linear", "factor": 4.0}, "linear"),
        ({"rope_type": "dynamic", "factor": 2.0}, "dynamic"),
        ({"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 16}, "yarn"),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
            "llama3",
        ),
        (None, "default"),
    ],
)
def test_old_and_new_spelling_agree(scaling: dict[str, Any] | None, expected: str) -> None:
    old = config_with(rope_scaling=scaling, rope_theta=5e5, torch_dtype="bfloat16")
    new_rope = {"rope_type": expected, "rope_theta": 5e5, **(scaling or {})}
    new_rope.pop("type", None)
    new = config_with(rope_parameters=new_rope, dtype="bfloat16")
    assert ModelConfig.from_hf(old) == ModelConfig.from_hf(new)
    assert ModelConfig.from_hf(old).rope.type == expected
    assert ModelConfig.from_hf(old).rope.theta == 5e5


def test_trained_length_of_yarn_and_its_implied_factor() -> None:
    rope = {"rope_type": "yarn", "original_max_position_embeddings": 16}
    config = ModelConfig.from_hf(config_with(rope_scaling=rope))
    assert (config.rope.original_max_positions, config.rope.factor) == (16, 4.0)
    stated = ModelConfig.from_hf(
        config_with(rope_scaling={**rope, "factor": 3.0, "attention_factor": 0.7})
    )
    assert (stated.rope.factor, stated.rope.attention_scale) == (3.0, 0.7)


def test_context_includes_scaling_that_configs_leave_out() -> None:
    def longest(**rope: Any) -> int:
        return ModelConfig.from_hf(config_with(rope_scaling=rope)).max_positions

    assert longest(rope_type="dynamic", factor=2.0) == 128
    assert longest(rope_type="yarn", factor=4.0, original_max_position_embeddings=64) == 256
    assert longest(rope_type="yarn", factor=4.0, original_max_position_embeddings=16) == 64
    assert longest(rope_type="linear", factor=2.0) == 64
    assert longest(rope_type="llama3", factor=8.0) == 64


# Real configs, shortened to what is read, with what must come out.
REAL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Llama-2-7b": (
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "max_position_embeddings": 4096,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 32,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": None,
            "tie_word_embeddings": False,
            "vocab_size": 32000,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "torch_dtype": "float16",
        },
        {"head_dim": 128, "num_kv_heads": 32, "eos_token_ids": (2,), "max_positions": 4096},
    ),
    "Llama-3.2-1B": (
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "attention_bias": False,
            "head_dim": 64,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "num_attention_heads": 32,
            "num_hidden_layers": 16,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
            "vocab_size": 128256,
            "bos_token_id": 128000,
            "eos_token_id": [128001, 128008, 128009],
        },
        {
            "tie_word_embeddings": True,
            "max_positions": 131072,
            "eos_token_ids": (128001, 128008, 128009),
        },
    ),
    "Mistral-7B-v0.1": (
        {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "tie_word_embeddings": False,
            "vocab_size": 32000,
        },
        {"sliding_window": (4096,) * 32, "num_kv_heads": 8, "eos_token_ids": (2,)},
    ),
    "Qwen2.5-7B-with-YaRN": (
        {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "hidden_act": "silu",
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "max_position_embeddings": 32768,
            "max_window_layers": 28,
            "num_attention_heads": 28,
            "num_hidden_layers": 28,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "rope_scaling": {
                "factor": 4.0,
                "original_max_position_embeddings": 32768,
                "type": "yarn",
            },
            "sliding_window": 131072,
            "tie_word_embeddings": False,
            "use_sliding_window": False,
            "vocab_size": 152064,
            "eos_token_id": 151643,
        },
        {"max_positions": 131072, "qkv_bias": True, "sliding_window": (None,) * 28},
    ),
    "Qwen3-0.6B": (
        {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "attention_bias": False,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "max_position_embeddings": 40960,
            "max_window_layers": 28,
            "num_attention_heads": 16,
            "num_hidden_layers": 28,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
        {"q_size": 2048, "kv_size": 1024, "qk_norm": True, "qkv_bias": False},
    ),
}


@pytest.mark.parametrize("name", REAL)
def test_real_configs(name: str) -> None:
    raw, expected = REAL[name]
    config = ModelConfig.from_hf(raw)
    assert {key: getattr(config, key) for key in expected} == expected


def test_biases_follow_the_family() -> None:
    def biases(raw: dict[str, Any]) -> tuple[bool, bool, bool]:
        config = ModelConfig.from_hf(raw)
        return config.qkv_bias, config.o_bias, config.mlp_bias

    assert biases(config_with(attention_bias=True)) == (True, True, False)
    assert biases(config_with(mlp_bias=True)) == (False, False, True)
    # Qwen2's class has a q, k, v bias and no others, whatever the config says.
    assert biases(of_family("Qwen2ForCausalLM", attention_bias=False)) == (True, False, False)
    assert biases(of_family("Qwen3ForCausalLM")) == (False, False, False)
    assert biases(of_family("Qwen3ForCausalLM", attention_bias=True)) == (True, True, False)
    assert biases(of_family("MistralForCausalLM", attention_bias=True)) == (False, False, False)


def test_head_dim_rules() -> None:
    assert ModelConfig.from_hf(config_with(head_dim=80)).head_dim == 80
    assert ModelConfig.from_hf(config_with(head_dim=None)).head_dim == 16
    assert ModelConfig.from_hf(of_family("Qwen3ForCausalLM")).head_dim == 128
    assert ModelConfig.from_hf(of_family("Qwen3ForCausalLM")).qk_norm
    with pytest.raises(UnsupportedModelError, match="multiple of num_attention_heads"):
        ModelConfig.from_hf(config_with(hidden_size=97))
    with pytest.raises(UnsupportedModelError, match="head_dim 15"):
        ModelConfig.from_hf(config_with(head_dim=15))


def test_kv_heads_rules() -> None:
    assert ModelConfig.from_hf(config_with(num_key_value_heads=...)).num_kv_heads == 6
    assert ModelConfig.from_hf(config_with(num_key_value_heads=None)).num_kv_heads == 6
    mistral = of_family("MistralForCausalLM", num_key_value_heads=..., num_attention_heads=8)
    assert ModelConfig.from_hf(mistral).num_kv_heads == 8
    with pytest.raises(UnsupportedModelError, match="not a multiple of num_key_value_heads"):
        ModelConfig.from_hf(config_with(num_key_value_heads=4))


def test_sliding_window_rules() -> None:
    def windows(raw: dict[str, Any]) -> tuple[int | None, ...]:
        return ModelConfig.from_hf(raw).sliding_window

    mistral, qwen = "MistralForCausalLM", "Qwen2ForCausalLM"
    assert windows(of_family(mistral)) == (4096,) * 3
    assert windows(of_family(mistral, sliding_window=7)) == (7,) * 3
    assert windows(of_family(mistral, sliding_window=None)) == (None,) * 3
    # A Llama class never reads the key.
    assert windows(config_with(sliding_window=7)) == (None,) * 3
    assert windows(of_family(qwen, sliding_window=7, max_window_layers=1)) == (None,) * 3
    on = {"use_sliding_window": True, "sliding_window": 7}
    assert windows(of_family(qwen, **on, max_window_layers=1)) == (None, 7, 7)
    assert windows(of_family(qwen, **on, max_window_layers=0)) == (7, 7, 7)
    assert windows(of_family(qwen, **on)) == (None,) * 3
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    assert windows(of_family(qwen, **on, layer_types=types)) == (7, None, 7)
    with pytest.raises(UnsupportedModelError, match="switches windows off"):
        windows(of_family(qwen, layer_types=types))
    with pytest.raises(UnsupportedModelError, match="mix windows"):
        windows(of_family(mistral, sliding_window=7, layer_types=types))
    with pytest.raises(UnsupportedModelError, match="chunked_attention"):
        windows(of_family(qwen, **on, layer_types=["chunked_attention"] * 3))
    with pytest.raises(UnsupportedModelError, match="names 1 layers"):
        windows(of_family(qwen, **on, layer_types=["full_attention"]))


def test_token_ids() -> None:
    def ids(**changes: Any) -> tuple[int | None, tuple[int, ...]]:
        config = ModelConfig.from_hf(config_with(**changes))
        return config.bos_token_id, config.eos_token_ids

    assert ids(bos_token_id=0, eos_token_id=9) == (0, (9,))
    assert ids(bos_token_id=None, eos_token_id=None) == (None, ())
    assert ids(bos_token_id=..., eos_token_id=...) == (1, (2,))  # the Llama class's own


@pytest.mark.parametrize("name", [*REFUSED, "BrandNewForCausalLM", "LlamaForTokenClassification"])
def test_other_architectures_are_refused_by_name(name: str) -> None:
    raw = config_with(architectures=[name], model_type="x")
    with pytest.raises(UnsupportedModelError, match=name) as error:
        ModelConfig.from_hf(raw)
    assert REFUSED.get(name, "Supported") in str(error.value)


def test_model_type_decides_where_no_architecture_is_listed() -> None:
    raw = config_with(architectures=..., model_type="qwen3")
    assert ModelConfig.from_hf(raw).architecture == "Qwen3ForCausalLM"
    with pytest.raises(UnsupportedModelError, match="mamba"):
        ModelConfig.from_hf(config_with(architectures=None, model_type="mamba"))
    with pytest.raises(UnsupportedModelError, match="contradicts"):
        ModelConfig.from_hf(config_with(model_type="mistral"))


@pytest.mark.parametrize("key", NEUTRAL)
def test_foreign_features_are_refused_unless_switched_off(key: str) -> None:
    feature, neutral = NEUTRAL[key]
    for value in neutral:
        ModelConfig.from_hf(config_with(**{key: value}))
    with pytest.raises(UnsupportedModelError, match=key) as error:
        ModelConfig.from_hf(config_with(**{key: 0.5}))
    assert feature in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "gelu"),
        ({"quantization_config": {"quant_method": "gptq"}}, "already quantized .*gptq"),
        ({"compression_config": {"format": "int"}}, "already quantized"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "longrope"),
        ({"rope_scaling": {"type": "mrope", "rope_type": "default"}}, "default / mrope"),
        ({"rope_scaling": {"type": "linear"}}, "needs a factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "attn_factor": 1}}, "attn_factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor must be positive"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial rotary"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "per layer type"),
        (
            {
                "rope_scaling": {
                    "type": "dynamic",
                    "factor": 2,
                    "original_max_position_embeddings": 9,
                }
            },
            "Dynamic RoPE",
        ),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8, "high_freq_factor": 1.0}},
            "must be below",
        ),
        ({"hidden_size": ...}, "lacks hidden_size"),
        ({"vocab_size": "many"}, "vocab_size must be an integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be positive"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps must be a number"),
        ({"tie_word_embeddings": 1}, "true or false"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"rope_theta": 0.5}, "rope_theta must exceed 1"),
        ({"rope_scaling": {"type": "linear", "factor": 10**400}}, "factor"),
        ({"rope_scaling": [4.0]}, "rope_scaling must be an object"),
        ({"architectures": "LlamaForCausalLM"}, "list of names"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        ModelConfig.from_hf(config_with(**changes))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 300) | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)
READ_KEYS = [
    *(key for key in REAL["Qwen3-0.6B"][0] if key != "num_hidden_layers"),
    "layer_types",
    "quantization_config",
    "rope_parameters",
    "mlp_bias",
    "bos_token_id",
    "eos_token_id",
]


@given(
    changes=st.dictionaries(st.sampled_from(READ_KEYS), JSON, min_size=1, max_size=2),
    rope=st.dictionaries(
        st.sampled_from(["rope_type", "factor", "rope_theta", "mscale", "beta_fast", "type"]),
        st.sampled_from(["yarn", "dynamic", "llama3"]) | JSON,
        max_size=3,
    ),
    name=st.sampled_from(sorted(REAL)),
)
def test_any_json_is_read_or_refused(
    changes: dict[str, Any], rope: dict[str, Any], name: str
) -> None:
    raw = {**REAL[name][0], **changes}
    if rope:
        raw["rope_scaling"] = rope
    try:
        config = ModelConfig.from_hf(raw)
    except UnsupportedModelError:
        return
    assert len(config.sliding_window) == config.num_layers
    assert config.num_heads % config.num_kv_heads == 0
    for table in cos_sin(config.rope, torch.tensor([0, 5, 1000])):
        assert table.isfinite().all()


def test_our_own_checkpoints_are_read() -> None:
    ModelConfig.from_hf(config_with(quantization_config={"quant_method": "qoq"}))
