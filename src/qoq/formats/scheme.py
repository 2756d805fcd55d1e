"""QuantScheme: which bit widths a checkpoint uses, and the one spelling of them.

Grammar: ``w{4,8,16}a{8,16}[kv{4,8,16} | k{4,8,16}v{4,8,16}][-g{32,64,128}]``, for example
``w4a8kv4-g128`` (the default), ``w4a8kv4`` (per-channel), ``w4a8k8v4-g128``, ``w8a8``.
A missing KV part means 16 bit. 16 stands for "not quantized".
"""

import re
from dataclasses import dataclass, replace

from qoq.errors import SchemeError

GROUP_SIZES = (32, 64, 128)
_PATTERN = re.compile(r"w(4|8|16)a(8|16)(?:kv(4|8|16)|k(4|8|16)v(4|8|16))?(?:-g(32|64|128))?")
_HINT = "Write it like w4a8kv4-g128, w4a8kv4, w4a8k8v4-g64, w8a8kv8 or w16a16."


@dataclass(frozen=True)
class WeightFormat:
    """How a linear's weight [N, K] is stored: 16 (float), 8 (int8 per channel) or 4 bits.

    ``group_size`` is None for one scale per output channel, else 32, 64 or 128 input channels
    (4 bits only; design: progressive two-level groups).
    """

    bits: int
    group_size: int | None = None

    def __post_init__(self) -> None:
        if self.bits not in (4, 8, 16):
            raise SchemeError(f"Weights of {self.bits} bits do not exist here; use 4, 8 or 16.")
        if self.group_size is not None and (self.bits != 4 or self.group_size not in GROUP_SIZES):
            raise SchemeError(
                f"Group size {self.group_size} with {self.bits}-bit weights does not exist; "
                f"groups of {GROUP_SIZES} go with 4-bit weights."
            )


@dataclass(frozen=True)
class KVFormat:
    """Bits of cached keys and values: 4 or 8 (per token and head, scale + offset) or 16 (float)."""

    k_bits: int
    v_bits: int

    def __post_init__(self) -> None:
        if self.k_bits not in (4, 8, 16) or self.v_bits not in (4, 8, 16):
            raise SchemeError(f"KV bits {self.k_bits}/{self.v_bits}: each must be 4, 8 or 16.")

    def __str__(self) -> str:
        if self.k_bits == self.v_bits:
            return f"kv{self.k_bits}"
        return f"k{self.k_bits}v{self.v_bits}"


@dataclass(frozen=True)
class QuantScheme:
    """Bit widths of weights, activations, KV cache and lm_head: all a server needs to know.

    ``lm_head`` is 8 bits (W8A8) whenever the decoder's linears are quantized in both weights and
    activations, else 16; pass it explicitly to choose otherwise.
    """

    weight: WeightFormat
    act_bits: int
    kv: KVFormat
    lm_head: WeightFormat

    def __post_init__(self) -> None:
        if self.act_bits not in (8, 16):
            raise SchemeError(f"Activations of {self.act_bits} bits do not exist; use 8 or 16.")
        if self.lm_head.bits == 4:
            raise SchemeError("lm_head is stored in 8 or 16 bits; 4 would cost accuracy.")

    @property
    def name(self) -> str:
        """The canonical spelling; ``QuantScheme.parse(s.name)`` restores all but ``lm_head``."""
        group = f"-g{self.weight.group_size}" if self.weight.group_size else ""
        kv = "" if self.kv == KVFormat(16, 16) else str(self.kv)
        return f"w{self.weight.bits}a{self.act_bits}{kv}{group}"

    def __str__(self) -> str:
        return self.name

    @classmethod
    def parse(cls, text: str, lm_head_bits: int | None = None) -> "QuantScheme":
        """Read a scheme name (case does not matter).

        Raises SchemeError with the grammar in the message.
        """
        match = _PATTERN.fullmatch(text.strip().lower())
        if match is None:
            raise SchemeError(f"Unknown scheme {text!r}. {_HINT}")
        weight_bits, act_bits, kv_bits, k_bits, v_bits, group = match.groups()
        weight = WeightFormat(int(weight_bits), int(group) if group else None)
        kv = KVFormat(int(k_bits or kv_bits or 16), int(v_bits or kv_bits or 16))
        if lm_head_bits is None:
            lm_head_bits = 8 if weight.bits < 16 and int(act_bits) < 16 else 16
        return cls(weight, int(act_bits), kv, WeightFormat(lm_head_bits))

    def with_kv(self, kv: KVFormat) -> "QuantScheme":
        """The same weights and activations over another KV cache format."""
        return replace(self, kv=kv)


FLOAT_SCHEME = QuantScheme.parse("w16a16")
DEFAULT_SCHEME = QuantScheme.parse("w4a8kv4-g128")
