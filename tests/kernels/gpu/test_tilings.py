"""The choice of a tile: always one that fits, and the sensible one where that is plain."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qoq.kernels.gpu.tiles import BAND
from qoq.kernels.gpu.tilings import (
    BUCKETS,
    LEAST_ROWS,
    MOST_TOKEN_TILES,
    Gpu,
    Shape,
    choose,
    clocks,
    shared_bytes,
    tilings,
)

H200 = Gpu((9, 0), 132, 228 << 10)
A100 = Gpu((8, 0), 108, 164 << 10)
L40S = Gpu((8, 9), 142, 100 << 10)
RTX_2060 = Gpu((8, 6), 28, 100 << 10)
GPUS = {"H200": H200, "A100": A100, "L40S": L40S, "small": RTX_2060}
# Output and input channels of Llama 3 8B and 70B: qkv, o, gate_up, down.
LLAMA = [
    *[(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)],
    *[(10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)],
]


@given(
    m=st.integers(1, 70_000),
    n=st.integers(1, 300_000),
    groups=st.integers(1, 300),
    width=st.sampled_from([32, 64, 128]),
    bits=st.sampled_from([4, 8]),
    gpu=st.sampled_from(list(GPUS.values())),
)
def test_what_is_chosen_can_run(
    m: int, n: int, groups: int, width: int, bits: int, gpu: Gpu
) -> None:
    shape = Shape(n, groups * width, width, bits)
    tiling = choose(m, shape, gpu)
    assert shared_bytes(tiling, shape) < gpu.shared
    assert LEAST_ROWS <= tiling.rows <= BAND
    assert 1 <= tiling.splits <= shape.steps
    if tiling.splits > 1:  # there must be a counter for each tile of the output
        bands = -(-n // (256 if bits == 4 else 128))
        assert tiling.outputs(m, n, bits) <= bands * BAND // LEAST_ROWS * MOST_TOKEN_TILES
    assert tiling == choose(m, shape, gpu)


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_the_choice_is_the_least_estimate_of_all(gpu: Gpu) -> None:
    for (n, k), m in itertools.product(LLAMA, BUCKETS):
        shape = Shape(n, k, 128, 4)
        best = clocks(choose(m, shape, gpu), m, shape, gpu)
        assert all(best <= clocks(tiling, m, shape, gpu) for tiling in tilings(shape, gpu))


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
@pytest.mark.parametrize(("n", "k"), LLAMA)
def test_one_token_takes_the_narrowest_tile_and_most_sms(gpu: Gpu, n: int, k: int) -> None:
    shape = Shape(n, k, 128, 4)
    tiling = choose(1, shape, gpu)
    assert tiling.tokens == 16
    assert tiling.outputs(1, n, 4) * tiling.splits >= 0.6 * gpu.sms


@pytest.mark.parametrize(("n", "k"), LLAMA)
def test_long_prompts_take_wide_tiles_unsplit(n: int, k: int) -> None:
    shape = Shape(n, k, 128, 4)
    tiling = choose(8192, shape, H200)
    assert tiling.tokens * tiling.rows == 128 * 128
    assert tiling.splits == 1


def test_few_kernels_serve_every_length_of_batch() -> None:
    for n, k in LLAMA:
        shape = Shape(n, k, 128, 4)
        assert len({choose(m, shape, H200) for m in range(1, 5000)}) <= len(BUCKETS)


def test_a_gpu_with_little_shared_memory_gets_small_tiles() -> None:
    shape = Shape(4096, 4096, 128, 4)
    few, many = (set(tilings(shape, gpu)) for gpu in (Gpu((9, 0), 132, 80 << 10), H200))
    assert few < many
