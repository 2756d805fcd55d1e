"""Which tile of the output a program of linear computes, and how many share it: chosen by estimate.

The estimate is a machine's slowest part: products, bytes into each SM, bytes of weights from
memory, or the length of the longest chain of steps. No search on the device: the choice depends on
shapes alone, and integer sums make every choice give the same result.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from qoq.kernels.gpu.tiles import BAND

# Tokens are counted up to one of these, so that few kernels are ever compiled.
BUCKETS = (16, 32, 64, 128, 256, 512, 1024, 2048, 1 << 16)
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)
LEAST_ROWS = 64
MOST_TOKEN_TILES = 8  # that an output split over programs may have: it has a counter for each

# Estimates, none of them measured here: bytes per clock that reach an SM from L2 and from memory;
# clocks to unpack 8 KB of nibbles, until a program's first step, of a step alone on its SM, and
# until programs have met; how much of what runs side by side still adds up.
_L2_BYTES, _MEMORY_BYTES = 32.0, 18.0
_UNPACK, _FILL, _STEP, _MEET = 200, 2000, 400, 1500
_UNHIDDEN = 0.2


@dataclass(frozen=True)
class Gpu:
    """What the choice needs to know. ``shared``: bytes of shared memory per SM."""

    capability: tuple[int, int]
    sms: int
    shared: int

    @property
    def hopper(self) -> bool:
        return self.capability[0] == 9

    @property
    def macs(self) -> int:
        """int8 multiply-adds per clock and SM."""
        return 4096 if self.hopper else 2048 if self.capability in ((8, 0), (10, 0)) else 1024


class Shape(NamedTuple):
    """A weight: output channels, input channels, input channels of a step, bits of a code."""

    n: int
    k: int
    width: int
    bits: int

    @property
    def steps(self) -> int:
        return -(-self.k // self.width)


@dataclass(frozen=True)
class Tiling:
    """``rows`` of bytes (at 4 bits twice as many channels) x ``tokens``; ``splits`` share it."""

    tokens: int
    rows: int
    warps: int
    stages: int
    splits: int = 1

    def channels(self, bits: int) -> int:
        return self.rows * 8 // bits

    @property
    def may_split(self) -> bool:
        """Whether the registers that hold a program's sums leave room for another's."""
        return self.rows * self.tokens <= 64 * 32 * self.warps

    def outputs(self, m: int, n: int, bits: int) -> int:
        """Tiles of an output [m, n]: of all bands, whole."""
        bands = -(-n // (BAND * 8 // bits))
        return -(-m // self.tokens) * bands * (BAND // self.rows)


# tokens, rows, warps, stages of 128 input channels: none of them spills registers.
_NIBBLES = [(16, 64, 4, 5), (32, 64, 4, 4), (64, 64, 4, 4), (64, 128, 8, 3)]
_NIBBLES_HOPPER = [*_NIBBLES, (128, 64, 4, 4), (128, 128, 8, 4), (256, 64, 8, 4)]
_BYTES = [(16, 128, 4, 4), (32, 128, 4, 3), (64, 128, 4, 3), (128, 128, 8, 3)]
_BYTES_HOPPER = [*_BYTES[:3], (128, 128, 8, 4), (256, 128, 8, 4)]


def tilings(shape: Shape, gpu: Gpu) -> Iterator[Tiling]:
    """The tiles that fit this GPU, unsplit."""
    table = (
        (_NIBBLES_HOPPER if gpu.hopper else _NIBBLES)
        if shape.bits == 4
        else (_BYTES_HOPPER if gpu.hopper else _BYTES)
    )
    for tokens, rows, warps, stages in table:
        # Narrower steps, more of them: as many bytes on their way.
        stages = min(1 + (stages - 1) * 128 // shape.width, 9)
        tiling = Tiling(tokens, rows, warps, stages)
        if shared_bytes(tiling, shape) <= gpu.shared - 1024:
            yield tiling


def shared_bytes(tiling: Tiling, shape: Shape) -> int:
    """At most so much shared memory a program takes: its ring of steps, or a float tile."""
    step = (tiling.rows + tiling.tokens) * shape.width + 4 * tiling.rows
    return max(tiling.stages * step, 4 * tiling.tokens * (tiling.rows + 4)) + 1024


def choose(m: int, shape: Shape, gpu: Gpu) -> Tiling:
    """The tiling for m rows of activations, of least estimated time."""
    return _choose(next((bucket for bucket in BUCKETS if m <= bucket), BUCKETS[-1]), shape, gpu)


@functools.cache
def _choose(m: int, shape: Shape, gpu: Gpu) -> Tiling:
    candidates = [
        replace(tiling, splits=splits)
        for tiling in tilings(shape, gpu)
        for splits in SPLITS
        if splits == 1
        or (
            tiling.may_split
            and splits <= shape.steps
            and -(-m // tiling.tokens) <= MOST_TOKEN_TILES
        )
    ]
    return min(candidates, key=lambda tiling: clocks(tiling, m, shape, gpu))


def clocks(tiling: Tiling, m: int, shape: Shape, gpu: Gpu) -> float:
    """Estimated clocks of the whole product."""
    channels = tiling.channels(shape.bits)
    programs = tiling.outputs(m, shape.n, shape.bits) * tiling.splits
    turns = -(-shape.steps // tiling.splits)
    parts = (
        channels * tiling.tokens * shape.width / gpu.macs,
        (tiling.rows + tiling.tokens) * shape.width / _L2_BYTES,
        # Where warps outnumber the 16-row slices of a tile, several unpack the same bytes.
        max(tiling.rows, 16 * tiling.warps) * shape.width / 8192 * _UNPACK * (shape.bits == 4),
    )
    step = (1 - _UNHIDDEN) * max(parts) + _UNHIDDEN * sum(parts)
    busy = -(-programs // gpu.sms) * turns * step
    weights = shape.n * shape.k * shape.bits / 8 / (_MEMORY_BYTES * gpu.sms)
    # Programs side by side on an SM hide each other's waiting; its registers hold 16 warps of ours.
    together = min(gpu.shared // (shared_bytes(tiling, shape) + 1024), 16 // tiling.warps) or 1
    chain = -(-programs // (gpu.sms * together)) * (_FILL + turns * _STEP)
    meet = 0.0
    if tiling.splits > 1:
        tile_bytes = 4 * channels * tiling.tokens
        # Each stores its sums; the last to arrive reads those of the others.
        moved = (-(-programs // gpu.sms) + tiling.splits - 1) * tile_bytes
        meet = _MEET + moved / _L2_BYTES
    return max(busy, weights, chain) + meet
