"""A decoder of random packed weights: real shapes and formats, without a checkpoint.

Made tensor by tensor and laid out for the backend at once, so an 8B model never needs more memory
than its packed size. Activations stay of ordinary size, so every step does ordinary work.
"""

from dataclasses import replace

import torch
from torch import Tensor

from qoq.formats.scheme import QuantScheme, WeightFormat
from qoq.formats.weights import PackedWeight, packed_type
from qoq.kernels.linear import prepare
from qoq.kernels.prepared import PreparedWeight
from qoq.models.anatomy import packed_linear_tensors, packed_tensors
from qoq.models.config import ModelConfig
from qoq.models.decoder import Decoder, build_decoder


def random_decoder(
    config: ModelConfig,
    scheme: QuantScheme,
    *,
    backend: str = "auto",
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Decoder:
    """A decoder of ``config``'s shapes whose weights are random codes of ``scheme``."""
    config = replace(config, tie_word_embeddings=False)
    generator = torch.Generator(device).manual_seed(seed)
    expected = packed_tensors(config, scheme, k_center=False)

    def get(name: str) -> Tensor:
        shape, dtype = expected[name]
        return _random(name, shape, dtype, generator)

    return build_decoder(config, scheme, get, backend=backend)


def random_linears(
    n: int, k: int, fmt: WeightFormat, least_bytes: int, *, backend: str = "auto", seed: int = 0
) -> tuple[list[PackedWeight | PreparedWeight], int]:
    """Copies of one packed weight [n, k], prepared for ``backend``, and the size of each in bytes.

    As many as make ``least_bytes`` together, each in memory of its own.
    """
    weight = random_weight(n, k, fmt, seed=seed)
    size = sum(tensor.nbytes for tensor in weight.tensors().values())
    return [prepare(weight, backend) for _ in range(-(-least_bytes // size))], size


def random_weight(
    n: int, k: int, fmt: WeightFormat, *, device: torch.device | str = "cpu", seed: int = 0
) -> PackedWeight:
    """One packed weight [n, k]."""
    generator = torch.Generator(device).manual_seed(seed)
    return packed_type(fmt)(
        **{
            name.rsplit(".", 1)[1]: _random(name, shape, dtype, generator)
            for name, (shape, dtype) in packed_linear_tensors("weight", n, k, fmt).items()
        }
    )


def _random(
    name: str, shape: tuple[int, ...], dtype: torch.dtype | None, generator: torch.Generator
) -> Tensor:
    """Values as a quantizer might choose them for weights of standard deviation 0.02."""
    kind, device = name.rsplit(".", 1)[1], generator.device

    def integers(low: int, high: int) -> Tensor:
        return torch.randint(low, high, shape, dtype=dtype, generator=generator, device=device)

    if kind == "codes":
        return integers(-127, 128) if dtype == torch.int8 else integers(0, 256)
    if kind == "group_scale":
        return integers(10, 17)
    if kind == "group_offset":
        # With a scale of at most 16, code 15 gives at most 240 - 119 + 6 = 127.
        return integers(-119, -113)
    if kind in ("channel_scale", "scale"):
        step = 0.07 / 127 if kind == "channel_scale" or "lm_head" in name else 0.07 * 2 / 15
        return torch.full(shape, step, dtype=dtype or torch.float32, device=device)
    if kind == "offset":
        return torch.full(shape, -0.07, device=device)
    if "norm" in name:
        return torch.ones(shape, device=device)
    return torch.randn(shape, generator=generator, device=device).to(torch.bfloat16) * 0.02
