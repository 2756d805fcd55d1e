"""Outlier twins: models of the same function whose channels differ wildly in size.

Large language models carry outliers that small ones lack. Each kind here multiplies some channels
of one tensor and divides the same factor out of the tensor that reads it, so full precision is
unchanged while whoever rounds the channels as they lie suffers.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from qoq.checkpoint.hf import HFSource
from qoq.checkpoint.writer import companion_files
from qoq.models.anatomy import NORM_READERS, layer_prefix, source_tensors
from qoq.models.config import ModelConfig

# Kind -> factors at strength 1, drawn between the two in the logarithm.
KINDS: dict[str, tuple[float, float]] = {
    "norms": (30.0, 100.0),  # norm gains, out of the linears that read them
    "keys": (20.0, 20.0),  # RoPE pairs of k, out of q
    "up": (30.0, 100.0),  # rows of up_proj, out of down_proj's columns
    "values": (20.0, 20.0),  # rows of v_proj, out of o_proj's columns
}
KEY_BIAS = 167.0  # what eight key channels of Qwen2-7B's first layer reach


@dataclass(frozen=True)
class Outliers:
    """``channels`` large ones per norm, per up_proj, and per KV head (pairs, for keys).

    Factors are those of KINDS times ``strength``; ``seed`` picks channels and factors.
    """

    kinds: tuple[str, ...] = tuple(KINDS)
    strength: float = 1.0
    channels: int = 4
    seed: int = 0


def write_twin(source: Path, out: Path, outliers: Outliers) -> Path:
    """The twin of the float model folder ``source`` as the new folder ``out``, in fp32."""
    raw, tensors = _read(source)
    return _write(source, out, raw, add_outliers(ModelConfig.from_hf(raw), tensors, outliers))


def add_outliers(
    config: ModelConfig, tensors: dict[str, Tensor], outliers: Outliers
) -> dict[str, Tensor]:
    """The twin's tensors from a model's, by Hugging Face names; fp32."""
    tensors = {name: tensor.to(torch.float64) for name, tensor in tensors.items()}
    random = torch.Generator().manual_seed(outliers.seed)
    for index in range(config.num_layers):
        twin = _Layer(config, index, tensors, outliers, random)
        for kind in outliers.kinds:
            getattr(twin, kind)()
    return {name: tensor.to(torch.float32) for name, tensor in tensors.items()}


@dataclass(frozen=True)
class _Layer:
    """One layer's tensors, changed in place of the dictionary; one method per kind."""

    config: ModelConfig
    index: int
    tensors: dict[str, Tensor]
    outliers: Outliers
    random: torch.Generator

    def norms(self) -> None:
        for norm, readers in NORM_READERS.items():
            factor = self._factors("norms", self.config.hidden_size)
            self._multiply(f"{norm}.weight", factor)
            for linear in readers:
                self._multiply(f"{linear}.weight", 1 / factor)

    def keys(self) -> None:
        config, half = self.config, self.config.head_dim // 2
        if config.qk_norm:
            factor = self._factors("keys", half).repeat(2)
            self._multiply("self_attn.k_norm.weight", factor)
            self._multiply("self_attn.q_norm.weight", 1 / factor)
            return
        heads = [self._factors("keys", half).repeat(2) for _ in range(config.num_kv_heads)]
        factor = torch.stack(heads)
        self._rows("self_attn.k_proj", factor.flatten())
        self._rows("self_attn.q_proj", 1 / self._per_query_head(factor))

    def up(self) -> None:
        factor = self._factors("up", self.config.intermediate_size)
        self._rows("mlp.up_proj", factor)
        self._multiply("mlp.down_proj.weight", 1 / factor)

    def values(self) -> None:
        config = self.config
        heads = [self._factors("values", config.head_dim) for _ in range(config.num_kv_heads)]
        factor = torch.stack(heads)
        self._rows("self_attn.v_proj", factor.flatten())
        self._multiply("self_attn.o_proj.weight", 1 / self._per_query_head(factor))

    def _factors(self, kind: str, size: int) -> Tensor:
        """Ones [size] but for the large channels."""
        low, high = (end * self.outliers.strength for end in KINDS[kind])
        chosen = torch.randperm(size, generator=self.random)[: self.outliers.channels]
        spread = torch.rand(len(chosen), generator=self.random, dtype=torch.float64)
        factors = torch.ones(size, dtype=torch.float64)
        factors[chosen] = low * (high / low) ** spread
        return factors

    def _per_query_head(self, factor: Tensor) -> Tensor:
        group = self.config.num_heads // self.config.num_kv_heads
        return factor.repeat_interleave(group, dim=0).flatten()

    def _rows(self, linear: str, factor: Tensor) -> None:
        self._multiply(f"{linear}.weight", factor[:, None])
        if layer_prefix(self.index) + f"{linear}.bias" in self.tensors:
            self._multiply(f"{linear}.bias", factor)

    def _multiply(self, name: str, factor: Tensor) -> None:
        self.tensors[layer_prefix(self.index) + name] *= factor


def write_qwen2(
    source: Path,
    out: Path,
    *,
    seed: int = 0,
    channels: int = 8,
    size: float = KEY_BIAS,
    layers: int = 1,
    outliers: Outliers | None = None,
) -> Path:
    """A Qwen2 made from a Llama folder: rope_theta 1e6, and key channels that are nearly constant.

    ``channels`` key channels of each of the first ``layers`` layers, on low-frequency RoPE pairs
    and spread over the KV heads, get a bias of about ``size`` either way. Theta and bias change
    the function: what quantization is compared with is this model in full precision.
    """
    raw, tensors = _read(source)
    if raw.get("model_type") != "llama" or raw.get("attention_bias"):
        raise ValueError(f"{source} is no Llama without biases")
    raw |= {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "rope_theta": 1e6,
        "use_sliding_window": False,
    }
    config = ModelConfig.from_hf(raw)
    random = torch.Generator().manual_seed(seed)
    for index in range(config.num_layers):
        for part, width in (("q", config.q_size), ("k", config.kv_size), ("v", config.kv_size)):
            tensors[f"{layer_prefix(index)}self_attn.{part}_proj.bias"] = torch.zeros(width)
    for index in range(layers):
        bias = _slow_bias(config, channels, size, random)
        tensors[f"{layer_prefix(index)}self_attn.k_proj.bias"] = bias
    if outliers is not None:
        tensors = add_outliers(config, tensors, outliers)
    return _write(source, out, raw, tensors)


def shorten(source: Path, out: Path, *, layers: int) -> Path:
    """The first layers of a float model as a model of its own."""
    raw, tensors = _read(source)
    raw |= {"num_hidden_layers": layers}
    kept = source_tensors(ModelConfig.from_hf(raw))
    return _write(source, out, raw, {name: tensors[name] for name in kept})


def _slow_bias(config: ModelConfig, channels: int, size: float, random: torch.Generator) -> Tensor:
    """A key bias [Hkv * D] with a few large entries, one per RoPE pair, on the slowest pairs."""
    bias = torch.zeros(config.num_kv_heads, 2, config.head_dim // 2)
    slow = bias.shape[2] // 4
    for i in range(channels):
        head, half = i % config.num_kv_heads, int(torch.randint(2, (), generator=random))
        free = (bias[head, :, -slow:] == 0).all(dim=0).nonzero()[:, 0]
        pair = free[int(torch.randint(len(free), (), generator=random))] - slow
        sign = 1 - 2 * int(torch.randint(2, (), generator=random))
        near = 0.9 + 0.2 * float(torch.rand((), generator=random))
        bias[head, half, pair] = sign * near * size
    return bias.flatten()


def _read(source: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    model = HFSource(source)
    names = source_tensors(ModelConfig.from_hf(model.config))
    return dict(model.config), {name: model.get(name).to(torch.float32) for name in names}


def _write(source: Path, out: Path, raw: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    out.mkdir(parents=True)
    save_file({n: t.contiguous() for n, t in tensors.items()}, out / "model.safetensors")
    raw = {key: value for key, value in raw.items() if key != "torch_dtype"}
    (out / "config.json").write_text(json.dumps({**raw, "dtype": "float32"}), encoding="utf-8")
    for name, path in companion_files(source).items():
        shutil.copyfile(str(path), out / name)
    return out
