"""A decoder's forward pass stays on its device and never asks it anything.

The device is torch's "meta", whose tensors have no numbers: reading one raises, and an op that
takes or makes a tensor elsewhere is seen.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helpers.tiny import TWO_LAYERS
from qoq.formats.scheme import QuantScheme
from qoq.kvcache.pool import KVPool
from qoq.models import decoder as module
from qoq.models.anatomy import packed_tensors
from qoq.models.batch import BatchShape
from qoq.models.config import ModelConfig
from qoq.models.decoder import Decoder, build_decoder

META = torch.device("meta")
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
QWEN = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
VARIANTS = {"plain": {}, "yarn": {"rope_scaling": YARN}, "dynamic": {"rope_scaling": DYNAMIC}}


class Watch(TorchDispatchMode):
    """Fails where an op takes or makes a tensor on another device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, out)):
            if isinstance(leaf, Tensor):
                assert leaf.device == META, f"{func} on {leaf.device}"
        return out


def decoder_of(config: ModelConfig, scheme: QuantScheme) -> Decoder:
    expected = packed_tensors(config, scheme, k_center=True)

    def get(name: str) -> Tensor:
        shape, dtype = expected[name]
        return torch.empty(shape, dtype=dtype or torch.bfloat16, device=META)

    return build_decoder(config, scheme, get, True, names=set(expected), backend="oracle")


@pytest.mark.parametrize("scheme", ["w4a8kv4-g32", "w4a8kv4", "w8a8kv8"])
@pytest.mark.parametrize("variant", [*VARIANTS, "qwen3"])
def test_a_forward_pass_stays_on_its_device(
    scheme: str, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ModelConfig.from_hf(
        {**TWO_LAYERS, **(QWEN if variant == "qwen3" else VARIANTS[variant])}
    )
    parsed = QuantScheme.parse(scheme)
    decoder = decoder_of(config, parsed)
    # Their oracles read lengths; the twins that stand in for them on a GPU do not.
    monkeypatch.setattr(module, "kv_append", lambda q, *_, **__: q.float())
    monkeypatch.setattr(module, "attention", lambda q, *_, **__: torch.zeros_like(q))
    pool = KVPool(parsed.kv, 2, 4, 2, 16, 16, device=META)
    shape = BatchShape(tokens=5, sequences=2, pages=3)
    batch = shape.views(shape.flat(META))
    decoder(batch, pool.layers, backend="oracle")  # what is made once may come from the CPU
    rows = torch.zeros(2, dtype=torch.int64, device=META)
    with Watch():
        logits = decoder(batch, pool.layers, rows, backend="oracle")
        every = decoder(batch, pool.layers, backend="oracle")
    assert logits.shape == (2, 61)
    assert every.shape == (5, 61)
    assert logits.device == META


def test_the_watch_sees_what_strays() -> None:
    with pytest.raises(AssertionError, match="on cpu"), Watch():
        torch.zeros(3)
