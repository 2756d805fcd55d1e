"""What the scaling passes must know of a layer's activations: running maxima, moments, samples.

Nothing here grows with the amount of calibration text: maxima and moments are running, and a
fixed number of evenly spaced tokens is kept for searches.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from qoq.formats.hadamard import rotate_last
from qoq.kernels.kv_append import apply_rope
from qoq.models.config import ModelConfig

SAMPLE_TOKENS = 4096


@dataclass
class LayerStatistics:
    """Of the full-precision layer, over all calibration tokens (T) unless said otherwise.

    k_sum fp64 [Hkv, D] = sum of keys before RoPE; q_moment fp32 [Hkv, D, D] = sum of q q^T after
    RoPE over the query heads of each KV head; absmax of the inputs of o_proj [Hq*D] and down_proj
    [I], of q (over the group) and k after RoPE [Hkv, D]; ``keys``, ``values`` [n, Hkv, D] (after
    RoPE) and ``inputs``[linear] [n, K]: rows of about SAMPLE_TOKENS sampled tokens.
    """

    config: ModelConfig
    stride: int
    tokens: int = 0
    k_sum: Tensor | None = None
    q_moment: Tensor | None = None
    absmax: dict[str, Tensor] = field(default_factory=dict)
    samples: dict[str, list[Tensor]] = field(default_factory=dict)

    def add_heads(self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> None:
        """One chunk's heads before RoPE: q [T, Hq, D], k, v [T, Hkv, D]."""
        config = self.config
        k_sum = k.sum(dim=0, dtype=torch.float64)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        grouped = q.unflatten(1, (config.num_kv_heads, -1)).permute(1, 0, 2, 3).flatten(1, 2)
        moment = grouped.transpose(1, 2) @ grouped
        self.k_sum = k_sum if self.k_sum is None else self.k_sum + k_sum
        self.q_moment = moment if self.q_moment is None else self.q_moment + moment
        self._max("k", k.abs().amax(dim=0))
        self._max("q", grouped.abs().amax(dim=1))
        self._sample("keys", k)
        self._sample("values", v)
        self.tokens += k.shape[0]

    def add_inputs(self, linear: str, x: Tensor) -> None:
        """One chunk's rows [T, K] entering a linear."""
        self._max(linear, x.abs().amax(dim=0))
        self._sample(linear, x)

    def sample(self, name: str) -> Tensor:
        """The sampled rows of "keys", "values" or a linear's input."""
        return torch.cat(self.samples[name])

    def rotate_heads(self, linear: str) -> None:
        """Follow a rotation of the value heads; ``linear`` reads them mixed.

        Its absmax is then that of the sampled rows: maxima do not survive a rotation.
        """
        dim = self.config.head_dim
        self.samples["values"] = [rotate_last(v) for v in self.samples["values"]]
        self.samples[linear] = [
            rotate_last(x.unflatten(1, (-1, dim))).flatten(1) for x in self.samples[linear]
        ]
        self.absmax[linear] = self.sample(linear).abs().amax(dim=0)

    def _max(self, name: str, value: Tensor) -> None:
        old = self.absmax.get(name)
        self.absmax[name] = value if old is None else torch.maximum(old, value)

    def _sample(self, name: str, rows: Tensor) -> None:
        self.samples.setdefault(name, []).append(rows[:: self.stride].clone())
