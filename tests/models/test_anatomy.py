"""The anatomy names exactly the tensors that transformers' own models hold."""

from typing import Any

import pytest
import torch

from helpers.families import VARIANTS, make_family_model
from qoq.errors import UnsupportedModelError
from qoq.formats.scheme import QuantScheme
from qoq.models import anatomy
from qoq.models.config import ModelConfig


def config_of(model: Any) -> ModelConfig:
    raw = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    return ModelConfig.from_hf(raw)


@pytest.mark.parametrize("name", VARIANTS)
def test_source_tensors_are_the_models_own(name: str) -> None:
    model = make_family_model(name)
    own = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        own.pop("lm_head.weight")
    assert anatomy.source_tensors(config_of(model)) == own


def test_edges_fit_together() -> None:
    config = config_of(make_family_model("qwen3-windows-biased"))
    specs = {spec.name: spec for spec in anatomy.layer_linears(config)}
    grouped = [name for names in anatomy.INPUTS.values() for name in names]
    assert grouped == list(specs)
    for tap, names in anatomy.INPUTS.items():
        assert all(specs[name].input == tap for name in names)
    for norm, readers in anatomy.NORM_READERS.items():
        size = anatomy.layer_norms(config)[norm]
        assert {specs[name].in_features for name in readers} == {size}
    for name in anatomy.RESIDUAL_WRITERS:
        assert specs[name].out_features == config.hidden_size
    v, o = (specs[name] for name in anatomy.PAIRS[0])
    assert o.in_features == v.out_features * config.num_heads // config.num_kv_heads
    up, down = (specs[name] for name in anatomy.PAIRS[1])
    assert up.out_features == down.in_features


def test_packed_tensors_per_scheme() -> None:
    config = config_of(make_family_model("qwen2-windows-tied"))  # hidden 96, inner 160
    key = "model.layers.2.mlp.down_proj"

    def of(scheme: str, k_center: bool = True) -> dict[str, Any]:
        tensors = anatomy.packed_tensors(config, QuantScheme.parse(scheme), k_center)
        found = {n.removeprefix(key): v for n, v in tensors.items() if n.startswith(key)}
        assert ("model.layers.0.self_attn.k_center" in tensors) == k_center
        assert tensors["model.layers.0.self_attn.q_proj.bias"] == ((96,), torch.float32)
        assert any(n.startswith("lm_head.") for n in tensors)  # stored although tied
        return found

    assert of("w4a8kv4-g32") == {
        ".codes": ((96, 80), torch.uint8),
        ".channel_scale": ((96,), torch.float32),
        ".group_scale": ((96, 5), torch.uint8),
        ".group_offset": ((96, 5), torch.int8),
    }
    assert of("w4a8kv4", False) == {
        ".codes": ((96, 80), torch.uint8),
        ".scale": ((96,), torch.float32),
        ".offset": ((96,), torch.float32),
    }
    assert of("w8a8") == {
        ".codes": ((96, 160), torch.int8),
        ".scale": ((96,), torch.float32),
    }
    assert of("w16a16") == {".weight": ((96, 160), None)}


def test_groups_that_do_not_divide() -> None:
    config = config_of(make_family_model("qwen2"))
    with pytest.raises(UnsupportedModelError, match=r"q_proj has 96 input channels.*64"):
        anatomy.packed_tensors(config, QuantScheme.parse("w4a8kv4-g64"), False)
    odd = config_of(make_family_model("qwen2", intermediate_size=161))
    with pytest.raises(UnsupportedModelError, match="down_proj has 161"):
        anatomy.packed_tensors(odd, QuantScheme.parse("w4a8kv4"), False)
