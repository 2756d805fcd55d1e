"""Block: the fp32 tensors of one decoder layer while passes change them, and what they learned."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qoq.formats.scheme import FLOAT_SCHEME
from qoq.models.anatomy import layer_prefix, source_layer_tensors
from qoq.models.config import ModelConfig
from qoq.models.decoder import DecoderLayer, build_layer


@dataclass
class Block:
    """One layer. ``tensors`` maps names relative to the layer ("mlp.up_proj.weight") to fp32.

    ``k_center`` fp32 [Hkv, D] is set by the centering pass; ``k_rotation`` fp32 [D, D] by recipe.
    ``notes`` collects per-pass facts for the report (plain numbers and lists of numbers).
    """

    config: ModelConfig
    index: int
    tensors: dict[str, Tensor]
    k_center: Tensor | None = None
    k_rotation: Tensor | None = None
    notes: dict[str, object] = field(default_factory=dict)

    @classmethod
    def load(cls, config: ModelConfig, index: int, get: Callable[[str], Tensor]) -> "Block":
        """Read one layer from a source, nothing else."""
        prefix = layer_prefix(index)
        names = source_layer_tensors(config, index)
        tensors = {n.removeprefix(prefix): get(n).to(torch.float32) for n in names}
        return cls(config, index, tensors)

    def weight(self, linear: str) -> Tensor:
        return self.tensors[f"{linear}.weight"]

    def scale_outputs(self, linear: str, factor: Tensor) -> None:
        """Multiply a linear's output channels by factor [N], its bias with them."""
        self.tensors[f"{linear}.weight"] = self.weight(linear) * factor[:, None]
        if f"{linear}.bias" in self.tensors:
            self.tensors[f"{linear}.bias"] = self.tensors[f"{linear}.bias"] * factor

    def scale_inputs(self, linear: str, factor: Tensor) -> None:
        """Multiply a linear's input channels by factor [K]."""
        self.tensors[f"{linear}.weight"] = self.weight(linear) * factor

    def float_layer(self) -> DecoderLayer:
        """This block as it now stands, in full precision, as the decoder runs it.

        Centering and key rotation are left out: they change nothing in full precision.
        """
        prefix = layer_prefix(self.index)
        return build_layer(
            self.config, FLOAT_SCHEME, self.index, lambda n: self.tensors[n.removeprefix(prefix)]
        )
