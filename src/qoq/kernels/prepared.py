"""PreparedWeight: a packed weight in the layout of the twin that multiplies by it, made at load."""

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from qoq.formats.scheme import WeightFormat
from qoq.kernels.act_quant import Activation


class PreparedWeight(ABC):
    """What ``linear`` takes in place of a PackedWeight: bound to one twin, never on disk."""

    backend: ClassVar[str]
    shape: tuple[int, int]
    format: WeightFormat

    @abstractmethod
    def multiply(self, x: Activation, bias: Tensor | None) -> Tensor:
        """fp32 [M, N], as ``linear``."""
