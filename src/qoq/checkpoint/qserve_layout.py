"""QServe's tile order of 4-bit codes and its orders of group parameters, to and from row-major.

Its kernels read weights in tensor-core fragment order, and its files hold that order. A tile is
32 output channels by 32 input channels, 512 bytes. With

    n mod 32 = 16 p + 8 n2 + nl      k mod 32 = 16 kp + 4 kl + kr

a code lies in byte ``(nl*4 + kl)*16 + (2*kp + n2)*4 + kr`` of its tile, in nibble p (0 is low).
"""

from typing import Literal

import torch
from torch import Tensor

from qoq.errors import CheckpointTensorError

TILE = 32
# How the group parameters of 32 channels are stored. "kernel": 0, 8, 16, 24, 1, 9, ..., which the
# kernels read. "pairs": 0, 8, 1, 9, ..., 7, 15, 16, 24, 17, ..., which a converter of 2025 wrote
# by mistake; the kernels compute nonsense from it.
ScaleOrder = Literal["kernel", "pairs"]
ORDERS: tuple[ScaleOrder, ...] = ("kernel", "pairs")


def check_tiles(name: str, rows: int, columns: int) -> None:
    """Raises CheckpointTensorError unless [rows, columns] codes divide into tiles."""
    if rows % TILE or columns % TILE or not rows or not columns:
        raise CheckpointTensorError(
            f"{name} is a weight of {rows} x {columns}; QServe's layout has tiles of 32 x 32 and "
            "cannot hold a size that is no multiple of them."
        )


def pack_tiles(codes: Tensor) -> Tensor:
    """Row-major codes uint8 [N, K] in 0..15 -> ``qweight`` int8 [N, K/2] in tile order."""
    n, k = codes.shape
    # [T, p, n2, nl, U, kp, kl, kr] -> [p, T, U, nl, kl, kp, n2, kr]
    tiles = codes.reshape(n // TILE, 2, 2, 8, k // TILE, 2, 4, 4)
    low, high = tiles.permute(1, 0, 4, 3, 6, 5, 2, 7).unbind(0)
    return (low | (high << 4)).reshape(n, k // 2).view(torch.int8)


def unpack_tiles(qweight: Tensor) -> Tensor:
    """``qweight`` int8 [N, K/2] in tile order -> row-major codes uint8 [N, K]."""
    n, k = qweight.shape[0], qweight.shape[1] * 2
    tiles = qweight.contiguous().view(torch.uint8).reshape(n // TILE, k // TILE, 8, 4, 2, 2, 4)
    both = torch.stack((tiles & 0xF, tiles >> 4))
    # [p, T, U, nl, kl, kp, n2, kr] -> [T, p, n2, nl, U, kp, kl, kr]
    return both.permute(1, 0, 6, 3, 2, 5, 4, 7).reshape(n, k)


def pack_group_params(params: Tensor, order: ScaleOrder = "kernel") -> Tensor:
    """Group parameters [N, K/G], one row per channel -> as stored, [K/G, N] in ``order``."""
    n, groups = params.shape
    if order == "kernel":  # channel 8 a + l of 32 is stored at 4 l + a
        stored = params.reshape(n // TILE, 4, 8, groups).permute(3, 0, 2, 1)
    else:  # channel 16 p + 8 a + l is stored at 16 p + 2 l + a
        stored = params.reshape(n // TILE, 2, 2, 8, groups).permute(4, 0, 1, 3, 2)
    return stored.reshape(groups, n).contiguous()


def unpack_group_params(stored: Tensor, order: ScaleOrder = "kernel") -> Tensor:
    """Group parameters as stored, [K/G, N] -> [N, K/G], one row per channel."""
    groups, n = stored.shape
    if order == "kernel":
        params = stored.reshape(groups, n // TILE, 8, 4).permute(1, 3, 2, 0)
    else:
        params = stored.reshape(groups, n // TILE, 2, 8, 2).permute(1, 2, 4, 3, 0)
    return params.reshape(n, groups).contiguous()
