"""C++ twins of qoq's ops. Use them through qoq.kernels."""

from collections.abc import Sequence

class Backend:
    """The kernels of one instruction set, and their threads."""

    def __init__(self, isa: str, threads: int) -> None: ...
    @property
    def isa(self) -> str: ...
    @property
    def threads(self) -> int: ...

class Tiles:
    """A packed weight in tile order."""

    @staticmethod
    def from_int8(n: int, k: int, codes: int, scale: int) -> Tiles: ...
    @staticmethod
    def from_channels(n: int, k: int, codes: int, scale: int, offset: int) -> Tiles: ...
    @staticmethod
    def from_groups(
        n: int,
        k: int,
        group: int,
        codes: int,
        channel_scale: int,
        group_scale: int,
        group_offset: int,
    ) -> Tiles: ...
    @property
    def nbytes(self) -> int: ...

def usable_isas() -> list[str]: ...
def linear(
    backend: Backend,
    tiles: Tiles,
    m: int,
    codes: int,
    act_scale: int,
    row_sum: int,
    bias: int,
    out: int,
) -> None: ...
def attention(
    backend: Backend,
    sizes: Sequence[int],
    q: int,
    k: tuple[int, int, int, int],
    v: tuple[int, int, int, int],
    page_table: int,
    kv_lens: int,
    cu_seqlens_q: int,
    sm_scale: float,
    window: int,
    out: int,
) -> None: ...
def act_quant(
    arg0: Backend, arg1: int, arg2: int, arg3: int, arg4: int, arg5: tuple[int, int, int, int], /
) -> None: ...
def rms_norm_quant(
    arg0: Backend,
    arg1: int,
    arg2: int,
    arg3: int,
    arg4: int,
    arg5: int,
    arg6: int,
    arg7: int,
    arg8: float,
    arg9: int,
    arg10: tuple[int, int, int, int],
    /,
) -> None: ...
def silu_mul_quant(
    arg0: Backend, arg1: int, arg2: int, arg3: int, arg4: int, arg5: tuple[int, int, int, int], /
) -> None: ...
def spin_products(backend: Backend, rounds: int) -> int: ...
def read_all(backend: Backend, memory: int, bytes: int) -> None: ...
def kv_append(
    arg0: Backend,
    arg1: int,
    arg2: int,
    arg3: int,
    arg4: int,
    arg5: int,
    arg6: tuple[int, int],
    arg7: tuple[int, int],
    arg8: tuple[int, int],
    arg9: int,
    arg10: int,
    arg11: int,
    arg12: int,
    arg13: int,
    arg14: int,
    arg15: int,
    arg16: int,
    arg17: tuple[int, int, int, int],
    arg18: tuple[int, int, int, int],
    /,
) -> None: ...
def sample(
    arg0: Backend,
    arg1: int,
    arg2: int,
    arg3: int,
    arg4: int,
    arg5: int,
    arg6: int,
    arg7: int,
    arg8: int,
    arg9: int,
    arg10: int,
    arg11: int,
    arg12: int,
    /,
) -> None: ...
